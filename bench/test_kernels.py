"""Each operation against torch's own route for the same contract: `pytest bench/test_kernels.py --rows OUT.jsonl`.

On a GPU the Triton kernels, in their default configurations and as tuned, and the vendor's routes: a CUDA graph of many calls, timed by events, so that the
host's time does not count; each call has its own copy of inputs and weights, together larger than L2, as in a forward
whose layers each have their own. On a CPU the cpu backend, with warm caches. Each route's result for the first and the
last image is compared with float64 first: ours may be off by twice what torch is, plus 1e-6.
"""

import itertools
import math
from collections.abc import Callable

import cases
import environment
import operations
import pytest
import rounds
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from siglip_fast.backends.select import for_graph

LEAST_SECONDS = 0.005  # of a CUDA graph
CASES = cases.CASES[environment.DEVICE, cases.extent()]


def size(tree) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def cuda_turn(call: operations.Call) -> rounds.Turn:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(run: Callable) -> float:
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    with for_graph():  # which configurations run
        return _graph_turn(call, seconds)


def _graph_turn(call: operations.Call, seconds: Callable) -> rounds.Turn:
    function, arguments = call
    stream = torch.cuda.Stream()  # where capture wants the first calls to be made
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        once = seconds(call)
    torch.cuda.current_stream().wait_stream(stream)
    cache = 3 * torch.cuda.get_device_properties(0).L2_cache_size
    copies = min(64, math.ceil(cache / size(arguments)))
    calls = max(copies, min(64, math.ceil(LEAST_SECONDS / once)))
    sets = [tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments) for _ in range(copies)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for own in itertools.islice(itertools.cycle(sets), calls):
            function(*own)
    graph.replay()
    return lambda sets=sets: seconds(graph.replay) / calls  # which keeps the copies alive


@pytest.mark.parametrize("operation", operations.OPERATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_kernel(benchmark, row, case, operation):
    expected = operations.expected(case, operation)
    makers = operations.candidates(case, operation)

    def error(out: Tensor) -> float:
        return ((operations.ends(out, case).double() - expected).norm() / expected.norm()).item()

    call = makers["torch"]()
    out = call()
    rounds.compare(
        benchmark,
        row,
        case,
        makers,
        error=error,
        tolerance=2 * error(out) + 1e-6,
        turns={"milliseconds": cuda_turn if environment.DEVICE == "cuda" else rounds.wall_turn},
        flops=operations.flops(case, operation),
        kind="kernel",
        operation=operation,
        mb=rounds.significant((size(call.arguments) + size(out)) / 1e6),
    )
