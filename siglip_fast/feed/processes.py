"""Images decoded ahead of the model, in order, by processes: torch's DataLoader, begun anew where one of them dies.

A chunk of images goes to a process as names of files, slices of shards or encoded bytes, and comes back as one tensor in
shared memory. The processes are forked by a server that has imported what they need and has neither threads nor CUDA, so
a new one is there at once, and 64 of them share those pages. What is under way is bounded twice over: in images, and in
bytes by what /dev/shm has room for.
"""

import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..errors import UserError, first_line
from .kinds import Inputs, batch_of
from .parts import Source
from .server import start_server
from .workers import Prepared, load

CHUNK = 8  # images that travel together: what a message costs, 0.5 ms, is shared by so many
CHUNK_BYTES = 1 << 20  # of encoded images; a chunk ends with the one that exceeds it
CHUNKS_AHEAD = 2  # of each process: one that it works on, and one that waits
MEMORY = 2 << 30  # bytes under way as tensors, at most, unless a single image of each process takes more
ATTEMPTS = 10  # deaths in a row, without a chunk between them, that end the run
SHARED = "/dev/shm"

# What a process tells: itself, the number of its image or -1, how many images are done, and the nanoseconds they took.
PID, AT, DONE, BUSY = range(4)


class Chunk(NamedTuple):
    """What comes back: the inputs of those images that have any, stacked, and for each image why it has none, or None."""

    inputs: Inputs
    reasons: list[str | None]
    warnings: list[tuple[type[Warning], str]]


class Processes:
    """For many images. As `workers.Threads`, and an image at which a process dies has no inputs, but a reason."""

    def __init__(self, prepare: Callable[[str | bytes], Inputs], number: int):
        """`prepare` runs in `number` processes, or in fewer where /dev/shm is too small: one line on stderr says so.
        Raises UserError where it is too small for one."""
        self._prepare = prepare
        self.number, self._chunk = _fitting(number, _bytes_of_image(prepare))
        self._told = _idle(self.number)
        self._told_before = self._told.sum(0)  # by processes that are gone

    @property
    def images(self) -> int:
        """How many images are done so far."""
        return int(self._told_before[DONE] + self._told[:, DONE].sum())

    @property
    def busy(self) -> float:
        """The seconds that they took, of all processes together."""
        return int(self._told_before[BUSY] + self._told[:, BUSY].sum()) / 1e9

    def prepared(self, images: Iterable[tuple[Any, Source]]) -> Iterator[Prepared]:
        """(name, inputs or why there are none) of each image, in order. Raises UserError where processes die without
        end, or shared memory runs out."""
        numbered, again = enumerate(images), deque()  # images, and those that were given to processes that are gone
        waiting: deque[list] = deque()  # chunks of which the results are not back
        deaths = 0

        def items() -> Iterator[tuple[int, tuple[Any, Source]]]:
            while item := again.popleft() if again else next(numbered, None):
                yield item

        while True:
            try:
                for chunk, results in self._of_these_processes(items(), waiting):
                    deaths = 0
                    yield from _unpacked(chunk, results)
                return
            except _DeadError as death:
                deaths += 1
                if deaths == ATTEMPTS:
                    raise UserError(f"{ATTEMPTS} times in a row {death.reason}; try fewer --workers") from None
                again.extendleft(reversed([death.blamed(item) for chunk in waiting for item in chunk]))
                waiting.clear()

    def _of_these_processes(self, items: Iterator, waiting: deque[list]) -> Iterator[tuple[list, Chunk]]:
        """(chunk, its results); raises _DeadError where a process dies, and leaves the chunks that are not done in
        `waiting`."""

        def chunks() -> Iterator[list]:
            for chunk in _chunks(items, self._chunk):
                waiting.append(chunk)
                yield [(number, source) for number, (_, source) in chunk]

        self._told_before += self._told.sum(0)
        self._told = _idle(self.number)
        start_server()
        others = {process.pid for process in multiprocessing.active_children()}
        with warnings.catch_warnings():  # of more processes than cores, which were asked for
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            results = iter(
                DataLoader(
                    _Images(self._prepare, self._told),
                    batch_sampler=chunks(),
                    collate_fn=_as_it_is,
                    num_workers=self.number,
                    prefetch_factor=CHUNKS_AHEAD,
                    multiprocessing_context="forkserver",
                    worker_init_fn=_begin,
                )
            )
        started = [process for process in multiprocessing.active_children() if process.pid not in others]
        try:
            while (chunk := _next(results, started, self._told)) is not None:
                if isinstance(chunk, str):
                    raise UserError(chunk)
                yield waiting.popleft(), chunk
        finally:
            results._shutdown_workers()  # dropping it would do the same, but for tracebacks that hold it


