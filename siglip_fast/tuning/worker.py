"""The process that runs the candidates: `python -m siglip_fast.tuning.worker FD`, started by `siglip_fast.tuning`.

A wrong kernel can end it, hang it or ruin its CUDA context, and nothing else. A request comes as JSON on stdin; a line
of JSON goes to the file descriptor FD before each candidate ({"case", "candidate"}) and after each case ({"case",
"entry"}).
"""

import json
import os
import sys
import time
from typing import Any

import torch

from ..backends.choice import Choice
from ..errors import first_line
from .candidates import candidates, compile_ahead, run
from .cases import Case, bytes_of, copied, decode
from .child import PREPARATION
from .packed_cases import inputs
from .select import Announce, Sample, Timer, select, unmeasured
from .verify import Verifier, end, end_if_ruined

MAX_COPIES = 128
COMPILATION = "compilation of all"  # takes a candidate's place in events; where it crashes, each is compiled by itself


def main() -> None:
    request = json.load(sys.stdin)
    events = os.fdopen(int(sys.argv[1]), "w")
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deadline = time.monotonic() + request["seconds"]

    def emit(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    for item, skipped in request["cases"]:
        case = decode(item)

        def announce(candidate: str | Choice, case: Case = case) -> None:
            emit(case=str(case), candidate=str(candidate))

        entry = _entry(case, device, announce, skipped, deadline)
        if entry is None:
            return  # a case that was not finished is not told
        emit(case=str(case), entry=entry)


def _entry(
    case: Case, device: torch.device, announce: Announce, skipped: dict[str, str], deadline: float
) -> dict | None:
    """What `select` found, or None if it is too late."""
    announce(PREPARATION)
    try:
        args = inputs(case, device)
        verifier = Verifier(case, device, args)
        timers = cuda_timers(case, args, device) if device.type == "cuda" else wall_timers(case, args)
    except torch.OutOfMemoryError as error:
        return unmeasured(f"its inputs do not fit: {first_line(error)}")
    choices = candidates(case)
    if device.type == "cuda" and COMPILATION not in skipped:
        announce(COMPILATION)
        compile_ahead(case, (choice for choice in choices if str(choice) not in skipped), args)

    def check(choice: Choice) -> str | None:
        if time.monotonic() > deadline:
            raise TooLate
        return verifier(lambda: run(case, choice, args))

    try:
        return select(choices, check, timers, announce, skipped)
    except TooLate:
        return None


class TooLate(BaseException):
    """The deadline has passed. No Exception: `select` takes those for a candidate's."""


def cuda_timers(case: Case, args: tuple, device: torch.device) -> dict[str, Timer]:
    """Both ways of launching a candidate on copies of the arguments, as many as exceed the L2 cache twice, but at most
    MAX_COPIES: replays of a graph of all of them, and eager calls one after the other, which cost what is slower, the
    GPU or the launches."""
    needed = 2 * torch.cuda.get_device_properties(device).L2_cache_size / bytes_of(args)
    copies = [args, *(copied(args) for _ in range(min(int(needed), MAX_COPIES - 1)))]
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def seconds(launch) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(copies)

    def call_all(choice: Choice) -> None:
        for copy in copies:
            run(case, choice, copy)

    def graph(choice: Choice) -> Sample:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured, pool=pool, stream=stream):
                call_all(choice)
        except Exception as error:  # a failed capture may leave streams and allocator in that state
            end(error)
        captured.replay()
        end_if_ruined(device)  # what fails only in a graph fails here, where it is known whose it is
        return lambda: seconds(captured.replay)

    return {"eager": lambda choice: lambda: seconds(lambda: call_all(choice)), "graph": graph}


def wall_timers(case: Case, args: tuple) -> dict[str, Timer]:
    """For devices without graphs, where only the machinery of tuning is tried."""

    def timer(choice: Choice) -> Sample:
        def sample() -> float:
            start = time.perf_counter()
            run(case, choice, args)
            return time.perf_counter() - start

        return sample

    return {"eager": timer, "graph": lambda choice: lambda: 1.0}


if __name__ == "__main__":
    with torch.no_grad():
        main()
