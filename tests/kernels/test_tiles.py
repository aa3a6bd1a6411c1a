"""The default tiles: that they fill a GPU, and that persistent grids and tails of rows compute the same as one launch."""

import sys

import pytest
import reference
import torch
from siglip_fast.kernels import gemm, linear_residual, tiles
from siglip_fast.kernels.layernorm_linear import layernorm_linear
from test_layernorm_linear import make
from torch.nn import functional as F

from siglip_fast.models.weights import fold

TILE = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
SHAPES = [  # M, N, K
    pytest.param(65, 192, 104, id="programs-with-five-and-four-tiles"),
    pytest.param(97, 72, 32, id="one-block-of-K"),
    pytest.param(5, 40, 72, id="one-tile"),
]


@pytest.fixture
def two_multiprocessors(monkeypatch):
    """So that small shapes have more tiles than a persistent grid has programs, on a GPU too."""
    for module in (gemm, linear_residual):
        monkeypatch.setattr(module, "multiprocessors", lambda: 2)


@pytest.mark.parametrize("M, N, K", SHAPES)
@pytest.mark.parametrize("arch", ["this", "sm_100"])  # which clears the sums in another way
@pytest.mark.parametrize("backend", ["triton"])
def test_persistent_layernorm_linear(M, N, K, arch, dtype, backend, device, two_multiprocessors, monkeypatch):
    if dtype == torch.float32:
        pytest.skip("persistent programs read 16-bit activations: there is no mean to take out of the product")
    if arch != "this":
        monkeypatch.setattr("siglip_fast.kernels.layernorm_linear.gpu_arch", lambda: arch)
    x, norm, weight, bias = make(M, K, N, dtype, device)
    norm.eps = 1e4  # which counts, beside a variance of about 3e4
    folded = fold(norm, weight, bias, dtype)[:4]
    moments = reference.moments(x).float()
    one, persistent = (
        layernorm_linear(x, moments, *folded, "tanh", config=TILE | {"PERSISTENT": persistent})
        for persistent in (False, True)
    )
    assert torch.equal(one, persistent)
    expected = reference.gelu_tanh(
        reference.linear(reference.layernorm(x, norm.weight, norm.bias, norm.eps), weight, bias)
    )
    same_dtype = F.gelu(F.linear(norm(x), weight, bias), approximate="tanh")
    reference.assert_accurate(persistent, expected, same_dtype)


@pytest.mark.parametrize("M, N, K", SHAPES)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no-residual"])
@pytest.mark.parametrize("backend", ["triton"])
def test_persistent_linear_residual(M, N, K, residual, dtype, backend, device, two_multiprocessors):
    x, weight, bias, stream = _linear(M, N, K, dtype, device)
    stream = stream if residual else None
    one, persistent = (
        linear_residual.linear_residual(x, weight, bias, stream, TILE | {"PERSISTENT": persistent})
        for persistent in (False, True)
    )
    if K > TILE["BLOCK_K"]:  # where there is no loop, the compiler begins the product's sums with the bias
        assert all(map(torch.equal, one, persistent))
    expected = reference.linear(x, weight, bias) + (stream.double() if residual else 0)
    same_dtype = F.linear(x, weight, bias) + (stream if residual else 0)
    reference.assert_accurate(persistent[0], expected, same_dtype)
    assert reference.relative_error(persistent[1], reference.moments(persistent[0])) < 1e-6


@pytest.mark.skipif("ttsem" in sys.modules, reason="ttsem misreads tensor descriptors")
@pytest.mark.parametrize("M, N, K", SHAPES)
@pytest.mark.parametrize("backend", ["triton"])
def test_persistent_tensor_descriptors(M, N, K, dtype, backend, device, two_multiprocessors):
    """They read what pointers do, from tile to tile."""
    if dtype == torch.float32:
        pytest.skip("16-bit dtypes only")
    x, weight, bias, stream = _linear(M, N, K, dtype, device)
    folded, moments = (weight, weight.float().sum(1), bias.float(), 1e-6), reference.moments(x).float()
    pointers, descriptors = TILE | {"PERSISTENT": True}, TILE | {"PERSISTENT": True, "TMA": True}
    normed = [layernorm_linear(x, moments, *folded, "tanh", config=tile) for tile in (pointers, descriptors)]
    assert torch.equal(*normed)
    added = [linear_residual.linear_residual(x, weight, bias, stream, tile) for tile in (pointers, descriptors)]
    assert all(map(torch.equal, *added))


@pytest.mark.parametrize("M", [97, 70, 64, 31])
@pytest.mark.parametrize("more", [{"BLOCK_M": 16}, {"SPLIT_K": 2}], ids=["short", "split"])
@pytest.mark.parametrize("backend", ["triton"])
def test_tail(M, more, dtype, backend, device, two_multiprocessors):
    """The rows after the last whole wave of tiles, if there are any: 3 tiles a row of tiles on 2 multiprocessors."""
    x, weight, bias, stream = _linear(M, 192, 104, dtype, device)
    tail = TILE | more
    whole = linear_residual.linear_residual(x, weight, bias, stream, TILE)
    parts = linear_residual.linear_residual(x, weight, bias, stream, TILE | {"PERSISTENT": True, "TAIL": tail})
    assert tiles.whole_waves(TILE, 2, M, 192) == M // 64 * 64
    for one, other in zip(whole, parts, strict=True):
        assert reference.relative_error(other, one) < (1e-6 if dtype == torch.float32 else 1e-3)
    reference.assert_accurate(
        parts[0], reference.linear(x, weight, bias) + stream.double(), F.linear(x, weight, bias) + stream
    )


def _linear(M, N, K, dtype, device):
    torch.manual_seed(M)
    x, stream = torch.randn(M, K).to(device, dtype), reference.outliers(M, N).to(device, dtype)
    weight, bias = (torch.randn(N, K) * K**-0.5).to(device, dtype), torch.randn(N).to(device, dtype)
    weight[:, -1] *= 8
    return x, weight, bias, stream


LINEARS = {"qkv": (2304, 768), "out_proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}


@pytest.mark.parametrize("name", LINEARS)
def test_one_image_fills_a_hopper(name):
    """base-patch16-224's 196 tokens: at least 96 programs on 132 multiprocessors."""
    N, K = LINEARS[name]
    split = name in ("out_proj", "fc2")
    tile = tiles.gemm_default(torch.bfloat16, "sm_90", 196, N, K, tma=True, split=split)
    programs, splits = gemm.gemm_grid(196, N, tile)
    assert 96 <= programs * splits <= 264


@pytest.mark.parametrize("name", LINEARS)
def test_many_images_take_large_persistent_tiles_on_hopper(name):
    N, K = LINEARS[name]
    split = name in ("out_proj", "fc2")
    tile = tiles.gemm_default(torch.bfloat16, "sm_90", 64 * 196, N, K, tma=True, split=split)
    assert tile["PERSISTENT"] and tile["TMA"] and tile["BLOCK_M"] * tile["BLOCK_N"] == 256 * 128
    unaligned = tiles.gemm_default(torch.bfloat16, "sm_90", 64 * 196, N, K, tma=False, split=split)
    assert "TMA" not in unaligned and "PERSISTENT" not in unaligned
