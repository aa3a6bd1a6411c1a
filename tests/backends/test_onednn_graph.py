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

APPLIES = ONEDNN and cpu._is_slow_in_mkl()
BF16, FP32 = DTYPES = torch.bfloat16, torch.float32
KNOWN_TO = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)
needs_cpu = pytest.mark.skipif(not APPLIES, reason="not an AMD CPU with AVX-512 BF16")
needs_graph = pytest.mark.skipif(
    not APPLIES or not (KNOWN_TO or all(onednn_graph._is_usable(dtype, torch.get_num_threads()) for dtype in DTYPES)),
    reason="not an AMD CPU with AVX-512 BF16, or a torch whose oneDNN Graph lacks the attention",
)


@pytest.fixture(autouse=True)
def a_process_of_its_own():
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

    def counting(qkv, keys=None):
        attention = attention_for(qkv, keys)
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
@pytest.mark.parametrize("images, tokens", [(1, 1040), (3, 1280)])
def test_blocks_of_queries(images, tokens, dtype, calls):
    qkv = random(images, tokens, 3, 3, 16, scale=2, dtype=dtype)
    assert_accurate(Ops("cpu").attention(qkv), qkv)
    assert calls == [qkv.shape]


@needs_graph
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries, keys", [(71, 70), (200, 65), (1025, 1024)])
def test_rows_that_are_no_keys(queries, keys, dtype, calls):
    """As NaFlex's padded rows are; they would outweigh all keys."""
    qkv = random(2, queries, 3, 4, 16, dtype=dtype)
    qkv[:, keys:, 1:] = 100
    actual = cpu.attention(qkv, keys)
    reference.assert_accurate(actual, reference.attention(qkv, keys), plain.attention(qkv, keys))
    assert calls == [qkv.shape]


@needs_graph
def test_rows_that_are_no_keys_where_queries_would_be_blocks(calls):
    qkv = random(1, 1281, 3, 4, 16)
    assert torch.equal(cpu.attention(qkv, 1280), plain.attention(qkv, 1280))
    assert not calls


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


@pytest.mark.parametrize(
    "dtype, threads, B, N, H, images, blocks",
    [
        (BF16, 1, 2, 196, 2, 2, 1),
        (BF16, 2, 2, 196, 2, None, None),  # at most two heads a thread
        (BF16, 1, 2, 1, 2, 2, 1),
        (BF16, 1, 3, 1280, 1, 1, 5),
        (BF16, 2, 1, 1280, 1, 1, 5),
        (BF16, 3, 1, 1280, 1, None, None),
        (BF16, 3, 7, 1280, 1, 7, 1),
        (BF16, 3, 6, 1280, 1, None, None),
        (BF16, 1, 0, 1280, 4, None, None),
        (BF16, 64, 1, 4096, 16, 1, 16),
        (BF16, 65, 1, 4096, 16, None, None),  # too many scores
        (BF16, 1, 1, 8191, 16, 1, 1),
        (BF16, 1, 1, 8209, 16, None, None),
        (FP32, 1, 2, 64, 4, None, None),
        (FP32, 1, 2, 65, 4, 2, 1),
        (FP32, 1, 2, 1296, 4, 1, 6),
        (FP32, 1, 2, 1297, 4, None, None),
        (torch.float16, 1, 2, 196, 4, None, None),
    ],
)
def test_where_it_applies(dtype, threads, B, N, H, images, blocks, monkeypatch):
    asked = []
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_num_threads", lambda: threads)
        patched.setattr(onednn_graph, "_is_usable", lambda *probe: probe == (dtype, threads))
        patched.setattr(onednn_graph, "_compiled_for", lambda *shape: asked.append(shape) or torch.square)
        attention = onednn_graph.attention_for(torch.empty(B, N, 3, H, 8, dtype=dtype))
    assert (attention is None) == (images is None)
    assert asked == ([] if images is None else [(dtype, images, N, N, blocks, H, 8, threads)])


@pytest.mark.parametrize("tokens, blocks", [(1, 1), (1024, 1), (1025, 5), (1031, 1), (1152, 6), (1179, 9), (4096, 16)])
def test_blocks_have_128_to_256_queries(tokens, blocks):
    assert onednn_graph._blocks(tokens) == blocks


@needs_cpu
@pytest.mark.parametrize("where", ["no bf16", "intel", "onednn"])
def test_where_the_cpu_does_not_suit(where, calls, monkeypatch):
    if where == "no bf16":
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    elif where == "intel":
        monkeypatch.setattr(cpu, "_is_amd", lambda: False)
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    qkv = random(2, 9, 3, 4, 16)
    assert torch.equal(cpu.attention(qkv), plain.attention(qkv))
    assert not calls


@needs_cpu
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


@needs_cpu
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
    assert "does not compute what it should" in caplog.text
    assert not calls


@needs_cpu
@pytest.mark.skipif(not KNOWN_TO, reason="a torch whose oneDNN Graph may lack the attention")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_this_torch_can(dtype):
    assert onednn_graph._is_usable(dtype, torch.get_num_threads())


@needs_graph
def test_so_many_shapes_and_no_more(calls, monkeypatch):
    monkeypatch.setattr(onednn_graph, "_MOST_SHAPES", 3)  # the probe's among them
    batches = [random(2, n, 3, 4, 16) for n in (5, 6, 7, 1280, 5)]
    for qkv in batches:
        assert_accurate(Ops("cpu").attention(qkv), qkv)
    assert calls == [batches[0].shape, batches[1].shape, batches[4].shape]
    for n in (5, 6, 7, 8):  # of which there are so many beside the others
        cpu.attention(random(2, n + 1, 3, 4, 16), n)
    assert len(calls) == 6


@needs_graph
def test_both_dtypes_in_one_process(calls):
    qkv = random(2, 70, 3, 4, 16)
    for each in (qkv, qkv.float()):
        assert_accurate(Ops("cpu").attention(each), each)
    assert len(calls) == 2


@needs_graph
def test_tensors_that_are_not_their_memory(calls):
    qkv = random(2, 9, 3, 4, 16)
    assert torch.equal(cpu.attention(torch._neg_view(qkv)), plain.attention(-qkv))
    with FakeTensorMode() as mode:
        assert cpu.attention(mode.from_tensor(qkv)).shape == (2, 9, 4, 16)
    assert not calls
