"""Attention by oneDNN Graph: where it applies, that its scores are not rounded, and what runs where it does not."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from models import ONEDNN
from torch._subclasses import FakeTensorMode

from siglip_fast.backends import cpu, onednn_graph
from siglip_fast.backends import torch as plain
from siglip_fast.ops import Ops

HAS_BF16 = ONEDNN and torch.cpu._is_avx512_bf16_supported()
DTYPES = (torch.bfloat16, torch.float32)
KNOWN_TO = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="a CPU without AVX-512 BF16")
needs_graph = pytest.mark.skipif(
    not (HAS_BF16 and all(onednn_graph._is_usable(dtype, torch.get_num_threads()) for dtype in DTYPES)),
    reason="a CPU without AVX-512 BF16, or a torch whose oneDNN Graph lacks the attention",
)


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would need more heads
    clear()
    yield
    clear()
    torch.set_num_threads(threads)


def clear():
    onednn_graph._is_usable.cache_clear()
    onednn_graph._compiled.clear()


@pytest.fixture
def calls(monkeypatch):
    """The shapes that oneDNN Graph computed."""
    shapes, attention_for = [], onednn_graph.attention_for

    def counting(qkv):
        attention = attention_for(qkv)
        if attention:
            shapes.append(qkv.shape)
        return attention

    monkeypatch.setattr(onednn_graph, "attention_for", counting)
    return shapes


def random(*shape, scale=1.0, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return (torch.randn(shape) * scale).to(dtype)


def assert_accurate(actual, qkv):
    reference.assert_accurate(actual, reference.attention(qkv), plain.attention(qkv))
    assert actual.is_contiguous()


@pytest.mark.parametrize("scale", [1, 2, 4])  # the scores' standard deviation is its square
@needs_graph
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 196, 3, 12, 64), (1, 729, 3, 16, 72), (1, 65, 3, 4, 96)], ids=str)
def test_accuracy(shape, dtype, scale, calls):
    qkv = random(*shape, scale=scale, dtype=dtype)
    assert_accurate(Ops("cpu").attention(qkv), qkv)
    assert calls == [shape]


@needs_graph
@pytest.mark.parametrize("shape", [(3, 1, 3, 4, 64), (5, 7, 3, 2, 8)], ids=str)
def test_few_tokens(shape, calls):
    qkv = random(*shape)
    assert_accurate(Ops("cpu").attention(qkv), qkv)
    assert calls == [shape]


@needs_graph
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, blocks", [(1031, 1), (1040, 5), (1280, 5)])  # 1031 is prime
@pytest.mark.parametrize("images", [1, 3])
def test_blocks_of_queries(images, tokens, blocks, dtype, calls):
    assert onednn_graph._blocks(tokens) == blocks
    qkv = random(images, tokens, 3, 3, 16, scale=2, dtype=dtype)
    assert_accurate(Ops("cpu").attention(qkv), qkv)
    assert calls == [qkv.shape]


def test_rounded_scores_would_not_pass():
    """What the accuracy rule is worth here: the attention that oneDNN Graph must not compute."""
    qkv = random(2, 196, 3, 12, 64, scale=2)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    rounded = ((q @ k.mT * 0.125).softmax(-1) @ v).transpose(1, 2).contiguous()
    with pytest.raises(AssertionError, match="relative error"):
        assert_accurate(rounded, qkv)


@needs_graph
def test_outputs_are_not_overwritten():
    qkv = random(2, 9, 3, 4, 16)
    first = Ops("cpu").attention(qkv)
    kept = first.clone()
    Ops("cpu").attention(-qkv)
    assert torch.equal(first, kept)


@needs_graph
def test_nan_stays_in_its_head():
    qkv = random(2, 9, 3, 4, 16)
    qkv[1, 3, 1, 2] = float("nan")
    out = Ops("cpu").attention(qkv)
    assert out[1, :, 2].isnan().all()
    assert out.isnan().sum() == out[1, :, 2].numel()


@needs_graph
def test_from_several_threads(calls):
    images = [random(1, n, 3, 4, 16) for n in (9, 9, 9, 10)] * 8
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        outputs = list(pool.map(Ops("cpu").attention, images))
    assert len(calls) == len(images)
    for qkv, out in zip(images, outputs, strict=True):
        assert_accurate(out, qkv)


@needs_graph
def test_another_number_of_threads(calls):
    qkv = random(2, 33, 3, 6, 16)
    for count in (1, 5, 6):
        torch.set_num_threads(count)
        assert_accurate(Ops("cpu").attention(qkv), qkv)
    assert len(calls) == 2  # six threads would have two heads each


@needs_bf16
@pytest.mark.parametrize(
    "where",
    [
        "few heads",
        "no images",
        "many tokens",
        "few in fp32",
        "many in fp32",
        "fp16",
        "no bf16",
        "amx",
        "onednn",
    ],
)
def test_where_it_does_not_apply(where, calls, monkeypatch):
    qkv = random(2, 9, 3, 4, 16)
    if where == "few heads":
        qkv = random(1, 9, 3, 1, 16)
    elif where == "many tokens":
        monkeypatch.setattr(onednn_graph, "_MOST_SCORES", 9 * 9 - 1)
    elif where == "no images":
        qkv = random(0, 1280, 3, 4, 16)
    elif where in ("few in fp32", "many in fp32"):
        qkv = random(2, 64 if where == "few in fp32" else 1297, 3, 2, 8, dtype=torch.float32)
    elif where == "fp16":
        qkv = qkv.half()
    elif where == "no bf16":
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    elif where == "amx":
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert torch.equal(cpu.attention(qkv), plain.attention(qkv))
    assert not calls


@needs_bf16
@pytest.mark.parametrize("kind", [RuntimeError, TypeError])
def test_a_torch_that_cannot(kind, calls, monkeypatch, caplog):
    def cannot(graph):
        raise kind("could not add op to the graph")  # torch 2.9's words

    monkeypatch.setattr(torch._C, "_jit_to_static_module", cannot)
    qkv = random(2, 9, 3, 4, 16)
    with caplog.at_level(logging.INFO, "siglip_fast"):
        for _ in range(2):
            assert torch.equal(cpu.attention(qkv), plain.attention(qkv))
    assert caplog.text.count("could not add op to the graph") == 1
    assert not calls


@needs_bf16
def test_a_onednn_that_rounds_the_scores(calls, monkeypatch, caplog):
    make_type = onednn_graph._type
    monkeypatch.setattr(onednn_graph, "_type", lambda dtype, *args: make_type("BFloat16", *args))
    scale = torch.full

    def full(*args, dtype, **kwargs):
        return scale(*args, dtype=torch.bfloat16, **kwargs)

    monkeypatch.setattr(torch, "full", full)
    qkv = random(2, 9, 3, 4, 16)
    with caplog.at_level(logging.INFO, "siglip_fast"):
        assert torch.equal(cpu.attention(qkv), plain.attention(qkv))
    assert "rounds the scores" in caplog.text
    assert not calls


@needs_bf16
@pytest.mark.skipif(not KNOWN_TO, reason="a torch whose oneDNN Graph may lack the attention")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_this_torch_can(dtype):
    assert onednn_graph._is_usable(dtype, torch.get_num_threads())


@needs_graph
def test_so_many_shapes_and_no_more(calls, monkeypatch):
    monkeypatch.setattr(onednn_graph, "_MOST_SHAPES", 3)  # the probe's among them
    images = [random(2, n, 3, 4, 16) for n in (5, 6, 7, 5)]
    for qkv in images:
        assert_accurate(Ops("cpu").attention(qkv), qkv)
    assert calls == [images[0].shape, images[1].shape, images[3].shape]


@needs_graph
def test_tensors_that_are_not_their_memory(calls):
    qkv = random(2, 9, 3, 4, 16)
    assert torch.equal(cpu.attention(torch._neg_view(qkv)), plain.attention(-qkv))
    with FakeTensorMode() as mode:
        assert cpu.attention(mode.from_tensor(qkv)).shape == (2, 9, 4, 16)
    assert not calls
