"""The position embedding of transformers' SigLIP for images of some size."""

from torch import Tensor, nn


def must_interpolate(embeddings: nn.Module, height: int, width: int) -> bool:
    """Whether images of so many pixels have another number of patches than there are positions."""
    p = embeddings.patch_embedding.weight.shape[-1]
    return (height // p) * (width // p) != len(embeddings.position_embedding.weight)


def position_of(embeddings: nn.Module, pixel_values: Tensor, interpolate: bool) -> Tensor:
    """`[N, D]` for `pixel_values [B, C, H, W]`; by stock's own interpolation where that was asked for. Raises
    ValueError where pixel_values have the wrong rank or channels, or a size that the positions do not fit."""
    D, C, p, _ = embeddings.patch_embedding.weight.shape
    if pixel_values.ndim != 4 or pixel_values.shape[1] != C:
        raise ValueError(f"pixel_values: expected shape [batch, {C}, height, width], got {list(pixel_values.shape)}")
    height, width = pixel_values.shape[2:]
    tokens = (height // p) * (width // p)
    position = embeddings.position_embedding.weight
    if tokens == 0:
        raise ValueError(f"pixel_values: expected at least one patch of {p}×{p} pixels, got {height}×{width}")
    if interpolate:
        like_tokens = position.new_empty(()).expand(1, tokens, D)
        return embeddings.interpolate_pos_encoding(like_tokens, height, width)[0]
    if tokens != len(position):
        size = embeddings.image_size
        raise ValueError(
            f"pixel_values: {height}×{width} pixels are {tokens} patches of {p}×{p}, but the model has "
            f"{len(position)} positions; expected images of {size}×{size} or interpolate_pos_encoding=True"
        )
    return position
