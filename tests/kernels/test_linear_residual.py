"""linear_residual against Linear plus residual in float64, and the moments that it leaves."""

import sys

import pytest
import reference
import torch
from siglip_fast.kernels.linear_residual import linear_residual
from siglip_fast.kernels.tiles import gemm_default
from torch.nn import functional as F

from siglip_fast.ops import Linear, Ops

SHAPES = [  # M, K, N
    *(pytest.param(M, 136, 768, id=f"M-{M}") for M in (1, 3, 127, 128, 129, 196, 197, 729)),
    pytest.param(131, 768, 768, id="base-out_proj"),
    pytest.param(131, 3072, 768, id="base-fc2"),
    pytest.param(65, 1024, 1024, id="large-out_proj"),
    pytest.param(65, 4096, 1024, id="large-fc2"),
    pytest.param(130, 1152, 1152, id="so400m-out_proj"),
    pytest.param(129, 4304, 1152, id="so400m-fc2"),
    pytest.param(65, 1536, 1536, id="giant-out_proj"),
    pytest.param(65, 6144, 1536, id="giant-fc2"),
    pytest.param(3, 72, 100, id="N-and-K-no-multiples-of-64"),
    pytest.param(131, 36, 40, id="narrower-than-a-moment-block"),
]


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no-residual"])
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_accuracy(M, K, N, with_residual, dtype, backend, device):
    torch.manual_seed(M + K + N)
    x = torch.randn(M, K).to(device, dtype)
    linear = Linear((torch.randn(N, K) * K**-0.5).to(device, dtype), torch.randn(N).to(device, dtype))
    linear.weight[:, -1] *= 8
    packed = Ops(backend).pack(linear, tokens=M)
    residual = reference.outliers(M, N).to(device, dtype) if with_residual else None
    out, moments = Ops(backend).linear_residual(x, packed, residual)
    expected, same_dtype = (reference.linear(x, linear.weight, linear.bias), F.linear(x, linear.weight, linear.bias))
    if with_residual:
        expected, same_dtype = expected + residual.double(), same_dtype + residual
    reference.assert_accurate(out, expected, same_dtype)
    if backend == "triton":
        # of the values as stored: in 16 bits, the moments of the unrounded sum would miss this by far
        assert reference.relative_error(moments, reference.moments(out)) < 1e-6
        m2 = moments[:, 1], reference.moments(out)[:, 1]
        assert reference.relative_error(*m2) < 1e-5
    else:
        assert moments is None


def test_sliced_and_transposed_input(dtype, backend, device):
    torch.manual_seed(0)
    x = torch.randn(3, 100, 50).to(device, dtype)[1:].transpose(1, 2)
    residual = torch.randn(4, 50, 80).to(device, dtype)[1:3, :, :72]
    linear = Linear(torch.randn(72, 100).to(device, dtype), torch.randn(72).to(device, dtype))
    out, _ = Ops(backend).linear_residual(x, linear, residual)
    expected = reference.linear(x, linear.weight, linear.bias) + residual.double()
    reference.assert_accurate(out, expected, F.linear(x, linear.weight, linear.bias) + residual)


def test_moments_survive_a_large_mean(device):
    """E[x²] − μ² in fp32 would have no correct digit here: σ² = 1, μ² = 10⁸."""
    linear = Linear(torch.eye(128).to(device), torch.zeros(128).to(device))
    x = (torch.randn(5, 128) + 1e4).to(device)
    _, moments = Ops("triton").linear_residual(x, linear, None)
    assert reference.relative_error(moments[:, 1], reference.moments(x)[:, 1]) < 1e-3


