"""The CPU backend: packed where oneDNN is, plain torch where it is not."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from models import ONEDNN, TINY, drop_in, stock_model
from transformers import SiglipVisionConfig

from siglip_fast.backends import cpu
from siglip_fast.ops import Linear, Ops

needs_onednn = pytest.mark.skipif(not ONEDNN, reason="no oneDNN on x86")


@pytest.fixture(params=["AVX512", "AVX2"])
def isa(request, monkeypatch) -> str:
    """What the CPU seems to have; oneDNN itself runs what it really has."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@pytest.fixture
def ours():
    return drop_in(stock_model(SiglipVisionConfig(**TINY | {"intermediate_size": 104})), backend="cpu")


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(1, 3, 24, 24)


def is_packed(model) -> bool:
    weights = model._derived[None].weights
    flags = {bool(linear.weight.is_mkldnn or linear.packed) for linear in (*weights.layers[0], weights.patch)}
    assert len(flags) == 1
    return flags.pop()


def expected(model, pixels, output="last_hidden_state", **kwargs):
    return getattr(drop_in(model, backend="torch")(pixels, output_hidden_states=True, **kwargs), output)


@pytest.fixture
def convolutions(monkeypatch):
    """The shapes of what is computed by convolutions."""
    shapes, convolution = [], cpu._convolution
    monkeypatch.setattr(cpu, "_convolution", lambda x, *args: shapes.append(x.shape) or convolution(x, *args))
    return shapes


@needs_onednn
@torch.no_grad()
def test_weights_are_packed(ours, pixels, isa):
    ours(pixels)
    assert is_packed(ours)
    of_head = [bool(linear.weight.is_mkldnn or linear.packed) for linear in ours._derived[None].weights.head[1:]]
    assert of_head == [isa == "AVX512"] * 3