class _DeadError(Exception):
    def __init__(self, images: set[int], reason: str):
        super().__init__(reason)
        self.images, self.reason = images, reason

    def blamed(self, item: tuple[int, tuple[Any, Source]]) -> tuple[int, tuple[Any, Source]]:
        """The item, or its reason in place of the image if a process died of it."""
        number, (name, _) = item
        return (number, (name, ValueError(self.reason))) if number in self.images else item


def _next(results: Iterator, started: list, told: torch.Tensor) -> Chunk | str | None:
    try:
        return next(results, None)
    # DataLoader's own, or of a tensor that a dead process has not handed over
    except (RuntimeError, OSError, EOFError) as error:
        wait([process.sentinel for process in started], timeout=1)
        dead = {process.pid: process.exitcode for process in started if process.exitcode}
        if not dead:
            raise
        at = {int(row[AT]) for row in told if int(row[PID]) in dead}
        code = next(iter(dead.values()))
        by = next((number.name for number in signal.Signals if number == -code), f"signal {-code}")
        how = f"was killed by {by}" if code < 0 else f"ended with status {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        raise _DeadError(at - {-1}, f"the process that decodes it {how}{hint}") from error


class _Images(Dataset):
    """What the processes are given; torch calls `__getitems__` with what the sampler yields."""

    def __init__(self, prepare: Callable[[str | bytes], Inputs], told: torch.Tensor):
        self._prepare, self.told = prepare, told

    def __getitems__(self, chunk: list[tuple[int, Source]]) -> Chunk | str:
        mine = self.told[get_worker_info().id]
        results = []
        with warnings.catch_warnings(record=True) as caught:
            for number, source in chunk:
                mine[AT] = number
                start = time.perf_counter_ns()
                results.append(load(source, self._prepare))
                mine[BUSY] += time.perf_counter_ns() - start
                mine[DONE] += 1
                mine[AT] = -1
        good = [result for result in results if not isinstance(result, str)]
        reasons = [result if isinstance(result, str) else None for result in results]
        told = [(warning.category, first_line(warning.message)) for warning in caught]
        try:
            inputs = batch_of(good) if good else {}
            # Here, because torch would do it in a thread whose failure nobody hears of.
            return Chunk({name: values.share_memory_() for name, values in inputs.items()}, reasons, told)
        except RuntimeError as error:
            return f"shared memory: {first_line(error)}; {ADVICE}"


ADVICE = "give the container more of /dev/shm, such as --shm-size=1g, or try fewer --workers"


def _unpacked(items: list, chunk: Chunk) -> Iterator[Prepared]:
    for category, text in chunk.warnings:
        warnings.warn(text, category, stacklevel=1)
    row = 0
    for (_, (name, _)), reason in zip(items, chunk.reasons, strict=True):
        if reason is not None:
            yield name, reason
        else:
            yield name, {key: values[row] for key, values in chunk.inputs.items()}
            row += 1


def _chunks(items: Iterable[tuple[int, tuple[Any, Source]]], most: int) -> Iterator[list]:
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        source = item[1][1]
        size += len(source) if isinstance(source, bytes) else 0
        if len(chunk) == most or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _idle(number: int) -> torch.Tensor:
    return torch.tensor([[0, -1, 0, 0]] * number).share_memory_()


def _as_it_is(chunk: Chunk | str) -> Chunk | str:
    return chunk


def _bytes_of_image(prepare: Callable[[str | bytes], Inputs]) -> int:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "png")
    return sum(values.nbytes for values in prepare(file.getvalue()).values())


def _fitting(number: int, bytes_of_image: int) -> tuple[int, int]:
    """How many processes, and images a chunk, so that all chunks under way fit into MEMORY and half of what is free in
    /dev/shm."""
    room = shutil.disk_usage(SHARED).free // 2 if os.path.isdir(SHARED) else MEMORY
    of_one = CHUNKS_AHEAD * bytes_of_image
    if room < of_one:
        raise UserError(f"{SHARED} has {2 * room >> 20} MiB free, too little for one image; {ADVICE}")
    if room < number * of_one:
        fewer = room // of_one
        print(f"siglip-fast: {SHARED} has room for {fewer} processes, not for {number}; {ADVICE}", file=sys.stderr)
        number = fewer
    return number, max(1, min(CHUNK, min(room, MEMORY) // (number * of_one)))


def _begin(worker: int) -> None:
    """In each process, at first."""
    get_worker_info().dataset.told[worker, PID] = os.getpid()
    # It would tell of this process that was interrupted while it took a tensor.
    sys.excepthook = lambda *_: None
    # The server does not end while they live, and torch's own watch is on the server.
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
