"""`siglip-fast info`, and the memory that it reports."""

import re

import pytest
import torch
from models import ONEDNN, TINY, drop_in, stock_model
from transformers import SiglipVisionConfig

from siglip_fast.cli.main import main
from siglip_fast.tuning.cache import Key, write


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_info(backend, capsys):
    assert main(["info", "--device", "cpu", "--backend", backend]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    assert f"runs on: backend {backend}" in out
    parameters, derived = map(int, re.search(r"parameters: (\d+) MB; .*: (\d+) MB", out).groups())
    assert parameters == 372
    assert 200 <= derived <= 365
    in_all = int(re.search(r"inside torch.autocast to bfloat16 (\d+) MB in all", out)[1])
    assert 180 <= in_all - derived <= 190  # half of the parameters
    assert out.count(" rows: right\n") == 11


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """`siglip-fast info` on a small model, with an empty cache folder."""
    monkeypatch.setattr("siglip_fast.models.variants.config_for", lambda name: SiglipVisionConfig(**TINY))
    monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", str(tmp_path))


def test_what_runs_each_operation(tiny, device, capsys, monkeypatch):
    command = ["info", "--device", device, "--backend", "triton", "--dtype", "float16"]
    key = Key.of(torch.device(device))
    assert main(command) == 0
    assert "measured configurations: none for" in capsys.readouterr().out
    vendor = {"route": "vendor", "config": None, "microseconds": {"vendor": 1.0, "triton": 1.5}}
    ours = {"route": "triton", "config": None, "microseconds": {"triton": 1.0}}
    write(key, {"layernorm 64 float16": {"16": {"eager": vendor, "graph": ours, "dropped": {}}}})
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"measured configurations: 1 of 1 operations in {key.path()}" in out
    assert (
        """
  layernorm 64 float16, 9 rows: right
    eager: vendor (measured: 1.0 µs, the vendor's best 1.0 µs)
    graph: triton (measured: 1.0 µs)
  attention 9x4x16 float16, 1 rows: right
    eager: triton (built-in, not measured)
    graph: triton (built-in, not measured)
"""
        in out
    )
    write(key, {"layernorm 64 float16": {"16": {"eager": vendor, "graph": ours, "dropped": {}, "raced": True}}})
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"measured configurations: 1 of 1 operations, 1 of them raced, not tuned, in {key.path()}" in out
    assert "    eager: vendor (raced: 1.0 µs, the vendor's best 1.0 µs)" in out
    monkeypatch.setenv("SIGLIP_FAST_TUNE", "off")
    assert main(command) == 0
    assert "not used (SIGLIP_FAST_TUNE=off)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken, message",
    [(lambda *args: args[0] * 2, "wrong: "), (lambda *args: 1 / 0, "ZeroDivisionError: division by zero")],
)
def test_the_self_check_fails(tiny, capsys, monkeypatch, broken, message):
    monkeypatch.setattr("siglip_fast.backends.cpu.layernorm", broken)
    assert main(["info", "--device", "cpu", "--backend", "cpu"]) == 1
    assert f"  layernorm 64 float32, 9 rows: {message}" in capsys.readouterr().out


def test_unknown_variant(capsys):
    assert main(["info", "--random-weights", "huge"]) == 2
    assert "unknown variant 'huge'" in capsys.readouterr().err


@pytest.mark.parametrize("isa", ["AVX512", "AVX2", None])
@torch.no_grad()
def test_derived_bytes_by_hand(isa, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: isa)
    ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend="cpu" if isa else "torch")
    assert ours.derived_bytes() == 0
    ours(torch.randn(1, 3, 24, 24))
    D, F, L, H = 64, 100, 2, 4
    folded = L * (3 * D + F) + F  # rows of the merged QKV and of fc1, the head's among them
    copies = folded * (D + 2) + H * D  # with column sums and biases; the scores of the pooling head
    if isa == "AVX512" and ONEDNN:
        copies += 3 * 8 * 8 * D + L * (D * D + D * F) + D * D + D * F
    elif isa == "AVX2" and ONEDNN:  # with F, no multiple of 8, nothing is packed
        copies += 3 * 8 * 8 * D + L * (3 * D * D + D * D)
    assert ours.derived_bytes() == 4 * copies


def test_batch_invariant(tiny, device, capsys):
    assert main(["info", "--device", device, "--backend", "triton", "--dtype", "float16", "--batch-invariant"]) == 0
    out = capsys.readouterr().out
    assert "runs on: backend triton, batch invariant" in out
    assert "measured configurations: not used (batch invariant)" in out
    assert out.count("(built-in, the same for every batch)") == 2 * out.count(" rows: right") == 2 * 11
