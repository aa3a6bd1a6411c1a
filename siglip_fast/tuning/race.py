"""An operation's built-in configuration against the vendor's routes, in this process, when it is first met on a GPU.

`siglip-fast tune` searches everything, verifies it and takes minutes. A race takes milliseconds: two or a few
contestants on the forward's own arguments, which have to agree with each other, and the vendor's route runs from then on
only if it is the faster one beyond noise. What a race found goes into the cache file, where tuning replaces it.

A model's races take operations × contestants × ROUNDS × (CALLS × (host + GPU) + the buffer's writes): `Stopwatch` is what
a round is, BUDGET the bound.
"""

import functools
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from siglip_fast.kernels.gemm import device_guard, input_precision

from ..backends import vendor
from ..backends.choice import DEFAULT, Choice
from ..backends.select import is_capturing
from ..errors import UserError, typed_line
from . import cache
from .cache import LAUNCHES, Entries, Key, Operation, Selection
from .cases import bytes_of, copied
from .select import MARGIN, Check, Sample, admit, measure, medians_of, result

logger = logging.getLogger("siglip_fast")

BUDGET = 1.0  # seconds of rounds a Selection, which is one for a model: then the built-in configurations run
ROUNDS = (2, 5)  # of all contestants, then of those that are not far behind
CALLS = 8  # a round of one contestant
COPIES_BYTES = 128 << 20  # of arguments; larger ones are called with once a round
FLUSH_BYTES = 256 << 20  # of the buffer that empties the L2 cache; twice the cache, where that is less
MAX_FILLS = 128  # of the buffer, before a round
ROW_FACTOR = 4  # as `siglip_fast.tuning.verify`: a row's error varies more than that of the whole

Run = Callable[..., Any]  # run(choice, *args)

_racing = threading.Lock()  # one race at a time: they would measure each other
_found: dict[Key, Entries] = {}  # by this process's races, for models to come where the file cannot be written


def applies(tensor: Tensor) -> bool:
    return tensor.is_cuda


def selection_on(device: torch.device) -> Selection:
    """The choices for a model on a device: those of the cache, and races for what it has none for; neither with
    SIGLIP_FAST_TUNE=off."""
    selection = Selection.load(device)
    if cache.mode() == "off":
        return selection
    key = Key.of(device)
    return Racing(key, cache.merged(selection.entries, _found.get(key, {}), replace=False))


class Racing(Selection):
    """The choices for one device, where operations race that have no entry near their number of rows."""

    def __init__(self, key: Key, entries: Entries):
        super().__init__(entries)
        self._key = key
        self._settled: set[tuple] = set()
        self._seconds = 0.0

    def settle(
        self, name: str, dims: tuple[int, ...], dtype: torch.dtype | str, rows: int, run: Run, args: tuple
    ) -> None:
        """A race, if this is the time for one: not inside a capture, which could not wait for it."""
        what = (name, dims, dtype, cache.bucket(rows))  # or a set would grow with each number of rows of packed images
        if what in self._settled or not applies(args[0]) or is_capturing(args[0]):
            return
        with _racing:
            if what not in self._settled:
                self._adopt(_found.get(self._key, {}))  # another model's races, or those before another thread's
                if self._wants_race(Operation(name, dims, dtype), rows, args):
                    self._race(Operation(name, dims, dtype), rows, run, args)
            self._settled.add(what)

    def _wants_race(self, operation: Operation, rows: int, args: tuple) -> bool:
        if args[0].dtype == torch.uint8 or self.nearest(operation, rows):  # the vendor's libraries read no bytes
            return False
        if not vendor.routes(operation.name):
            return False
        if self._seconds >= BUDGET:
            _say(f"{BUDGET:.1f} s of races are over: what was not raced yet runs its built-in configurations")
            return False
        return True

    def _race(self, operation: Operation, rows: int, run: Run, args: tuple) -> None:
        what = f"{operation}, {rows} rows"
        try:
            with torch.no_grad(), device_guard(args[0]):
                entry, seconds = race(operation.name, run, args)
        except Exception as error:  # a forward does not depend on it: what is broken for good will raise there again
            logger.warning("racing %s failed, its built-in configuration runs: %s", what, typed_line(error))
            return
        self._seconds += seconds
        _tell(what, entry)
        self._keep({str(operation): {str(cache.bucket(rows)): entry}})

    def _keep(self, raced: Entries) -> None:
        """In the file and in this process. Whose race ended first has its result in force everywhere."""
        try:
            in_force = cache.update(self._key, raced, replace=False)
        except (OSError, UserError, NotImplementedError) as error:  # NotImplementedError: no locks on that file system
            _say(f"what races find is kept for this process only: {typed_line(error)}")
            in_force = raced
        # No other numbers of rows: kernels of choices that came from elsewhere are not loaded here.
        of_operation = {name: {rows: in_force[name][rows] for rows in buckets} for name, buckets in raced.items()}
        _found[self._key] = cache.merged(_found.get(self._key, {}), of_operation, replace=True)
        self._adopt(of_operation)

    def _adopt(self, found: Entries) -> None:
        entries = cache.merged(self.entries, found, replace=False)
        if entries != self.entries:
            self.entries = entries
            self._memo = {}  # after the entries: whoever fills it has read them


