"""Qwen2-VL's vision tower: Qwen3-VL's, with no positions but the rotary ones, with quick GELU, and without taps.

Until transformers 5 its forward gives the merged rows alone.
"""

import types
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..forward import PackedOutputs
from ..ops import Position
from ..running.grids import Grid
from ..running.packing import Upload
from .anatomy import block_view, blocks_view, of_layers
from .gridded import output_of, without_positions
from .on_demand import fast_class, on_demand
from .qwen3_vl import Qwen3VLTower, merger_view
from .weights import Derived

MODULES = {"Qwen2VisionTransformerPretrainedModel": "qwen2_vl"}


class Qwen2VLTower(Qwen3VLTower):
    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        return without_positions(derived, self._patch_weight(), len(place), upload)

    def _made(self, outputs: PackedOutputs) -> BaseModelOutputWithPooling | Tensor:
        return outputs.pooler_output if self.output_class is None else super()._made(outputs)

    @property
    def _merged_width(self) -> int:
        return self.config.hidden_size  # the tower's own is embed_dim


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    layers = [block_view(block, block.mlp) for block in tower.blocks]
    return blocks_view(tower, layers, rotates=True, activation="quick", merger=merger_view(tower.merger))


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    _, gives_states = output_of(stock)  # not until transformers 5
    anatomy = of_layers(
        stock,
        _view,
        patch_at=("patch_embed", "proj"),
        layers_at=Qwen2VLTower.layers_at,
        attention_name=Qwen2VLTower.attention_name,
        activation="quick_gelu",
        watched=("spatial_merge_size",),
    )
    returns = {
        "output_class": BaseModelOutputWithPooling if gives_states else None,
        "returns_hidden_states": gives_states,
    }
    return fast_class(Qwen2VLTower, stock, anatomy=anatomy, **returns)


__getattr__, installed = on_demand(globals(), MODULES, _fast)
