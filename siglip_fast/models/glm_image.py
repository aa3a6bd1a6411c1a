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
from .anatomy import Unsupported, block_view, blocks_view, of_layers
from .gridded import InSquares, output_of, resized_bilinearly
from .on_demand import fast_class, on_demand
from .weights import Derived

MODULES = {"GlmImageVisionModel": "glm_image"}


class GlmImageTower(InSquares):
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

    def _grids_reason(self, grids: Sequence[Grid]) -> str | None:
        if max(grids)[0] > 1:
            return "grid_thw has a video"  # each frame of which stock takes for an image more
        return super()._grids_reason(grids)

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        learned = self.embeddings.position_embedding.weight
        return resized_bilinearly(learned, math.isqrt(len(learned)), False, grids, place, upload)

    def _made(self, outputs: PackedOutputs) -> BaseModelOutputWithPooling:
        last = outputs.last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=last if self.pools else None)


def _check(tower: nn.Module) -> None:
    if (method := tower.embeddings.interpolated_method) != "bilinear":
        raise Unsupported(f"embeddings.interpolated_method is {method!r}, not 'bilinear'")


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    return blocks_view(tower, [block_view(block, block.mlp) for block in tower.blocks], activation="erf")


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