def race(name: str, run: Run, args: tuple) -> tuple[dict, float]:
    """The entry for the cache, and the seconds that its rounds took. Raises what the built-in configuration raises, and
    ArithmeticError where its result is not finite, so that nothing can be compared with it."""
    stopwatch = Stopwatch(run, args)
    contestants = [DEFAULT, *map(Choice, vendor.routes(name))]
    samples, dropped = admit(contestants, agreement(run, args), {"graph": stopwatch.on_gpu})
    if DEFAULT not in samples["graph"]:
        raise RuntimeError(dropped[str(DEFAULT)])
    started = time.perf_counter()
    on_gpu = measure(samples["graph"], rounds=ROUNDS)
    # Launched eagerly the slower one counts, GPU or host; ours is launched by a plan, which costs the host next to nothing.
    hosts = {choice: 0.0 if choice == DEFAULT else stopwatch.on_host(choice) for choice in on_gpu}
    eager = {choice: [max(s, hosts[choice]) for s in seconds] for choice, seconds in on_gpu.items()}
    found = {
        launch: result(beyond_noise(seconds), medians_of(seconds))
        for launch, seconds in zip(LAUNCHES, (eager, on_gpu), strict=True)
    }
    return found | {"dropped": dropped, "raced": True}, time.perf_counter() - started


def beyond_noise(seconds: dict[Choice, list[float]]) -> Choice:
    """DEFAULT, unless the median of the vendor's fastest route is below its median by MARGIN, and below its fastest round."""
    medians = medians_of(seconds)
    rival = min((choice for choice in medians if choice != DEFAULT), key=medians.get, default=DEFAULT)
    beaten = medians[rival] * MARGIN < medians[DEFAULT] and medians[rival] < min(seconds[DEFAULT])
    return rival if beaten else DEFAULT


def agreement(run: Run, args: tuple) -> Check:
    """Whether a route's outputs are those of the built-in configuration, as far as two right ones agree.

    Which of them is wrong it cannot tell, and what these arguments do not show it does not see: that is
    `siglip_fast.tuning.verify`'s.
    """
    expected, allowed = _tensors(run(DEFAULT, *args)), tolerance(args)
    if not all(math.isfinite(tensor.sum(dtype=torch.float32).item()) for tensor in expected):
        raise ArithmeticError("its result is not finite")

    def check(choice: Choice) -> str | None:
        actual = expected if choice == DEFAULT else _tensors(run(choice, *args))
        return next(filter(None, map(disagreement, actual, expected, (allowed, allowed))), None)

    return check