@pytest.mark.parametrize("backend", ["triton"])
def test_the_tile_of_gfx11(dtype, backend, device):
    """The one default GEMM tile that no other test on this device runs."""
    torch.manual_seed(0)
    x, residual = torch.randn(131, 136).to(device, dtype), torch.randn(131, 200).to(device, dtype)
    weight, bias = torch.randn(200, 136).to(device, dtype), torch.randn(200).to(device, dtype)
    tile = gemm_default(dtype, "gfx1100", 131, 200, 136)
    assert tile != gemm_default(dtype, "gfx942", 131, 200, 136)
    out, _ = linear_residual(x, weight, bias, residual, tile)
    same_dtype = F.linear(x, weight, bias) + residual
    reference.assert_accurate(out, reference.linear(x, weight, bias) + residual.double(), same_dtype)


TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}


def made(M, K, N, dtype, device):
    torch.manual_seed(M + K + N)
    x, residual = torch.randn(M, K).to(device, dtype), reference.outliers(M, N).to(device, dtype)
    weight, bias = (torch.randn(N, K) * K**-0.5).to(device, dtype), torch.randn(N).to(device, dtype)
    weight[:, -1] *= 8
    return x, weight, bias, residual


SPLITS = [  # M, K, N, SPLIT_K
    pytest.param(37, 4304, 72, 4, id="so400m-fc2"),
    pytest.param(3, 136, 100, 2, id="one-tile-and-a-ragged-K"),
    pytest.param(67, 256, 130, 3, id="parts-of-2-2-and-0-blocks"),
    pytest.param(3, 72, 40, 8, id="more-parts-than-blocks"),
]


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no-residual"])
@pytest.mark.parametrize("M, K, N, splits", SPLITS)
@pytest.mark.parametrize("backend", ["triton"])
def test_split_k(M, K, N, splits, with_residual, dtype, backend, device):
    x, weight, bias, residual = made(M, K, N, dtype, device)
    residual = residual if with_residual else None
    out, moments = linear_residual(x, weight, bias, residual, TILE | {"SPLIT_K": splits})
    expected, same_dtype = reference.linear(x, weight, bias), F.linear(x, weight, bias)
    if with_residual:
        expected, same_dtype = expected + residual.double(), same_dtype + residual
    reference.assert_accurate(out, expected, same_dtype)
    assert reference.relative_error(moments, reference.moments(out)) < 1e-6
    again = linear_residual(x, weight, bias, residual, TILE | {"SPLIT_K": splits})
    assert torch.equal(out, again[0]) and torch.equal(moments, again[1])


@pytest.mark.skipif("ttsem" in sys.modules, reason="ttsem misreads tensor descriptors")
@pytest.mark.parametrize("more", [{}, {"SPLIT_K": 3}], ids=["whole", "split"])
@pytest.mark.parametrize("backend", ["triton"])
def test_tensor_descriptors(more, dtype, backend, device):
    """Rows, columns and K end inside a tile."""
    if dtype == torch.float32:
        pytest.skip("16-bit dtypes only: see test_what_tensor_descriptors_cannot_read")
    x, weight, bias, residual = made(131, 344, 200, dtype, device)
    out, moments = linear_residual(x, weight, bias, residual, TILE | {"TMA": True} | more)
    expected = reference.linear(x, weight, bias) + residual.double()
    reference.assert_accurate(out, expected, F.linear(x, weight, bias) + residual)
    assert reference.relative_error(moments, reference.moments(out)) < 1e-6


def test_what_tensor_descriptors_cannot_read(device):
    def launch(K, dtype=torch.float16, shift=0):
        x, weight = (torch.zeros(3 * K + shift, dtype=dtype)[shift:].view(3, K), torch.zeros(40, K, dtype=dtype))
        x, weight, bias = x.to(device), weight.to(device), torch.zeros(40, dtype=dtype, device=device)
        linear_residual(x, weight, bias, None, TILE | {"TMA": True})

    with pytest.raises(ValueError, match="16-bit dtype, got torch.float32"):
        launch(64, torch.float32)
    with pytest.raises(ValueError, match=r"16 bytes, got 136 \(K = 68\)"):
        launch(68)
    if device == "cpu":  # elsewhere .to() has moved x to the beginning of its memory
        with pytest.raises(ValueError, match="expected x at a multiple of 16 bytes"):
            launch(64, shift=1)
