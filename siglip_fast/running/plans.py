"""Launch plans: the first forward of a shape notes what it launches, and the later ones launch just that.

A plan holds compiled kernels, their grids and arguments, and where what they leave for each other lies in one piece of
memory. Each forward takes that piece and its outputs from torch's allocator, so threads and streams share nothing, and
no memory of theirs is kept between forwards. The addresses of weights are part of a plan, which is dropped together with the
derived weights that it was made on (`siglip_fast.models.weights.Derived`).
"""

import itertools
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_fast.kernels.gemm import device_guard, input_precision
from siglip_fast.kernels.launch import recording

from ..backends.select import is_capturing, is_for_graph
from .recorder import Call, Description, Launch, Recorder, View, arrange

logger = logging.getLogger("siglip_fast")

MOST = 64  # plans that are kept for a model

Forward = Callable[..., tuple[Tensor | None, ...]]


def applies(tensor: Tensor) -> bool:
    """Whether forwards on its device can be planned."""
    return tensor.is_cuda


class Plans:
    """The plans of a model's forwards that were used last, by whatever tells them apart beside its weights."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan | None] = {}  # None: what that forward does cannot be repeated
        self._used: dict[Hashable, int] = {}
        self._clock = itertools.count()
        self._lock = threading.Lock()

    def find(self, key: Hashable) -> "Plan | None":
        """The plan to launch by now, if there is one."""
        plan = self._plans.get(key)
        if plan is None or is_profiled():
            return None
        self._used[key] = next(self._clock)
        return plan

    def has_tried(self, key: Hashable) -> bool:
        """Whether one was made, or cannot be."""
        return key in self._plans

    def make(self, key: Hashable, forward: Forward, inputs: Sequence[Tensor], constants: Any) -> tuple:
        """`forward(*inputs)`, and a plan of it for the next time; `constants` is what else it reads."""
        if key in self._plans or is_capturing(inputs[0]) or not self._lock.acquire(blocking=False):
            return forward(*inputs)
        try:
            outputs, plan = recorded(forward, inputs, constants)
            self._used[key] = next(self._clock)
            latest = sorted(self._plans, key=self._used.__getitem__)[max(0, len(self._plans) + 1 - MOST) :]
            self._used = {key: self._used[key] for key in (*latest, key)}
            self._plans = {key: self._plans[key] for key in latest} | {key: plan}
            return outputs
        finally:
            self._lock.release()


def kind(tensor: Tensor) -> tuple:
    """What kernels, grids and constants depend on in a tensor."""
    # For other alignments Triton has other kernels; tensors with a bit for negation are copied first.
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16, tensor.is_neg()


def mode(dtype: torch.dtype) -> tuple:
    """What they depend on beside tensors, where the weights have this dtype."""
    return is_for_graph(), input_precision(dtype) if dtype is torch.float32 else None


def is_profiled() -> bool:
    """Whether somebody, such as Triton's profiler, is to be called at each launch."""
    runtime = triton.knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))


def recorded(forward: Forward, inputs: Sequence[Tensor], constants: Any) -> "tuple[tuple, Plan | None]":
    """`forward(*inputs)`, and its plan, None where it cannot be repeated; `constants` is what else it reads."""
    recorder = Recorder(inputs, constants)
    with recording(recorder):
        outputs = forward(*inputs)
    views = tuple(map(recorder.output, outputs))
    if recorder.reason:
        logger.debug("no launch plan: %s", recorder.reason)
        return outputs, None
    return outputs, Plan(recorder, views)


class Plan:
    """What a forward on inputs of one shape launches."""

    def __init__(self, recorder: Recorder, outputs: tuple[View | None, ...]):
        offsets, self.workspace = arrange(recorder.buffers)  # in bytes
        self.constants = recorder.constants  # of which the launches have addresses
        self._outputs = [view and view.buffer for view in outputs]
        returned = {buffer for step in recorder.steps if isinstance(step, Call) for buffer in step.results}
        self._written = {view.buffer: view for view in outputs if view and view.buffer not in returned}
        self._parts = [Part(*part, offsets) for part in _parts(recorder, returned - set(self._outputs))]
        self.launches = sum(isinstance(step, Launch) for step in recorder.steps)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        device = inputs[0].device
        with device_guard(inputs[0]):
            given = dict(enumerate(inputs))
            for buffer, view in self._written.items():
                given[buffer] = torch.empty(view.shape, dtype=view.dtype, device=device)
            piece = torch.empty(self.workspace, dtype=torch.uint8, device=device)
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            for part in self._parts:
                part(given, piece, stream)
        return tuple(None if buffer is None else given[buffer] for buffer in self._outputs)


