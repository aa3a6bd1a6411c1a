"""The process that runs the candidates: `python -m siglip_fast.tuning.worker`, started by `siglip_fast.tuning`.

A wrong kernel can end it, hang it or ruin its CUDA context, and nothing else. A request comes as JSON on stdin; a line
of JSON goes to stdout before each candidate ({"case", "candidate"}) and after each case ({"case", "entry"}).
"""

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..loading import first_line
from ..selection import Choice
from .candidates import candidates, compile_ahead, run
from .cases import Case, decode, inputs
from .select import Announce, Sample, Timer, select, unmeasured
from .verify import Verifier, end_if_ruined

MAX_COPIES = 128
COMPILATION = (
    "compilation of all"  # takes a candidate's place in events: if it crashes, each is compiled when it runs
)


def main() -> None:
    request = json.load(sys.stdin)
    events, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no event
    device = torch.device(request["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deadline = time.monotonic() + request["seconds"]

    def emit(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    for item, skipped in request["cases"]:
        case = decode(item)

        def announce(candidate: str | Choice, case: Case = case) -> None:
            if time.monotonic() > deadline:
                sys.exit()  # a case that was not finished is not told
            emit(case=str(case), candidate=str(candidate))

        emit(case=str(case), entry=_entry(case, device, announce, skipped))


def _entry(case: Case, device: torch.device, announce: Announce, skipped: dict[str, str]) -> dict:
    try:
        args = inputs(case, device)
        check = Verifier(case, device, args)
        timer = graph_timer(case, args, device) if device.type == "cuda" else wall_timer(case, args)
    except torch.OutOfMemoryError as error:
        return unmeasured(f"its inputs do not fit: {first_line(error)}")
    choices = candidates(case)
    if device.type == "cuda" and COMPILATION not in skipped:
        announce(COMPILATION)
        compile_ahead(case, (choice for choice in choices if str(choice) not in skipped), args)
    return select(choices, lambda choice: check(lambda: run(case, choice, args)), timer, announce, skipped)


def graph_timer(case: Case, args: tuple, device: torch.device) -> Timer:
    """Times graph replays, which cost no launches, on as many copies of the arguments as exceed the L2 cache twice."""
    size = sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))
    needed = 2 * torch.cuda.get_device_properties(device).L2_cache_size / size
    copies = [args, *(_copy(args) for _ in range(min(int(needed), MAX_COPIES - 1)))]
    pool = torch.cuda.graph_pool_handle()

    def timer(choice: Choice) -> Sample:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for copy in copies:
                run(case, choice, copy)
        graph.replay()
        end_if_ruined(device)  # what fails only in a graph fails here, where it is known whose it is
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / len(copies)

        return sample

    return timer


def _copy(args: tuple) -> tuple:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)


def wall_timer(case: Case, args: tuple) -> Timer:
    """For devices without graphs, where only the machinery of tuning is tried."""

    def timer(choice: Choice) -> Sample:
        def sample() -> float:
            start = time.perf_counter()
            run(case, choice, args)
            return time.perf_counter() - start

        return sample

    return timer


if __name__ == "__main__":
    with torch.no_grad():
        main()