def tolerance(args: tuple) -> float:
    """The relative Frobenius norm by which two right results may differ: four times PyTorch's own error, since the accuracy
    rule allows each twice that. In 16 bits that error is up to half an epsilon (tests/tuning/test_race.py)."""
    epsilons = [torch.finfo(t.dtype).eps for t in tree_leaves(args) if isinstance(t, Tensor) and t.is_floating_point()]
    if input_precision(torch.float32) == "tf32":
        epsilons.append(2.0**-10)
    return max(2 * max(epsilons), 1e-5)


def disagreement(actual: Tensor, expected: Tensor, allowed: float) -> str | None:
    """Why they are not both right: their difference, or that of a row, of which ROW_FACTOR times as much is allowed. Rows
    lie along the last dimension."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return f"disagrees: {actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}"
    difference, norms = _norms(actual - expected), _norms(expected)
    if not (error := (difference.norm() / norms.norm()).item()) <= allowed:  # not so for NaN
        return f"disagrees: relative difference {error:.2g}, allowed {allowed:.2g}"
    if not (difference <= ROW_FACTOR * allowed * norms).all():
        return f"disagrees: relative difference of a row over {ROW_FACTOR * allowed:.2g}"
    return None


def _norms(tensor: Tensor) -> Tensor:
    """Of the rows, in float32, without a copy of the tensor in it."""
    return torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)


def _tensors(out: Any) -> list[Tensor]:
    """The outputs; of moments, whose means may be next to nothing, those of a row together."""
    if not isinstance(out, tuple):
        return [out]
    hidden_states, moments = out
    return [hidden_states, moments.flatten(1)]


class Stopwatch:
    """Times calls on copies of the arguments by the GPU's clock, each round from a cold L2 cache.

    A round is CALLS calls, fewer where copies would pass COPIES_BYTES. Before it a buffer larger than the cache is written
    so often that the host has launched all of them before the GPU comes to the first: the time is the GPU's alone, as a
    CUDA graph has it.
    """

    def __init__(self, run: Run, args: tuple):
        self._run = run
        self._copies = [args, *(copied(args) for _ in range(min(CALLS, COPIES_BYTES // bytes_of(args)) - 1))]
        cache_size = torch.cuda.get_device_properties(args[0].device).L2_cache_size
        self._buffer = torch.empty(min(2 * cache_size, FLUSH_BYTES), dtype=torch.uint8, device=args[0].device)
        self._fill(4)  # the first one is slower
        self._seconds_a_fill = self._seconds(lambda: self._fill(4)) / 4
        self._hosts: dict[Choice, list[float]] = {}

    def on_gpu(self, choice: Choice) -> Sample:
        """Seconds of a call in a round. The first rounds go before: a library's set-up, memory, how long launches take."""
        self._call_all(choice)
        hosts = self._hosts[choice] = [self._call_all(choice)]

        def sample() -> float:
            fills = 1 + math.ceil(2 * len(self._copies) * max(hosts) / self._seconds_a_fill)
            self._fill(min(fills, MAX_FILLS))
            return self._seconds(lambda: hosts.append(self._call_all(choice))) / len(self._copies)

        return sample

    def on_host(self, choice: Choice) -> float:
        """Seconds that launching a call took, the median of all rounds."""
        return statistics.median(self._hosts[choice])

    def _call_all(self, choice: Choice) -> float:
        started = time.perf_counter()
        for copy in self._copies:
            self._run(choice, *copy)
        return (time.perf_counter() - started) / len(self._copies)

    def _fill(self, times: int) -> None:
        for _ in range(times):
            self._buffer.zero_()

    def _seconds(self, launch: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _tell(what: str, entry: dict) -> None:
    for name, reason in entry["dropped"].items():
        disagrees = reason.startswith("disagrees")
        logger.log(logging.WARNING if disagrees else logging.INFO, "racing %s: %s is out, %s", what, name, reason)
    for launch in LAUNCHES:
        times = ", ".join(f"{name} {time} µs" for name, time in entry[launch]["microseconds"].items())
        logger.info("raced %s, %s: %s runs (%s)", what, launch, entry[launch]["route"], times)


@functools.cache
def _say(text: str) -> None:
    logger.info(text)
