"""Launch plans for images of any size: of the whole forward for sizes that come again, of a layer for all others.

Most mixes of sizes never come again, so a plan of theirs would be made in vain. But the layers of a call are alike: what
its first layer launches, the later ones launch with their own weights.
"""

import functools
import itertools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from siglip_fast.kernels.launch import recording

from ..forward import Layer, LayerWeights, PackedOutputs, Packing, Stream, TowerWeights
from . import plans
from .recorder import Recorder


class PackedPlans:
    """The plans of a `forward(pixel_rows, packing, collect, planned)` on certain weights (`siglip_fast.forward.forward_packed`)."""

    def __init__(self, forward: Callable[..., PackedOutputs], weights: TowerWeights):
        self._forward = forward
        self._constants = weights, *weights.taps.values()
        self._dtype = weights.patch.weight.dtype
        self._layers = {id(layer): _tensors(layer) for layer in weights.layers}
        self._plans = plans.Plans()
        # How often one of the latest keys came
        self._times = functools.lru_cache(plans.MOST)(lambda key: itertools.count())

    def once(
        self, pixel_rows: Tensor, packing: Packing, collect: Callable[[Tensor], None] | None = None
    ) -> PackedOutputs:
        """The forward, whose layers are planned."""

        def planned(run: Layer) -> Layer:
            return run if plans.is_profiled() else PlannedLayer(run, self._layers, packing)

        return self._forward(pixel_rows, packing, collect, planned)

    def __call__(self, pixel_rows: Tensor, sizes: Hashable, pack: Callable[[], Packing]) -> PackedOutputs:
        """The forward by `pack()`, which depends on `sizes` alone; planned when these come for the second time."""
        key = sizes, plans.kind(pixel_rows), plans.mode(self._dtype)
        if plan := self._plans.find(key):
            _hold(plan, pixel_rows.device)
            return _packed(plan(pixel_rows))
        packing = pack()
        if next(self._times(key)) == 0 or self._plans.has_tried(key):
            return self.once(pixel_rows, packing)
        constants = *self._constants, packing
        outputs = self._plans.make(key, lambda rows: _flat(self._forward(rows, packing)), [pixel_rows], constants)
        if pixel_rows.is_cuda and self._plans.has_tried(key):
            # The next call may come on another stream, which would not wait for what was uploaded.
            torch.cuda.current_stream(pixel_rows.device).synchronize()
        return _packed(outputs)


class PlannedLayer:
    """`run(x, m, layer)` of one call, planned when it first runs; what else it reads is part of `packing`."""

    def __init__(self, run: Layer, layers: dict[int, tuple[list[Tensor], tuple]], packing: Packing):
        self._run, self._layers, self._packing = run, layers, packing
        self._plans: dict[Hashable, plans.Plan | None] = {}

    def __call__(self, x: Tensor, m: Tensor | None, layer: LayerWeights) -> Stream:
        tensors, kind = self._layers[id(layer)]
        key = kind, plans.kind(x), plans.kind(m)
        if plan := self._plans.get(key):
            return plan(x, m, *tensors)
        if key in self._plans:
            return self._run(x, m, layer)
        recorder = Recorder([x, m, *tensors], self._packing)
        with recording(recorder):
            outputs = self._run(x, m, layer)
        self._plans[key] = plans.plan_of(recorder, outputs)
        return outputs


def _tensors(layer: LayerWeights) -> tuple[list[Tensor], tuple]:
    """A layer's, and all that kernels and grids depend on in them."""
    tensors = [leaf for leaf in tree_leaves(layer) if isinstance(leaf, Tensor)]
    return tensors, tuple(map(plans.kind, tensors))


def _hold(plan: plans.Plan, device: torch.device) -> None:
    """Has torch give the memory of the plan's packing to nobody, once the plan is gone, before what the current stream does
    with it is done; it was allocated on another one, maybe."""
    if device.type == "cuda" and (stream := torch.cuda.current_stream(device)) not in plan.streams:
        plan.streams.add(stream)
        for tensor in tree_leaves(plan.constants[-1]):
            if isinstance(tensor, Tensor):
                tensor.record_stream(stream)


def _flat(outputs: PackedOutputs) -> tuple[Tensor | None, ...]:
    return outputs.last_hidden_state, outputs.pooler_output, *outputs.features


def _packed(outputs: tuple[Tensor | None, ...]) -> PackedOutputs:
    last_hidden_state, pooler_output, *features = outputs
    return PackedOutputs(last_hidden_state, pooler_output, features)
