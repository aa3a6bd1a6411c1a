"""attention inside of segments against softmax attention in float64, segment by segment."""

import pytest
import reference
import torch
from packed import segments_of
from siglip_fast.kernels.attention_segments import attention_segments
from siglip_fast.kernels.tiles import attention_segments_default
from test_attention import ARCHITECTURES
from torch.nn import functional as F

from siglip_fast.ops import Ops

LENGTHS = {  # keys, and how many rows more only look at them, of each segment
    "around-a-block": ([63, 1, 64, 65, 2], None),
    "a-long-one": ([3, 1000, 2], None),
    "query-only-rows": ([64, 5, 130], [1, 3, 65]),
    "all-short": ([4, 16, 1, 9], [0, 0, 3, 0]),
    "hundreds": ([1 + i % 7 for i in range(300)], None),
    "4096": ([1, 4096, 65], [0, 1, 0]),
}


def make(segments, H, d, dtype, device):
    """Every score within a segment is far below 0, that of its rows with a neighbour's keys far above, and with those of
    its own rows that are none, and values are of another sign there."""
    torch.manual_seed(d)
    qkv = torch.randn(sum(segments.queries), 3, H, d) * 0.1
    offset = torch.tensor([2.0, -2.0, 5.0])[:, None, None]
    for i, (first, queries, keys) in enumerate(zip(*segments[:3], strict=True)):
        sign = 1 - 2 * (i % 2)
        qkv[first : first + queries] += sign * offset
        qkv[first + keys : first + queries, 1:] -= 2 * sign * offset[1:]
    return qkv.to(device, dtype)


def by_segment(attend, qkv, segments):
    """`attend(q, k, v)`, each `[1, H, rows, d]`."""
    parts = []
    for first, queries, keys in zip(*segments[:3], strict=True):
        q, k, v = (part.transpose(0, 1)[None] for part in qkv[first : first + queries].unbind(1))
        parts.append(attend(q, k[:, :, :keys], v[:, :, :keys])[0].transpose(0, 1))
    return torch.cat(parts)


def in_float64(q, k, v):
    q, k, v = (t.double() for t in (q, k, v))
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v


def check(out, qkv, segments):
    expected = by_segment(in_float64, qkv, segments)
    reference.assert_accurate(out, expected, by_segment(F.scaled_dot_product_attention, qkv, segments))


@pytest.mark.parametrize("name", LENGTHS)
def test_neighbours_would_dominate(name, dtype, backend, device):
    segments = segments_of(LENGTHS[name][0], device, LENGTHS[name][1])
    qkv = make(segments, 2 if name in ("all-short", "query-only-rows") else 1, 72, dtype, device)
    check(Ops(backend).attention(qkv, segments), qkv, segments)


@pytest.mark.parametrize("d", [64, 80, 96])
def test_head_dims(d, dtype, backend, device):
    segments = segments_of([17, 70], device, [1, 0])
    qkv = make(segments, 2, d, dtype, device)
    check(Ops(backend).attention(qkv, segments), qkv, segments)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_longest(backend):
    """By some of its rows: scores of all would take 34 GB."""
    keys = [2, 65536, 3]
    segments = segments_of(keys, "cpu")
    qkv = make(segments, 1, 64, torch.float32, "cpu")
    out = Ops(backend).attention(qkv, segments)
    rows = torch.tensor([2, 3, 30000, 65537])
    (q, k, v) = (part.transpose(0, 1)[None] for part in qkv[2 : 2 + 65536].unbind(1))
    expected, plain = (attend(q[:, :, rows - 2], k, v)[0, 0] for attend in (in_float64, F.scaled_dot_product_attention))
    reference.assert_accurate(out[rows, 0], expected, plain)


@pytest.mark.parametrize("backend", ["triton"])
def test_a_segment_beyond_32_bits(backend, device):
    """Whose first element of qkv is the 2³¹st or a later one."""
    first, queries = 2**31 // (3 * 64) + 5, 20
    qkv = torch.zeros(first + queries, 3, 1, 64, dtype=torch.float16, device=device)  # of pages that nobody touches
    alone = segments_of([queries], "cpu")
    qkv[first:] = make(alone, 1, 64, torch.float16, device)
    schedule = {rows: entries + entries.new_tensor([first, 0, 0, 0]) for rows, entries in alone.schedule.items()}
    out = attention_segments(qkv, queries, {rows: entries.to(device) for rows, entries in schedule.items()})
    check(out[first:], qkv[first:], alone)


def test_equal_segments(dtype, backend, device):
    """Which are images of one size to the backend."""
    segments = segments_of([66, 66], device)
    assert segments.length == 66
    qkv = make(segments, 1, 64, dtype, device)
    check(Ops(backend).attention(qkv, segments), qkv, segments)


@pytest.mark.parametrize("backend", ["triton"])
def test_every_default_tile(dtype, backend, device):
    """Of all architectures, and of few and of many rows; several tiles of a segment and several heads."""
    segments = segments_of([3, 70, 129], device, [0, 1, 0])
    qkv = make(segments, 2, 72, dtype, device)
    tiles = {
        tuple(attention_segments_default(dtype, arch, M, longest, 16, 72).items())
        for arch in ARCHITECTURES
        for M in (64, 1 << 16)
        for longest in (16, 129)
    }
    assert len(tiles) >= (2 if dtype == torch.float32 else 5)
    for tile in sorted(tiles):
        check(attention_segments(qkv, 129, segments.schedule, dict(tile)), qkv, segments)


@pytest.mark.parametrize("backend", ["triton"])
def test_entries_of_zeros_do_nothing(dtype, backend, device):
    segments = segments_of([5, 70], device)
    qkv = make(segments, 2, 64, dtype, device)
    nothing = torch.zeros(3, 4, dtype=torch.int32, device=device)
    padded = {rows: torch.cat([entries, nothing]) for rows, entries in segments.schedule.items()}
    out, expected = (attention_segments(qkv, 70, schedule) for schedule in (padded, segments.schedule))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["triton"])
def test_bits_do_not_depend_on_the_other_segments(dtype, backend, device):
    """Batch invariant, whatever their lengths, and though one alone is of one size with itself."""
    ops, keys = Ops(backend, batch_invariant=True), [5, 128, 33]  # of whole blocks the order is another one
    segments = segments_of(keys, device)
    qkv = torch.randn(sum(keys), 3, 1, 64, device=device).to(dtype)
    together = ops.attention(qkv, segments).split(keys)
    for part, expected, length in zip(qkv.split(keys), together, keys, strict=True):
        assert torch.equal(ops.attention(part, segments_of([length], device)), expected)


def test_refused(device):
    segments = segments_of([5], device)
    qkv = torch.zeros(5, 3, 2, 64, device=device)
    with pytest.raises(ValueError, match=r"segments.schedule: expected one for 64 rows, got \[\]"):
        attention_segments(qkv, 5, {})
    with pytest.raises(ValueError, match="segments: expected at most 5592405 rows each, got 5592406"):
        attention_segments(qkv, 5592406, segments.schedule)
