"""Towers that take images of any size against their peers: `pytest bench/test_packed.py --rows OUT.jsonl`.

Cases are in bench/packed_cases.py; on a CPU towers have four layers. Each candidate's pooler_output is compared with stock
eager's in float32, then all are timed in turns. No time is asserted.
"""

import functools
import importlib.util

import environment
import packed_cases
import peers
import pytest
import rounds
import torch
from test_model import TOLERANCE, TURNS
from torch import nn

import siglip_fast


def stock(case, config, attention: str, dtype: torch.dtype) -> nn.Module:
    architecture = packed_cases.TOWERS[case.tower]
    return peers.stock(config, attention, dtype, torch.device(environment.DEVICE), architecture)


def flash(case, config, dtype):
    if case.tower.startswith("siglip2"):
        raise peers.Missing("transformers has it not for SigLIP 2")
    if not importlib.util.find_spec("flash_attn"):
        raise peers.Missing("flash_attn is not installed")
    return stock(case, config, "flash_attention_2", dtype)


def compiled(case, config, dtype):
    return torch.compile(stock(case, config, "sdpa", dtype))


def ours(case, config, dtype):
    return siglip_fast.apply_to(stock(case, config, "sdpa", dtype), strict=True)


PEERS = {
    "stock eager": functools.partial(stock, attention="eager"),
    "stock sdpa": functools.partial(stock, attention="sdpa"),
    "stock flash_attention_2": flash,
    "torch.compile": compiled,
    "siglip_fast": ours,
}


@pytest.mark.parametrize("case", packed_cases.PACKED_CASES, ids=str)
@torch.no_grad()
def test_packed(benchmark, row, case):
    config, dtype = packed_cases.config_of(case.tower), getattr(torch, case.dtype)
    torch.manual_seed(1)
    inputs = packed_cases.inputs(case, config)
    expected = stock(case, config, "eager", torch.float32)(**inputs).pooler_output.cpu()
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    def make(peer):
        model = peer(case, config, dtype=dtype)
        return lambda: model(**given).pooler_output

    rounds.compare(
        benchmark,
        row,
        case,
        {name: functools.partial(make, peer) for name, peer in PEERS.items()},
        error=lambda actual: ((actual.float().cpu() - expected).norm() / expected.norm()).item(),
        tolerance=TOLERANCE[dtype],
        turns=TURNS,
        flops=packed_cases.flops(case, config),
        kind="packed",
    )
