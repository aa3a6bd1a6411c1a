"""Launch plans for images of any size: of the whole forward for sizes that come again, of a layer for all others.

Most mixes of sizes never come again, so a plan of theirs would be made in vain; some come all the time. But the layers of
a call are alike: what its first layer launches, the later ones launch with their own weights.
"""

import functools
import itertools
from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..backends.select import is_capturing
from ..forward import Layer, LayerWeights, PackedOutputs, Packing, Stream, TowerWeights
from . import plans

TIMES = 3  # that sizes have to come


class PackedPlans:
    """The plans of a `forward(pixel_rows, packing, collect, planned)` on certain weights (`siglip_fast.forward.forward_packed`)."""

    def __init__(self, forward: Callable[..., PackedOutputs], weights: TowerWeights):
        self._forward = forward
        self._weights = weights
        self._layers = {id(layer): _parts(layer) for layer in weights.layers}
        self._plans = plans.Plans()
        # How often one of the latest keys came
        self._times = functools.lru_cache(plans.MOST)(lambda key: itertools.count(1))
        # By whole plan, the streams that it has run on
        self._streams: WeakKeyDictionary[plans.Plan, set] = WeakKeyDictionary()

    def once(
        self, pixel_rows: Tensor, packing: Packing, collect: Callable[[Tensor], None] | None = None
    ) -> PackedOutputs:
        """The forward, whose layers are planned."""

        def planned(run: Layer) -> Layer:
            return run if plans.is_profiled() else PlannedLayer(run, self._layers, packing)

        return self._forward(pixel_rows, packing, collect, planned)

    def __call__(self, pixel_rows: Tensor, sizes: Hashable, pack: Callable[[], Packing]) -> PackedOutputs:
        """The forward by `pack()`, which depends on `sizes` alone; planned when these come for the third time."""
        key = sizes, plans.kind(pixel_rows), plans.mode(self._weights.patch.weight.dtype)
        if plan := self._plans.find(key):
            self._hold(plan, pixel_rows.device)
            return _packed(plan(pixel_rows))
        packing = pack()
        if next(self._times(key)) < TIMES or self._plans.has_tried(key) or is_capturing(pixel_rows):
            return self.once(pixel_rows, packing)
        if pixel_rows.is_cuda:  # the next call may come on another stream, which would not wait for what is uploaded
            torch.cuda.current_stream(pixel_rows.device).synchronize()

        def forward(pixel_rows: Tensor) -> tuple[Tensor | None, ...]:
            y, pooled, features = self._forward(pixel_rows, packing)
            return y, pooled, *features

        return _packed(self._plans.make(key, forward, [pixel_rows], (self._weights, packing)))

    def _hold(self, plan: plans.Plan, device: torch.device) -> None:
        """Has torch give the memory of the plan's packing to nobody, once the plan is gone, before what the current stream
        does with it is done; it was allocated on another one, maybe."""
        if device.type != "cuda":
            return
        stream, streams = torch.cuda.current_stream(device), self._streams.setdefault(plan, set())
        if stream not in streams:
            streams.add(stream)
            _, packing = plan.constants
            for tensor in tree_leaves(packing):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(stream)


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
        outputs, self._plans[key] = plans.recorded(
            lambda x, m, *_: self._run(x, m, layer), [x, m, *tensors], self._packing
        )
        return outputs


def _parts(layer: LayerWeights) -> tuple[list[Tensor], tuple]:
    """A layer's tensors, and all else that its launches depend on: what kernels do in the tensors, and the numbers."""
    leaves = tree_leaves(layer)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, tuple(plans.kind(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _packed(outputs: tuple[Tensor | None, ...]) -> PackedOutputs:
    last_hidden_state, pooler_output, *features = outputs
    return PackedOutputs(last_hidden_state, pooler_output, features)