class Prepared:
    """A launch whose arguments are complete but for the stream and the addresses of buffers."""

    STREAM = 3  # place among the arguments of a compiled kernel's `run`

    def __init__(self, launch: Launch):
        compiled, grid, arguments = launch
        # As Triton launches: launch metadata and two hooks, of which `is_profiled` says that there are none.
        head = [*(*grid, 1, 1)[:3], 0, compiled.function, compiled.packed_metadata, None, None, None]
        placed = enumerate([*head, *arguments])
        views = [(i, a) for i, a in placed if isinstance(a, (View, Description))]
        self._compiled = compiled  # which unloads its code when it goes
        self._run, self._arguments = compiled.run, [*head, *arguments]
        self._views = [(i, a.buffer, a.offset) for i, a in views if isinstance(a, View)]
        self._descriptions = [(i, a) for i, a in views if isinstance(a, Description)]
        self.buffers = {buffer for _, buffer, _ in self._views} | {a.matrix.buffer for _, a in self._descriptions}

    def at(self, stream: int, addresses: dict[int, int]) -> tuple[Callable, list]:
        """The function that launches, and its arguments."""
        arguments = self._arguments.copy()
        arguments[self.STREAM] = stream
        for i, buffer, offset in self._views:
            arguments[i] = addresses[buffer] + offset
        for i, (matrix, block_shape) in self._descriptions:
            base = Address(addresses[matrix.buffer] + matrix.offset, matrix.dtype)
            arguments[i] = TensorDescriptor(base, [*matrix.shape], [*matrix.stride], block_shape)
        return self._run, arguments


class Address(NamedTuple):
    """What a tensor descriptor needs to know of its tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class Bound(NamedTuple):
    """Launches with the addresses that they were last made with, which are mostly those of the next time."""

    own: tuple[int, int]  # stream, address of the plan's own piece of memory
    given: list[int]
    launches: list[tuple[Callable, list]]


class Part:
    """Maybe a call, then launches; `done` is what calls returned and no later part reads, `offsets` are those of buffers in
    the plan's own piece of memory."""

    def __init__(self, call: Call | None, launches: list[Launch], done: list[int], offsets: dict[int, int]):
        self._call, self._done, self._offsets = call, done, offsets
        self._launches = [Prepared(launch) for launch in launches]
        self._given = sorted({buffer for launch in self._launches for buffer in launch.buffers} - set(offsets))
        # Users keep outputs, so their addresses change more often than that of the piece.
        self._use_given = [i for i, launch in enumerate(self._launches) if not launch.buffers <= set(offsets)]
        self._bound: Bound | None = None

    def __call__(self, given: dict[int, Tensor], piece: Tensor, stream: int) -> None:
        """`given` has the other buffers; what the call returns is added to it."""
        if self._call is not None:
            self._make(given, piece)
        own, addresses = (stream, piece.data_ptr()), [given[buffer].data_ptr() for buffer in self._given]
        bound = self._bound
        if bound is None or bound.own != own:
            bound = self._bind(own, addresses, range(len(self._launches)), [None] * len(self._launches))
        elif bound.given != addresses:
            bound = self._bind(own, addresses, self._use_given, bound.launches.copy())
        for run, arguments in bound.launches:
            run(*arguments)
        for buffer in self._done:
            del given[buffer]

    def _bind(self, own: tuple[int, int], given: list[int], which: Iterable[int], launches: list) -> Bound:
        stream, piece = own
        addresses = {buffer: piece + offset for buffer, offset in self._offsets.items()}
        addresses |= zip(self._given, given, strict=True)
        for i in which:
            launches[i] = self._launches[i].at(stream, addresses)
        self._bound = Bound(own, given, launches)
        return self._bound

    def _make(self, given: dict[int, Tensor], piece: Tensor) -> None:
        function, args, results = self._call
        args = tree_map_only(View, lambda view: self._tensor(view, given, piece), args)
        # As the operations run: `siglip_fast.forward` sees to it.
        with torch.no_grad(), torch.autocast(piece.device.type, enabled=False):
            result = function(*args)
        given.update(zip(results, (t for t in tree_leaves(result) if isinstance(t, Tensor)), strict=True))

    def _tensor(self, view: View, given: dict[int, Tensor], piece: Tensor) -> Tensor:
        own = self._offsets.get(view.buffer)
        base = given[view.buffer] if own is None else piece.view(view.dtype)
        offset = (view.offset + (own or 0)) // view.dtype.itemsize
        return base.as_strided(view.shape, view.stride, base.storage_offset() + offset)


def _parts(recorder: Recorder, returned: set[int]) -> list[tuple[Call | None, list[Launch], list[int]]]:
    """Each call with the launches up to the next, and those of the `returned` buffers that are used in it for the last time."""
    begins = [0, *(i for i, step in enumerate(recorder.steps) if isinstance(step, Call)), len(recorder.steps)]
    parts = []
    for begin, end in itertools.pairwise(begins):
        steps = recorder.steps[begin:end]
        call = steps.pop(0) if steps and isinstance(steps[0], Call) else None
        parts.append((call, steps, [i for i in returned if begin <= recorder.buffers[i].last < end]))
    return parts