@needs_onednn
@pytest.mark.parametrize("isa", ["AVX2"], indirect=True)
@torch.no_grad()
def test_convolutions_are_for_one_image(ours, pixels, isa, convolutions):
    torch.testing.assert_close(ours(pixels).last_hidden_state, expected(ours, pixels), atol=1e-5, rtol=0)
    assert len(convolutions) == 1 + 4 * TINY["num_hidden_layers"]
    assert {shape[:-1].numel() for shape in convolutions} == {9}
    hidden_states = ours(pixels, output_hidden_states=True).hidden_states
    for own, plain in zip(hidden_states, expected(ours, pixels, "hidden_states"), strict=True):
        torch.testing.assert_close(own, plain, atol=1e-5, rtol=0)
    convolutions.clear()

    batch = pixels.repeat(3, 1, 1, 1)
    torch.testing.assert_close(ours(batch).last_hidden_state, expected(ours, batch), atol=1e-5, rtol=0)
    larger = torch.randn(1, 3, 40, 40)
    actual = ours(larger, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(actual, expected(ours, larger, interpolate_pos_encoding=True), atol=1e-5, rtol=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        torch.testing.assert_close(ours(pixels).last_hidden_state, expected(ours, pixels), atol=1e-5, rtol=0)
    finally:
        torch.set_num_threads(threads)
    assert not convolutions


@needs_onednn
@pytest.mark.parametrize("isa", ["AVX2"], indirect=True)
@torch.no_grad()
def test_images_whose_tokens_add_up_to_one(ours, isa, convolutions):
    pixels = torch.randn(3, 3, 24, 8)
    actual = ours(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert convolutions
    of_torch = expected(ours, pixels, interpolate_pos_encoding=True)
    torch.testing.assert_close(actual, of_torch, atol=1e-5, rtol=0)


@needs_onednn
def test_no_call_reorders_weights():
    """It would be right, and slower than stock: see PackedForImage."""
    code = """
import torch
from transformers import SiglipVisionConfig
from siglip_fast import SiglipVisionModel
torch.set_num_threads(8)
sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
model = SiglipVisionModel(SiglipVisionConfig(image_size=384, **sizes), backend="cpu").eval()
with torch.no_grad():
    for _ in range(2):
        print("CALL", flush=True)
        model(torch.zeros(1, 3, 384, 384))
"""
    avx2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    environment = os.environ | avx2 | {"ONEDNN_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    lines = run.stdout.rpartition("CALL")[2].splitlines()
    assert sum(",convolution," in line for line in lines) == 5
    assert not [line for line in lines if ",reorder," in line]


@needs_onednn
@pytest.mark.parametrize("isa", ["AVX2"], indirect=True)
@pytest.mark.parametrize(
    "out, K, width",
    [(768, 768, 1), (768, 3072, 2), (1024, 4096, 4), (8, 8, 1), (100, 64, None), (64, 100, None), (1152, 4304, None)],
)
def test_how_rows_are_cut_into_pixels(out, K, width, isa):
    linear = Linear(torch.randn(out, K), torch.randn(out))
    packed = Ops("cpu").pack(linear, tokens=9).packed
    assert (packed and packed.weight.shape) == (width and (out, K // width, 1, width))


@pytest.mark.parametrize("missing", ["onednn", "x86", "avx2", "bf16"])
@torch.no_grad()
def test_falls_back_to_plain_torch(missing, ours, pixels, monkeypatch):
    if missing == "onednn":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif missing == "x86":
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    elif missing == "avx2":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    else:
        monkeypatch.setattr(cpu._mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        ours, pixels = ours.bfloat16(), pixels.bfloat16()
    assert ours.why_not(pixels) is None
    assert torch.equal(ours(pixels).last_hidden_state, expected(ours, pixels))
    assert not is_packed(ours)


@torch.no_grad()
def test_another_backend_derives_anew(ours, pixels, isa):
    ours(pixels)
    assert is_packed(ours) == ONEDNN
    ours.backend = "torch"
    ours(pixels)
    assert not is_packed(ours)


@torch.no_grad()
def test_edits_reach_the_packed_weights(ours, pixels, isa):
    before = ours(pixels).last_hidden_state
    tower = getattr(ours, "vision_model", ours)
    tower.encoder.layers[0].mlp.fc2.weight.mul_(2)
    after = ours(pixels).last_hidden_state
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected(ours, pixels), atol=1e-5, rtol=0)


def test_packed_weights_are_no_state(ours, pixels, isa):
    names = set(ours.state_dict())
    with torch.no_grad():
        ours(pixels)
    assert set(ours.state_dict()) == names
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in drop_in(ours).parameters())


def test_weights_elsewhere_are_left_alone(isa):
    linear = Linear(torch.empty(8, 8, device="meta"), torch.empty(8, device="meta"))
    assert Ops("cpu").pack(linear, tokens=9) is linear


@torch.no_grad()
def test_large_batches_run_in_parts(ours, isa, monkeypatch):
    pixels = torch.randn(7, 3, 24, 24)  # of 9 tokens each
    whole = ours(pixels)
    monkeypatch.setattr(cpu, "rows_at_once", lambda: 30)
    rows, attention = [], cpu.attention
    monkeypatch.setattr(cpu, "attention", lambda qkv: rows.append(len(qkv)) or attention(qkv))
    in_parts = ours(pixels)
    assert rows == [3] * TINY["num_hidden_layers"] + 2 * [2] * TINY["num_hidden_layers"]
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(in_parts[name], whole[name], atol=1e-5, rtol=0)
    hidden_states = ours(pixels, output_hidden_states=True).hidden_states
    for actual, plain in zip(hidden_states, expected(ours, pixels, "hidden_states"), strict=True):
        torch.testing.assert_close(actual, plain, atol=1e-5, rtol=0)
    monkeypatch.setattr(cpu, "rows_at_once", lambda: 1)
    assert ours(pixels).last_hidden_state.shape == whole.last_hidden_state.shape


@torch.no_grad()
def test_parts_without_a_head(isa, monkeypatch):
    ours = drop_in(stock_model(SiglipVisionConfig(**TINY, vision_use_head=False)), backend="cpu")
    pixels = torch.randn(5, 3, 24, 24)
    monkeypatch.setattr(cpu, "rows_at_once", lambda: 30)
    actual = ours(pixels)
    assert actual.pooler_output is None
    torch.testing.assert_close(actual.last_hidden_state, expected(ours, pixels), atol=1e-5, rtol=0)
