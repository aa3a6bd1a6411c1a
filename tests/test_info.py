"""`siglip-fast info`, and the memory that it reports."""

import re

import pytest
import torch
from models import TINY, drop_in, stock_model
from transformers import SiglipVisionConfig

from siglip_fast.cli import main


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_info(backend, capsys):
    assert main(["info", "--device", "cpu", "--backend", backend]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    assert f"runs on: backend {backend}" in out
    parameters, derived = map(int, re.search(r"parameters: (\d+) MB; .*: (\d+) MB", out).groups())
    assert parameters == 372
    assert 200 <= derived <= 365


def test_unknown_variant(capsys):
    assert main(["info", "--random-weights", "huge"]) == 2
    assert "unknown variant 'huge'" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@torch.no_grad()
def test_derived_bytes_by_hand(backend):
    ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend=backend)
    assert ours.derived_bytes() == 0
    ours(torch.randn(1, 3, 24, 24))
    D, F, L, H = 64, 100, 2, 4
    folded = L * (3 * D + F) + F  # rows of the merged QKV and of fc1, the head's among them
    copies = folded * (D + 2) + H * D  # with column sums and biases; the scores of the pooling head
    if backend == "cpu" and ours._derived.weights.patch.weight.is_mkldnn:
        copies += 3 * 8 * 8 * D + L * (D * D + D * F) + D * D + D * F
    assert ours.derived_bytes() == 4 * copies
