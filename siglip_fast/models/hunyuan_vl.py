"""HunYuanVL's vision tower and Hy4's: SigLIP's layers with GELU's exact form, on packed images, without a norm behind the last layer.

Rows come in raster order; learned positions are resized to each image. What merges an image's rows, and puts tokens of
its own between them, is stock's module, run on each image of the last hidden state: RMSNorms and convolutions, for
which there are no operations here.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..forward import PackedOutputs
from ..ops import Position
from ..running.grids import Grid, interpolated
from ..running.packing import Upload
from .anatomy import of_layers, packed_embeddings
from .gridded import Gridded, resized_as_stock, rows_of, weighted
from .on_demand import fast_class, on_demand
from .resized import ResizedPositions
from .weights import Derived

MODULES = {"HunYuanVLVisionTransformer": "hunyuan_vl", "HYV4VLVisionModel": "hy_v4_vl"}


class HunYuanVLTower(Gridded):
    layers_at = ("layers",)
    width_name: ClassVar[str] = "text_hidden_size"  # of merged rows, in the config
    takes_videos: ClassVar[bool] = False

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [M, K]`, the pixels of the M patches of all images, and `grid_thw` int64 `[B, 3]`, 1, or in Hy4 frames,
        height and width of each in patches → `last_hidden_state [1, M, D]` and `pooler_output [1, tokens, out]`; the rest is
        as of `siglip_fast.models.qwen3_vl.Qwen3VLTower.forward`."""
        return self._forward(pixel_values, grid_thw, **kwargs)

    def _grids_reason(self, grids: Sequence[Grid]) -> str | None:
        if (mode := self.embeddings.config.interpolate_mode) != "bilinear":
            return f"interpolate_mode is {mode!r}, not 'bilinear'"
        if min(min(h, w) for _, h, w in grids) < self.example_side:
            return f"grid_thw has an image of fewer than {self.example_side} patches a side"
        return "grid_thw has a video" if max(grids)[0] > 1 and not self.takes_videos else None

    @property
    def example_side(self) -> int:
        return max(2, self.patch_merger.spatial_merge_size)  # less than which the merger does not take

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        learned = self.embeddings.position_embedding.weight[1:]  # the first is of a token that there is none of
        return weighted(learned, interpolated(place, grids, self.embeddings.position_edge), upload)

    def _finished(self, outputs: PackedOutputs, grids: list[Grid]) -> PackedOutputs:
        images = outputs.last_hidden_state[None].split(rows_of(grids), dim=1)
        merged = [self.patch_merger(image, size=(h, w))[0] for image, (_, h, w) in zip(images, grids, strict=True)]
        return outputs._replace(pooler_output=torch.cat(merged))

    def _output(self, outputs: PackedOutputs, states: tuple[Tensor | None, ...], kwargs: dict[str, Any]) -> Any:
        """Stock's, all of whose tensors have a dimension of 1 before their rows."""
        last, pooled, *states = (None if t is None else t[None] for t in (*outputs[:2], *states))
        return super()._output(PackedOutputs(last, pooled, []), tuple(states), kwargs)

    def traced_outputs(self) -> list[tuple[int, int]]:
        return [*super().traced_outputs(), (0, getattr(self.config, self.width_name))]

    def _of_traced(self, tensors: list[Tensor]) -> PackedOutputs:
        return PackedOutputs(*tensors, [])


class HYV4VLTower(HunYuanVLTower):
    width_name = "out_hidden_size"
    takes_videos = True  # frame by frame
    has_own_positions = True

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        sizes = [(h, w) for _, h, w in grids]
        return resized_as_stock(derived.kept(_Positions, self.embeddings), sizes, grids, upload)


class _Positions(ResizedPositions):
    def _resized(self, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """By stock's own code. It scales as if an image were a tenth of a patch larger, which torch leaves out for a side as
        long as the table's, and maybe not everywhere."""
        own = self._embeddings
        like = own.position_embedding.weight.detach()
        return (type(own).interpolate_pos_encoding(own, like, *size)[0] for size in sizes)


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    own = tower.embeddings
    return types.SimpleNamespace(
        embeddings=packed_embeddings(own.patch_embedding, own.patch_size),
        encoder=types.SimpleNamespace(layers=[_layer(layer) for layer in tower.layers]),
        post_layernorm=None,
        activation="erf",
    )


def _layer(layer: nn.Module) -> types.SimpleNamespace:
    own, norms = layer.self_attn, {"layer_norm1": layer.layer_norm1, "layer_norm2": layer.layer_norm2}
    attention = types.SimpleNamespace(q_proj=own.q_proj, k_proj=own.k_proj, v_proj=own.v_proj, out_proj=own.o_proj)
    attention.num_heads = own.num_heads
    return types.SimpleNamespace(self_attn=attention, mlp=layer.mlp, **norms)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    anatomy = of_layers(
        stock,
        _view,
        patch_at=("embeddings", "patch_embedding"),
        layers_at=HunYuanVLTower.layers_at,
        rotates=False,
        activation="gelu",
    )
    return fast_class(HYV4VLTower if stock.__name__.startswith("HYV4") else HunYuanVLTower, stock, anatomy=anatomy)


__getattr__, installed = on_demand(globals(), MODULES, _fast)
