"""ERNIE 4.5 VL's vision tower: SigLIP's layers with 2-D rotary positions and no others, and quick GELU, on packed images and videos.

Rows come square by square of merge size by merge size patches. One frame is one segment of attention. The resampler
that merges rows and frames is outside of it.
"""

import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..ops import Position
from ..running.grids import Grid
from ..running.packing import Upload
from .anatomy import block_view, blocks_view, of_layers
from .gridded import InSquares, without_positions
from .on_demand import fast_class, on_demand
from .outputs import asked_for
from .weights import Derived

MODULES = {"Ernie4_5_VLMoeVisionTransformerPretrainedModel": "ernie4_5_vl_moe"}


class Ernie45VLTower(InSquares):
    layers_at = ("blocks",)
    attention_name = "attn"
    rotary_at = ("rotary_pos_emb",)
    pixels_name = "hidden_states"
    arguments = ("hidden_states", "grid_thw")
    ties_hidden_states = True

    def forward(
        self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`hidden_states [M, K]`, the pixels of the M patches of all images and videos, and `grid_thw` int64 `[B, 3]`, frames,
        height and width of each in patches → `last_hidden_state [M, D]`; the rest is as of
        `siglip_fast.models.qwen3_vl.Qwen3VLTower.forward`."""
        return self._forward(hidden_states, grid_thw, **kwargs)

    def _request_reasons(self, grid_thw: Any, **kwargs) -> Iterator[str]:
        if asked_for("output_router_logits", self.config, kwargs):  # the model around the tower says whether they are
            yield "output_router_logits was asked for"
        yield from super()._request_reasons(grid_thw, **kwargs | {"output_router_logits": None})

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        return without_positions(derived, self._patch_weight(), len(place), upload)


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    layers = [block_view(block, block.mlp) for block in tower.blocks]
    return blocks_view(tower, layers, rotates=True, activation="quick", post_layernorm=tower.ln)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    anatomy = of_layers(
        stock,
        _view,
        patch_at=("patch_embed", "proj"),
        layers_at=Ernie45VLTower.layers_at,
        attention_name=Ernie45VLTower.attention_name,
        activation="quick_gelu",
    )
    return fast_class(Ernie45VLTower, stock, anatomy=anatomy)


__getattr__, installed = on_demand(globals(), MODULES, _fast)
