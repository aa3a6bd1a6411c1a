"""Images as bytes: the image processor's rescaling and normalisation, as it is and folded into the patch embedding."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import PatchEmbedding, check_shape


class Normalization(NamedTuple):
    """`(images · rescale_factor − mean[c]) / std[c]`, by the names of Hugging Face's image processors."""

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]` → float32, contiguous. By numbers, not by tensors: a CUDA graph can be captured of it."""
        channels = zip(images.unbind(1), self.image_mean, self.image_std, strict=True)
        normalized = [(channel.float() * self.rescale_factor - mean) / std for channel, mean, std in channels]
        return torch.stack(normalized, dim=1)

    def folds(self, dtype: torch.dtype) -> bool:
        """Whether `fold` keeps the accuracy rule. In float32 only if zero lies where the bytes are: else products and bias
        cancel (white images, means of 1 and deviations of 0.02: three times the error that the rule allows)."""
        return dtype != torch.float32 or all(abs(t) <= 1 for t in self._affine()[1])

    def _affine(self) -> tuple[list[float], list[float]]:
        """s and t of each channel, of which s·(u − 128) + t is the normalised value."""
        s = [self.rescale_factor / std for std in self.image_std]
        return s, [128 * s - mean / std for s, mean, std in zip(s, self.image_mean, self.image_std, strict=True)]

    def fold(self, patch: PatchEmbedding) -> PatchEmbedding:
        """The patch embedding that takes uint8 images to the tokens of the normalised ones.

        Bytes stand for u − 128, so channel c's normalised value is s·(u − 128) + t with s = rescale_factor / std[c] and
        t = 128·s − mean[c] / std[c]. The largest s scales the products, since fp16 weights multiplied by it would be
        subnormal. Weights are multiplied by the rest, s / scale ≤ 1: by exactly 1 where all std are equal, as SigLIP's.
        """
        D, C = len(patch.weight), len(self.image_std)
        s, t = self._affine()
        scale = max(s, key=abs)
        ratio = torch.tensor([s / scale for s in s], device=patch.weight.device, dtype=torch.float64)
        weight = patch.weight.unflatten(1, (C, -1))
        if not (ratio == 1).all():
            weight = (weight * ratio[:, None]).to(weight.dtype)
        # Summed from the rounded weights: rounding then changes what a normalised value is multiplied by, nothing else.
        shift = (weight.double().sum(2) / ratio * ratio.new_tensor(t)).sum(1)
        bias = (patch.bias.double() + shift).float()
        return PatchEmbedding(weight.reshape(D, -1), bias, patch.patch_size, scale)


def normalization(
    image_mean: Sequence[float], image_std: Sequence[float], rescale_factor: float, channels: int
) -> Normalization:
    """Checked; raises TypeError where values are no numbers, ValueError where they are not `channels` many, one is not
    finite, or a divisor zero."""
    made = Normalization(
        _numbers("image_mean", image_mean, channels),
        _numbers("image_std", image_std, channels),
        *_numbers("rescale_factor", [rescale_factor], 1),
    )
    if not all(map(math.isfinite, (*made.image_mean, *made.image_std, made.rescale_factor))):
        raise ValueError(f"image_mean, image_std, rescale_factor: expected finite numbers, got {made[:]}")
    if not all(made.image_std):
        raise ValueError(f"image_std: expected no zero, got {list(image_std)}")
    if not made.rescale_factor:
        raise ValueError("rescale_factor: expected not zero")
    return made


def _numbers(name: str, values: Sequence[float], count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, {count} of them, got {values!r}") from None
    if len(numbers) != count:
        raise ValueError(f"{name}: expected {count} values, one a channel, got {list(values)}")
    return numbers


def check_images(images: Tensor, channels: int) -> None:
    """Raises TypeError unless images are a uint8 tensor, ValueError unless of shape `[B, channels, H, W]`."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a torch.Tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected torch.uint8, got {images.dtype}, shape {list(images.shape)}")
    check_shape("images", images, (None, channels, None, None))
