"""Kimi K2.5's vision tower, MoonViT: SigLIP's layers with 2-D rotary positions, on packed images and videos in raster order.

Its frequencies are laid out width before height and interleaved, which another order of the rows of Q's and K's
projections undoes. The frames of a video attend to each other; the rows behind the last norm, averaged over them, are
the pooler's output, the four of a square of 2 by 2 patches together.
"""

import types
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..forward import PackedOutputs
from ..ops import Position
from ..running.grids import Grid, squares
from ..running.packing import Upload, ranges
from .anatomy import Unsupported, of_layers, packed_embeddings
from .gridded import Gridded, whole_squares
from .on_demand import fast_class, on_demand
from .resized import ResizedPositions
from .weights import Derived

MODULES = {"Kimi_K25VisionModel": "kimi_k25"}


class KimiTower(Gridded):
    layers_at = ("layers",)
    attention_name = "attn"
    is_flat = False
    casts = False
    rotary_at = ("rotary_emb",)
    has_own_positions = True
    joins_frames = True
    ties_hidden_states = True
    mixes_lengths: bool  # whether videos of different length may be in one call

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [M, 3, p, p]`, the M patches of all images and videos, and `grid_thw` int64 `[B, 3]`, frames, height
        and width of each in patches → `last_hidden_state [M, D]`, `pooler_output [squares, 4, D]`; the rest is as of
        `siglip_fast.models.qwen3_vl.Qwen3VLTower.forward`."""
        return self._forward(pixel_values, grid_thw, **kwargs)

    def _grids_reason(self, grids: Sequence[Grid]) -> str | None:
        most = self.patch_embed.pos_emb.num_frames
        if not whole_squares(grids, self._side):
            return f"the sides of grid_thw are no multiples of {self._side}"
        if max(grids)[0] > most:
            return f"grid_thw has a video of more than {most} frames"
        if not self.mixes_lengths and len({t for t, _, _ in grids}) > 1:
            return "grid_thw has videos of different length"
        return None

    @property
    def _side(self) -> int:
        return self.merge_kernel_size[0]

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        table, offsets = derived.kept(_Positions, self.patch_embed.pos_emb).of(grids)
        index = upload.add(ranges(offsets, np.prod(grids, axis=1))[:, None])
        return lambda: Position(table, index())

    def _finished(self, outputs: PackedOutputs, grids: list[Grid]) -> PackedOutputs:
        y, upload = outputs.last_hidden_state, Upload()
        sources = [upload.add(source) for source in squares(grids, self._side)]
        upload.send(y.device)
        pooled = [_mean(y, source()) for source in sources]
        pooled = pooled[0] if len(pooled) == 1 else torch.cat(pooled)
        return outputs._replace(pooler_output=pooled.unflatten(0, (-1, self._side**2)))

    @property
    def example_side(self) -> int:
        return self._side

    def traced_outputs(self) -> list[tuple[int, int]]:
        return [*super().traced_outputs(), (0, self._side**2 * self.config.hidden_size)]

    def _of_traced(self, tensors: list[Tensor]) -> PackedOutputs:
        last, pooled = tensors
        return PackedOutputs(last, pooled.unflatten(1, (self._side**2, -1)), [])


def _mean(y: Tensor, source: Tensor) -> Tensor:
    """The mean of rows `source[:, 0]`, `source[:, 1]`, … in float32; one after the other, so that its bits do not depend on how
    many there are."""
    frames = source.shape[1]
    taken = y.index_select(0, source.view(-1))
    if frames == 1:
        return taken
    first, *others = taken.float().unflatten(0, (-1, frames)).unbind(1)
    return (sum(others, first) / frames).to(y.dtype)


class _Positions(ResizedPositions):
    """Those on the grid and those in time, of Kimi K2.5's position embeddings."""

    def _resized(self, sizes: list[Grid]) -> Iterator[Tensor]:
        """By stock's own code on patches that are zero."""
        embeddings, learned = self._embeddings, self._embeddings.position_embeddings
        lengths = [self._rows(*grid) for grid in sizes]
        patches, grids = learned.new_zeros(sum(lengths), learned.shape[-1]), torch.tensor(sizes, device=learned.device)
        return iter(type(embeddings).forward(embeddings, patches, grids).split(lengths))


def _check(tower: nn.Module) -> None:
    height, width = tower.merge_kernel_size
    if height != width:
        raise Unsupported(f"merge_kernel_size is {[height, width]}, not square")


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    proj = tower.patch_embed.proj
    return types.SimpleNamespace(
        embeddings=packed_embeddings(proj, proj.kernel_size[-1]),
        encoder=types.SimpleNamespace(layers=[_layer(layer) for layer in tower.layers]),
        post_layernorm=tower.final_layernorm,
        rotates=True,
    )


def _layer(layer: nn.Module) -> types.SimpleNamespace:
    own = layer.attn
    attention = types.SimpleNamespace(num_heads=own.num_heads, out_proj=own.proj, v_proj=own.v_proj)
    for name in ("q_proj", "k_proj"):
        projection = getattr(own, name)
        rows = [_height_first(tensor, own.num_heads) for tensor in (projection.weight, projection.bias)]
        setattr(attention, name, types.SimpleNamespace(weight=rows[0], bias=rows[1]))
    return types.SimpleNamespace(self_attn=attention, mlp=layer.mlp, layer_norm1=layer.norm1, layer_norm2=layer.norm2)


def _height_first(projection: Tensor, num_heads: int) -> Tensor:
    """The rows of a projection such that in either half of a head the channels that turn by the height come first and those
    by the width then, which came in turns: width, height, width, …"""
    return projection.unflatten(0, (num_heads, 2, -1, 2)).flip(3).transpose(2, 3).flatten(0, 3)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    anatomy = of_layers(
        stock,
        _view,
        patch_at=("patch_embed", "proj"),
        layers_at=KimiTower.layers_at,
        attention_name=KimiTower.attention_name,
        watched=("merge_kernel_size",),
        check=_check,
    )
    # Until transformers 5.24 the frames were gathered, into one tensor for all
    return fast_class(KimiTower, stock, anatomy=anatomy, mixes_lengths=hasattr(stock, "temporal_merge"))


__getattr__, installed = on_demand(globals(), MODULES, _fast)
