"""Granite Docling's vision tower: SigLIP's on tiles of one size, with a connector that takes what some of its layers give.

The connector runs as stock's. `encode`, the tower without it, is called by itself too.
"""

import types
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .anatomy import of_transformers
from .on_demand import fast_class, on_demand
from .outputs import HiddenStates, in_asked_form
from .packed import joined
from .tiles import TilesTower
from .weights import Derived

# Class, here as there → the part of transformers' that it is in
MODULES = {"GraniteDoclingVisionModel": "granite_docling"}


class GraniteDoclingTower(TilesTower):
    """What makes such a tower fast: mixed into the stock class, before it."""

    output_class: ClassVar[type[BaseModelOutputWithPooling]]

    def forward(
        self, pixel_values: Tensor, fine: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor | list[Tensor], ...]:
        """`pixel_values [B, C, H, W]`, tiles of the config's image_size → `last_hidden_state [B, N, D]`, `pooler_output`
        `[B·N / s², out]` and `deepstack_features`, a list of such; s is the config's scale_factor, half of it if `fine`.

        With `output_hidden_states` also `hidden_states`: the residual stream `[B, N, D]` before the first layer and after
        each. Keyword arguments and the tuple form are those of the stock class.

        Raises:
            TypeError: pixel_values are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        if not torch.compiler.is_exporting():
            derived, reason, _ = self._route_sizes(pixel_values, **kwargs)
            if reason is None:
                kept = self._hidden_states(kwargs, self.config.num_hidden_layers)
                hidden, taps = self._encode(derived, pixel_values, kept)
                pooled, features = self._connect(hidden, taps, fine)
                output = self.output_class(hidden, pooled, deepstack_features=features)
                if kept:  # behind all others in the tuple form, as stock adds them
                    output["hidden_states"] = tuple(kept.kept)
                return in_asked_form(output, self.config, kwargs)
            self._delegate(reason)
        return super().forward(pixel_values, fine=fine, **kwargs)

    def _connect(self, hidden: Tensor, taps: list[Tensor], fine: bool) -> tuple[Tensor, list[Tensor]]:
        """By stock's connector: a tile at a time where bits must not depend on the others."""
        if not self.batch_invariant:
            return self.connector(hidden, taps, fine=fine)
        tiles = [slice(i, i + 1) for i in range(len(hidden))]
        return joined([self.connector(hidden[tile], [tap[tile] for tap in taps], fine=fine) for tile in tiles])

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As stock's: `last_hidden_state [B, N, D]` and what some layers give, a list of such."""
        from transformers.utils.output_capturing import _active_collector  # which older versions have not

        # Stock's forward comes here too, and may record what the modules give.
        if torch.compiler.is_compiling() or _active_collector.get():
            return super().encode(pixel_values)
        derived, reason, _ = self._route_sizes(pixel_values)
        if reason is None:
            return self._encode(derived, pixel_values, None)
        self._delegate(reason)
        return super().encode(pixel_values)

    def why_not(self, pixel_values: Tensor, fine: bool = False, **kwargs) -> str | None:
        """As of all towers."""
        return super().why_not(pixel_values, **kwargs)

    def _encode(self, derived: Derived, pixel_values: Tensor, kept: HiddenStates | None) -> tuple[Tensor, list[Tensor]]:
        tapped = frozenset(i + 1 for i in self.config.deepstack_visual_indexes if i >= 0)
        asked = kept.indices if kept else frozenset()
        states = HiddenStates(None if asked is None else tapped | asked)
        hidden, _ = self._run(derived, pixel_values, states)
        for state in states.kept if kept else ():
            kept.collect(state)
        return hidden, [state for i, state in enumerate(states.kept) if i in tapped]


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    return fast_class(
        GraniteDoclingTower,
        stock,
        anatomy=of_transformers(home, "GraniteDocling"),
        output_class=home.GraniteDoclingImageFeaturesOutput,
    )


__getattr__, installed = on_demand(globals(), MODULES, _fast)
