"""GLM-Image's vision tower: SigLIP's layers with GELU's exact form, on packed images, without a norm behind the last layer.

Rows come square by square of merge size by merge size patches; learned positions are resized to each image.
"""

import math
import types
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..forward import PackedOutputs
from ..ops import Position
from ..running.grids import Grid
from ..running.packing import Upload
from .anatomy import Unsupported, layer_view, of_layers, packed_embeddings
from .gridded import Gridded, output_of, resized_bilinearly, whole_squares
from .on_demand import fast_class, on_demand
from .weights import Derived

MODULES = {"GlmImageVisionModel": "glm_image"}


class GlmImageTower(Gridded):
    layers_at = ("blocks",)
    attention_name = "attn"
    pools: bool  # whether the pooler's output is the last hidden state

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [M, K]`, the pixels of the M patches of all images, and `grid_thw` int64 `[B, 3]`, 1, height and width
        of each in patches → `last_hidden_state [M, D]`, and the same as `pooler_output` where stock's has it; the rest is as
        of `siglip_fast.models.qwen3_vl.Qwen3VLTower.forward`."""
        return self._forward(pixel_values, grid_thw, **kwargs)

    def _merges(self, grids: Sequence[Grid]) -> int:
        return self.spatial_merge_size

    def _grids_reason(self, grids: Sequence[Grid]) -> str | None:
        if not whole_squares(grids, self.spatial_merge_size):
            return f"the sides of grid_thw are no multiples of {self.spatial_merge_size}"
        return "grid_thw has a video" if max(grids)[0] > 1 else None  # stock takes each frame for an image more

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        learned = self.embeddings.position_embedding.weight
        return resized_bilinearly(learned, math.isqrt(len(learned)), False, grids, place, upload)

    def _made(self, outputs: PackedOutputs) -> BaseModelOutputWithPooling:
        last = outputs.last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=last if self.pools else None)

    @property
    def example_side(self) -> int:
        return self.spatial_merge_size


def _check(tower: nn.Module) -> None:
    if tower.blocks[0].attn.qkv.bias is None:
        raise Unsupported("its projections have no bias")
    if (method := tower.embeddings.interpolated_method) != "bilinear":
        raise Unsupported(f"embeddings.interpolated_method is {method!r}, not 'bilinear'")


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    proj = tower.patch_embed.proj
    return types.SimpleNamespace(
        embeddings=packed_embeddings(proj, proj.kernel_size[-1]),
        encoder=types.SimpleNamespace(layers=[_layer(block) for block in tower.blocks]),
        post_layernorm=None,
        activation="erf",
    )


def _layer(block: nn.Module) -> types.SimpleNamespace:
    own = block.attn
    return layer_view((block.norm1, block.norm2), own.qkv, own.proj, own.num_heads, block.mlp)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    anatomy = of_layers(
        stock,
        _view,
        patch_at=("patch_embed", "proj"),
        layers_at=GlmImageTower.layers_at,
        attention_name=GlmImageTower.attention_name,
        rotates=False,
        activation="gelu",
        watched=("spatial_merge_size",),
        check=_check,
    )
    return fast_class(GlmImageTower, stock, anatomy=anatomy, pools=output_of(stock)[1])


__getattr__, installed = on_demand(globals(), MODULES, _fast)
