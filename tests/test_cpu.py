"""The CPU backend: packed where oneDNN is, plain torch where it is not."""

import platform

import pytest
import torch
from models import TINY, drop_in, stock_model
from transformers import SiglipVisionConfig

from siglip_fast.backends import cpu
from siglip_fast.ops import Ops

ONEDNN = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


@pytest.fixture
def ours():
    return drop_in(stock_model(SiglipVisionConfig(**TINY)), backend="cpu")


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(2, 3, 24, 24)


def is_packed(model) -> bool:
    weights = model._derived.weights
    layer, head = weights.layers[0], weights.head
    packed = [*layer, weights.patch, head.out_proj, head.fc1, head.fc2]
    flags = {linear.weight.is_mkldnn for linear in packed}
    assert len(flags) == 1
    return flags.pop()


@pytest.mark.skipif(not ONEDNN, reason="no oneDNN on x86")
@torch.no_grad()
def test_weights_are_packed(ours, pixels):
    ours(pixels)
    assert is_packed(ours)


@pytest.mark.parametrize("missing", ["onednn", "x86", "avx512", "bf16"])
@torch.no_grad()
def test_falls_back_to_plain_torch(missing, ours, pixels, monkeypatch):
    if missing == "onednn":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif missing == "x86":
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    elif missing == "avx512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        monkeypatch.setattr(cpu._mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        ours, pixels = ours.bfloat16(), pixels.bfloat16()
    assert ours.why_not(pixels) is None
    expected = drop_in(ours, backend="torch")(pixels)
    assert torch.equal(ours(pixels).last_hidden_state, expected.last_hidden_state)
    assert not is_packed(ours)


@torch.no_grad()
def test_another_backend_derives_anew(ours, pixels):
    ours(pixels)
    ours.backend = "torch"
    ours(pixels)
    assert not is_packed(ours)


@torch.no_grad()
def test_edits_reach_the_packed_weights(ours, pixels):
    before = ours(pixels).last_hidden_state
    tower = getattr(ours, "vision_model", ours)
    tower.encoder.layers[0].mlp.fc2.weight.mul_(2)
    after = ours(pixels).last_hidden_state
    assert not torch.allclose(before, after)
    expected = drop_in(ours, backend="torch")(pixels).last_hidden_state
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=0)


def test_packed_weights_are_no_state(ours, pixels):
    names = set(ours.state_dict())
    with torch.no_grad():
        ours(pixels)
    assert set(ours.state_dict()) == names
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in drop_in(ours).parameters())


def test_weights_elsewhere_are_left_alone():
    weight = torch.empty(4, 4, device="meta")
    assert Ops("cpu").pack_weight(weight) is weight
