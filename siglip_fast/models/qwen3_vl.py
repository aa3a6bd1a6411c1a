"""The vision towers of Qwen3-VL and its descendants: SigLIP's layers with 2-D rotary positions, on packed images and videos.

Rows of pixels come in the order of the merger: those of a square of 2 by 2 patches are neighbours, so four rows side by
side are a view. One frame is one segment of attention.
"""

import types
from collections.abc import Callable, Iterator
from typing import Any

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
from .gridded import InSquares, resized_bilinearly
from .on_demand import fast_class, on_demand
from .weights import Derived

# Class, here as there → the part of transformers' that it is in
MODULES = {
    "Qwen3VLVisionModel": "qwen3_vl",
    "Qwen3VLMoeVisionModel": "qwen3_vl_moe",
    "Qwen3_5VisionModel": "qwen3_5",
    "Qwen3_5MoeVisionModel": "qwen3_5_moe",
    "Qwen4ExpVisionModel": "qwen4_exp",
    "CohereCompassVisionModel": "cohere_compass",
    "Qwen3OmniMoeVisionEncoder": "qwen3_omni_moe",
}


class Qwen3VLTower(InSquares):
    layers_at = ("blocks",)
    attention_name = "attn"
    rotary_at = ("rotary_pos_emb",)
    pixels_name = "hidden_states"
    arguments = ("hidden_states", "grid_thw")
    output_class = None  # a tuple of the merged rows and the list of features (transformers 4)

    def forward(
        self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor | list[Tensor], ...]:
        """`hidden_states [M, K]`, the pixels of the M patches of all images and videos, and `grid_thw` int64 `[B, 3]`, frames,
        height and width of each in patches → `last_hidden_state [M, D]`, `pooler_output [M / 4, out]` and, of towers that
        have such, `deepstack_features`, a list of `[M / 4, out]`.

        With `output_hidden_states` also `hidden_states`: the residual stream `[M, D]` before the first layer and after
        each. Keyword arguments, the output's class and its tuple form are those of the stock class. A grid_thw on the CPU
        saves waiting for the device.

        Raises:
            TypeError: hidden_states are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        return self._forward(hidden_states, grid_thw, **kwargs)

    def _request_reasons(self, grid_thw: Any, **kwargs) -> Iterator[str]:
        yield from super()._request_reasons(grid_thw, **kwargs)
        if self.config.spatial_merge_size != self.spatial_merge_size:  # stock goes by the one here, by the other there
            yield f"spatial_merge_size is {self.spatial_merge_size}, by the config {self.config.spatial_merge_size}"

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        align_corners = getattr(self, "interpolation_align_corners", True)  # no attribute until transformers 5.6
        learned, side = self.pos_embed.weight, self.num_grid_per_side
        return resized_bilinearly(learned, side, align_corners, grids, place, upload)

    def _made(self, outputs: PackedOutputs) -> BaseModelOutputWithPooling | tuple[Tensor | list[Tensor], ...]:
        if self.output_class is None:
            return outputs.pooler_output, outputs.features
        features = {"deepstack_features": outputs.features} if _has_taps(self) else {}
        return self.output_class(outputs.last_hidden_state, outputs.pooler_output, **features)

    @property
    def multiple_of(self) -> int:
        return self.spatial_merge_size**2

    @property
    def _merged_width(self) -> int:
        return self.config.out_hidden_size

    def traced_outputs(self) -> list[tuple[int, int]]:
        features = len(self.deepstack_visual_indexes) if _has_taps(self) else 0
        merged = [(self.multiple_of, self._merged_width)] * (1 + features)
        return merged if self.output_class is None else [*super().traced_outputs(), *merged]

    def _of_traced(self, tensors: list[Tensor]) -> PackedOutputs:
        last = None if self.output_class is None else tensors[0]
        merged, *features = tensors if last is None else tensors[1:]
        return PackedOutputs(last, merged, features)


def _has_taps(tower: nn.Module) -> bool:
    return hasattr(tower, "deepstack_visual_indexes")


def _check(tower: nn.Module) -> None:
    D, (rows, _) = tower.config.hidden_size, tower.pos_embed.weight.shape
    if tower.merger.hidden_size != D * tower.spatial_merge_size**2:
        raise Unsupported(f"spatial_merge_size is {tower.spatial_merge_size}, by the merger another")
    if tower.num_grid_per_side**2 > rows:
        raise Unsupported(f"num_grid_per_side is {tower.num_grid_per_side}, pos_embed has {rows} rows")
    if (mode := getattr(tower, "interpolation_mode", "bilinear")) != "bilinear":
        raise Unsupported(f"interpolation_mode is {mode!r}, not 'bilinear'")
    if _has_taps(tower) and len(tower.deepstack_visual_indexes) != len(tower.deepstack_merger_list):
        raise Unsupported("deepstack_visual_indexes are not one for each merger")
    if _has_taps(tower) and tower.deepstack_visual_indexes and D % 64:
        raise Unsupported("hidden_size is no multiple of 64")  # what moments of rows side by side need


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP, and what it has beside."""
    taps = {}
    if _has_taps(tower):
        indexes = [*tower.deepstack_visual_indexes]
        taps = {i + 1: tower.deepstack_merger_list[indexes.index(i)] for i in range(len(tower.blocks)) if i in indexes}
    return blocks_view(
        tower,
        [_layer(block) for block in tower.blocks],
        rotates=True,
        merger=merger_view(tower.merger),
        taps={layers: merger_view(merger) for layers, merger in taps.items()},
    )


def _layer(block: nn.Module) -> types.SimpleNamespace:
    return block_view(block, types.SimpleNamespace(fc1=block.mlp.linear_fc1, fc2=block.mlp.linear_fc2))


def merger_view(merger: nn.Module) -> types.SimpleNamespace:
    if hasattr(merger, "ln_q"):  # Qwen2-VL's and Qwen3-Omni's names
        return types.SimpleNamespace(norm=merger.ln_q, fc1=merger.mlp[0], fc2=merger.mlp[2])
    return types.SimpleNamespace(norm=merger.norm, fc1=merger.linear_fc1, fc2=merger.linear_fc2)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    # Towers with taps return such, but for transformers 4, which has no class for it
    output_class = getattr(home, "BaseModelOutputWithDeepstackFeatures", None)
    if output_class is None and hasattr(home, "BaseModelOutputWithPooling"):
        output_class = BaseModelOutputWithPooling
    settings = ("spatial_merge_size", "num_grid_per_side", "interpolation_mode", "interpolation_align_corners")
    anatomy = of_layers(
        stock,
        _view,
        patch_at=("patch_embed", "proj"),
        layers_at=Qwen3VLTower.layers_at,
        attention_name=Qwen3VLTower.attention_name,
        watched=(*settings, "deepstack_visual_indexes"),
        check=_check,
    )
    returns = {"output_class": output_class, "returns_hidden_states": output_class is not None}
    return fast_class(Qwen3VLTower, stock, anatomy=anatomy, **returns)


__getattr__, installed = on_demand(globals(), MODULES, _fast)
