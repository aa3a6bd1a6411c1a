"""Candidates side by side: each is built, compared with what is right, and timed in turns with the others.

Every round runs each candidate once, so that a busy machine or a falling clock slows all of them.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import environment
import pytest
import torch
from cases import Case
from matmul_limit import matmul_peak
from peers import Missing
from torch import Tensor

from siglip_fast.errors import without_folders

OURS = "siglip_fast"  # whose names begin so
LEAST_SECONDS = 0.05  # of a turn: several forwards where one is short
Turn = Callable[[], float]  # runs, and returns seconds a call


@dataclass
class Field:
    """The candidates that take part, their relative errors, and why the others do not."""

    runs: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    # those of the missing that are ours and should have worked
    broken: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, reason: str, broken: bool) -> None:
        self.runs.pop(name, None)
        self.missing[name] = reason
        if broken and name.startswith(OURS):
            self.broken[name] = reason
        free_memory()


def build(makers: dict[str, Callable], error: Callable[[Tensor], float], tolerance: float) -> Field:
    """Makes each candidate and runs it once. Whatever a peer raises, the others go on."""
    entrants = Field()
    for name, make in makers.items():
        with Dropping(entrants, name):
            run = make()
            entrants.errors[name] = error(run())
            if not entrants.errors[name] <= tolerance:
                raise ArithmeticError(f"wrong by {entrants.errors[name]:.1e}, allowed {tolerance:.0e}")
            entrants.runs[name] = run
    return entrants


class Dropping:
    """A block in which a candidate may fail."""

    def __init__(self, entrants: Field, name: str):
        self.entrants, self.name = entrants, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        if issubclass(kind, torch.OutOfMemoryError):
            reason, broken = "out of memory", False
        elif issubclass(kind, (Missing, ImportError)):
            reason, broken = publishable(error), False
        else:
            reason, broken = f"{kind.__name__}: {publishable(error)}", True
        error.__traceback__ = None  # its frames hold the candidate's memory
        self.entrants.drop(self.name, reason, broken)
        return True


def publishable(error: BaseException) -> str:
    """Short, and without folders: it ends up in a report that people publish."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return without_folders(line)[:150]


def wall_turn(run: Callable[[], Tensor]) -> Turn:
    """Host time included: what a caller waits for who feeds one batch after the other."""
    on_gpu = environment.DEVICE == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None

    def seconds(calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        return (time.perf_counter() - start) / calls

    seconds(3 if on_gpu else 1)  # torch.compile's graphs are recorded in the second and third run
    calls = max(1, math.ceil(LEAST_SECONDS / seconds(1)))
    return lambda: seconds(calls)


def rest() -> None:
    """Threads of whoever had the turn before, onnxruntime's above all, wait busily: the next was a sixth slower."""
    if environment.DEVICE == "cpu":
        time.sleep(0.1)


def latency_turn(run: Callable[[], Tensor]) -> Turn:
    """One call that is waited for, on a device that has nothing else to do: what a single request takes."""

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds


def race(
    entrants: Field, make_turn: Callable[[Callable], Turn], rounds: int, benchmark: Any = None
) -> dict[str, float]:
    """Median seconds a call of those who got through all rounds. pytest-benchmark's fixture `benchmark` runs the rounds
    where it is given, and prints a figure of its own: that of our turns, of maybe several calls."""
    turns: dict[str, Turn] = {}
    for name, run in list(entrants.runs.items()):
        with Dropping(entrants, name):  # there may be no memory beside the others
            turns[name] = make_turn(run)
    seconds: dict[str, list[float]] = {name: [] for name in turns}

    def time_one(name: str) -> None:
        if name in turns:
            with Dropping(entrants, name):
                seconds[name].append(turns[name]())
            if name not in entrants.runs:
                del turns[name], seconds[name]

    def time_the_others() -> None:
        for name in [name for name in turns if name != OURS]:
            rest()
            time_one(name)
        rest()

    if benchmark is not None and OURS in turns:
        benchmark.pedantic(time_one, args=(OURS,), setup=time_the_others, rounds=rounds)
    else:
        for _ in range(rounds):
            time_the_others()
            time_one(OURS)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(
    benchmark: Any,
    row: Callable[[dict], None],
    case: Case,
    makers: dict[str, Callable],
    error: Callable[[Tensor], float],
    tolerance: float,
    turns: dict[str, Callable[[Callable], Turn]],
    flops: int,
    **more,
) -> None:
    """The whole of a benchmark: candidates are built, checked and timed, and `row` gets what came out.

    `turns` has what makes a turn by the name under which its milliseconds are kept; "milliseconds" is one of them, of
    which rates are made, and that pytest-benchmark runs.
    """
    entrants = build(makers, error, tolerance)
    before = environment.clocks()
    seconds = {
        name: race(entrants, make_turn, case.rounds, benchmark if name == "milliseconds" else None)
        for name, make_turn in turns.items()
    }
    after = environment.clocks()
    entrants.runs.clear()
    free_memory()  # the matmul needs some
    peak = matmul_peak(getattr(torch, case.dtype), environment.DEVICE) / 1e3
    measured = {}
    for name, value in seconds["milliseconds"].items():
        tflops = flops / value / 1e12
        measured[name] = {kind: significant(1e3 * of[name]) for kind, of in seconds.items() if name in of} | {
            "images_per_second": significant(case.batch_size / value),
            "tflops": significant(tflops),
            "percent_of_peak": significant(100 * tflops / peak),
            "relative_error": significant(entrants.errors[name], 2),
        }
    if OURS in measured:
        row(
            more
            | {
                "model": case.variant,
                "batch_size": case.batch_size,
                "dtype": case.dtype,
                "tflop": significant(flops / 1e12),
                "matmul_peak_tflops": significant(peak),
                "clocks": {"before": before, "after": after},
                "entered": list(makers),
                "candidates": measured,
                "missing": entrants.missing,
            }
        )
    assert not entrants.broken
    if OURS not in measured:
        pytest.skip(f"{OURS}: {entrants.missing[OURS]}")


def significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
