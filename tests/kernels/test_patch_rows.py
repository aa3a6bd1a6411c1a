"""patch_embed of rows against float64, and the moments that it leaves."""

import numpy
import pytest
import reference
import torch
from torch.nn import functional as F

from siglip_fast.backends import torch as plain
from siglip_fast.ops import Ops, PatchEmbedding, Position

SHAPES = [  # rows there are, which are taken (None: all), K, D, taps
    pytest.param(70, None, 588, 136, 4, id="so400m-patch14"),
    pytest.param(37, None, 96, 72, 1, id="one-tap"),
    pytest.param(9, 131, 40, 40, 4, id="rows-repeated"),
    pytest.param(150, 5, 24, 64, 16, id="few-of-many"),
]


def make(rows, taken, K, D, taps, dtype, device):
    """The last row, channel and tap would be missed, and so would weights of taps that do not add up to 1."""
    torch.manual_seed(K + D)
    pixel_rows = torch.randn(rows, K)
    pixel_rows[-1] *= 8
    weight = torch.randn(D, K) * K**-0.5
    weight[:, -1] *= 8
    M = taken or rows
    index = torch.randint(0, 50, (M, taps), dtype=torch.int32)
    index[0] = 49
    tap_weight = torch.randn(M, taps) if taps > 1 else None
    which = None if taken is None else torch.randint(0, rows, (taken,), dtype=torch.int32).to(device)
    if which is not None:
        which[-1] = rows - 1
    patch = PatchEmbedding(weight.to(device, dtype), torch.randn(D).to(device, dtype), 14)
    table = reference.outliers(50, D).to(device, dtype)
    position = Position(table, index.to(device), None if tap_weight is None else tap_weight.to(device))
    return pixel_rows.to(device), patch, position, which


def check(backend, pixel_rows, patch, position, rows):
    out, moments = Ops(backend).patch_embed_rows(pixel_rows, patch, position, rows)
    cast = pixel_rows.to(patch.weight.dtype)
    cast = cast if rows is None else cast[rows.long()]
    table, index, weight = position
    added = table.double()[index.long()] * (1 if weight is None else weight.double()[..., None])
    expected = reference.linear(cast, patch.weight, patch.bias) + added.sum(1)
    same_dtype = F.linear(cast, patch.weight, patch.bias) + plain.gathered(position)
    reference.assert_accurate(out, expected, same_dtype)
    if backend == "triton":
        assert reference.relative_error(moments, reference.moments(out)) < 1e-6


@pytest.mark.parametrize("rows, taken, K, D, taps", SHAPES)
def test_accuracy(rows, taken, K, D, taps, dtype, backend, device):
    check(backend, *make(rows, taken, K, D, taps, dtype, device))


@pytest.mark.parametrize("given", [torch.float16, torch.float64, "slice"])
def test_pixels_of_another_kind(given, dtype, backend, device):
    pixel_rows, *rest = make(9, None, 40, 72, 1, dtype, device)
    if given == "slice":
        pixel_rows = F.pad(pixel_rows, (3, 2), value=1e4)[:, 3:-2]
    else:
        pixel_rows = pixel_rows.to(given)
    check(backend, pixel_rows, *rest)


def test_a_float32_stream(dtype, backend, device):
    """As torch.autocast has it: not rounded."""
    pixel_rows, patch, position, _ = make(9, None, 40, 72, 4, dtype, device)
    position = position._replace(table=position.table.float())
    out, _ = Ops(backend).patch_embed_rows(pixel_rows, patch, position)
    assert out.dtype == torch.float32
    cast = pixel_rows.to(dtype)
    expected = reference.linear(cast, patch.weight, patch.bias)
    expected += (position.table.double()[position.index.long()] * position.weight.double()[..., None]).sum(1)
    same_dtype = F.linear(cast, patch.weight, patch.bias) + plain.gathered(position)
    reference.assert_accurate(out, expected, same_dtype)


def test_offsets_beyond_32_bits(device):
    """The second row taken begins 2.4·10⁹ elements after the first."""
    if torch.empty(0).is_cuda and not torch.cuda.is_available():
        pytest.skip("ttsem copies the whole of the memory that a tensor has")
    # calloc: pages that nobody touches take no memory
    pixel_rows = torch.from_numpy(numpy.zeros((60_000_001, 40), dtype=numpy.float16)).to(device)
    rows = torch.tensor([0, 60_000_000], dtype=torch.int32).to(device)
    few, patch, position, _ = make(2, None, 40, 72, 1, torch.float16, device)
    pixel_rows[rows.long()] = few.half()
    check("triton", pixel_rows, patch, position, rows)
