"""The whole model against its peers: `pytest bench/test_model.py --rows OUT.jsonl`, cases in bench/cases.py.

The device is a GPU if there is one. Each candidate's pooler_output is compared with stock eager's in float32, then all
are timed in turns; the row holds the medians and what derives from them, for bench/report.py. No time is asserted.
"""

import functools
import time

import cases
import environment
import peers
import pytest
import rounds
import torch
from matmul_limit import flops

# Of the relative error against float32; what 16 bits cost stock too (its own error is in the row)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# Throughput, and on a GPU, where it differs, latency
TURNS = {"milliseconds": rounds.wall_turn}
if environment.DEVICE == "cuda":
    TURNS["latency_milliseconds"] = rounds.latency_turn
compile_seconds = 0.0  # spent in this session


def makers(case: cases.Case, config, dtype, pixels) -> dict:
    def make(name, peer):
        global compile_seconds
        if reason := cases.left_out(case, pixels.device.type, name, compile_seconds):
            raise peers.Missing(reason)
        start, run = time.perf_counter(), peer(config, dtype, pixels)
        if name.startswith("torch.compile"):
            try:
                run()
            finally:
                compile_seconds += time.perf_counter() - start
        return run

    return {name: functools.partial(make, name, peer) for name, peer in peers.PEERS[pixels.device.type].items()}


def agreement(config, pixels):
    """The relative error of a candidate's pooler_output: against stock eager in float32, of up to eight images."""
    torch.backends.cudnn.allow_tf32 = False  # or the reference's patch embedding would not be float32
    model = peers.stock(config, "eager", torch.float32, pixels.device)
    images = sorted({round(i * (len(pixels) - 1) / 7) for i in range(8)})
    # one by one: eager's scores of a large batch would fill the memory
    expected = torch.cat([model(pixels[i : i + 1]).pooler_output for i in images]).cpu()
    return lambda actual: ((actual[images].float().cpu() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", cases.CASES[environment.DEVICE, cases.extent()], ids=str)
@torch.no_grad()
def test_model(benchmark, row, case):
    config, dtype = cases.config_of(case), getattr(torch, case.dtype)
    torch.manual_seed(1)
    pixels = torch.randn(case.batch_size, 3, config.image_size, config.image_size, device=environment.DEVICE)
    rounds.compare(
        benchmark,
        row,
        case,
        makers(case, config, dtype, pixels.to(dtype)),
        error=agreement(config, pixels),
        tolerance=TOLERANCE[dtype],
        turns=TURNS,
        flops=sum(flops(config, case.batch_size).values()),
        kind="model",
    )
