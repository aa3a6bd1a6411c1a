"""Every candidate configuration of every kernel is right: compared with float64 before anyone measures it.

Shapes are small and ragged for every tile, in rows, columns and K. Where M is 37, the short tiles are listed.
"""

import sys

import pytest
import reference
import torch
from siglip_fast.kernels.attention import attention, attention_configs, head_slices
from siglip_fast.kernels.attention_pool import attention_pool, attention_pool_configs
from siglip_fast.kernels.layernorm import layernorm, layernorm_configs
from siglip_fast.kernels.layernorm_linear import layernorm_linear, layernorm_linear_configs
from siglip_fast.kernels.linear_residual import linear_residual, linear_residual_configs
from siglip_fast.kernels.patch_embed import patch_embed, patch_embed_configs
from siglip_fast.kernels.tiles import gemm_default
from test_attention import ARCHITECTURES
from test_attention import same_dtype as sdpa
from test_layernorm_linear import make
from torch.nn import functional as F

from siglip_fast.backends import torch as plain
from siglip_fast.models.weights import fold
from siglip_fast.ops import Linear, Pool

UNDER_TTSEM = "ttsem" in sys.modules
pytestmark = pytest.mark.parametrize("backend", ["triton"])


def check(configs, launch, expected, same_dtype):
    """`launch(config)` returns (out,) or (out, moments)."""
    for config in configs:
        if config.get("TMA") and UNDER_TTSEM:
            continue  # it misreads tensor descriptors
        out, *moments = launch(config)
        try:
            reference.assert_accurate(out, expected, same_dtype)
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from None
        for m in moments:
            assert reference.relative_error(m, reference.moments(out)) < 1e-6, config
        # without a GPU all else has one order of its sums, and takes its time
        if "SPLIT_K" in config or (out.is_cuda and not UNDER_TTSEM):
            again = launch(config)
            assert all(map(torch.equal, (out, *moments), again)), f"{config}: other bits the second time"


def stated(configs, key):
    return {config[key] for config in configs if key in config}


@pytest.mark.parametrize("M", [37, 70])
def test_linear_residual(M, dtype, backend, device):
    N, K = 72, 1048
    configs = linear_residual_configs(dtype, "sm_90", M, N, K)
    assert stated(configs, "SPLIT_K") == {2, 4, 8}
    assert stated(configs, "TMA") == (set() if dtype == torch.float32 else {True})
    torch.manual_seed(M)
    x, residual = torch.randn(M, K).to(device, dtype), reference.outliers(M, N).to(device, dtype)
    weight, bias = (torch.randn(N, K) * K**-0.5).to(device, dtype), torch.randn(N).to(device, dtype)
    weight[:, -1] *= 8
    expected = reference.linear(x, weight, bias) + residual.double()
    same_dtype = F.linear(x, weight, bias) + residual
    check(configs, lambda c: linear_residual(x, weight, bias, residual, c), expected, same_dtype)


@pytest.mark.parametrize("M", [37, 70])
def test_layernorm_linear(M, dtype, backend, device):
    N, K = 72, 216
    configs = layernorm_linear_configs(dtype, "sm_90", M, N, K)
    assert stated(configs, "TMA") == (set() if dtype == torch.float32 else {True})
    x, norm, weight, bias = make(M, K, N, dtype, device)
    moments = reference.moments(x).float()
    folded = fold(norm, weight, bias, dtype)[:4]
    expected = reference.linear(reference.layernorm(x, norm.weight, norm.bias, norm.eps), weight, bias)
    expected, same_dtype = reference.gelu_tanh(expected), F.linear(norm(x), weight, bias)
    same_dtype = F.gelu(same_dtype, approximate="tanh")
    check(configs, lambda c: [layernorm_linear(x, moments, *folded, "tanh", config=c)], expected, same_dtype)


@pytest.mark.parametrize("M", [37, 70])
def test_patch_embed(M, dtype, backend, device):
    configs = patch_embed_configs(dtype, "sm_90", M, 72, 108)
    torch.manual_seed(M)
    p, D = 6, 72
    pixels = torch.randn(1, 3, p, p * M).to(device, dtype)
    weight = (torch.randn(D, 3 * p * p) / 10).to(device, dtype)
    weight[:, -1] *= 8
    bias, position = torch.randn(D).to(device, dtype), reference.outliers(M, D).to(device, dtype)
    expected = reference.patch_embed(pixels, weight.view(D, 3, p, p), bias, position)
    same_dtype = F.linear(plain.flat_patches(pixels, p), weight, bias) + position
    check(configs, lambda c: patch_embed(pixels, weight, bias, position, p, config=c), expected, same_dtype)


def test_layernorm(dtype, backend, device):
    torch.manual_seed(0)
    x = reference.outliers(11, 1160).to(device, dtype)
    weight, bias = torch.randn(1160).to(device, dtype), torch.randn(1160).to(device, dtype)
    moments = reference.moments(x).float()
    expected = reference.layernorm(x, weight, bias, 1e-6)
    same_dtype = F.layer_norm(x, (1160,), weight, bias, 1e-6)
    launch = lambda c: [layernorm(x, moments, weight, bias, 1e-6, config=c)]  # noqa: E731
    check(layernorm_configs(), launch, expected, same_dtype)


@pytest.mark.parametrize("d", [64, 72, 96])
def test_attention(d, dtype, backend, device):
    """Every real score is far below the 0 of a key that is not there."""
    configs = attention_configs(dtype, "sm_90", 1, 133, 1, d)
    two_slices = head_slices(d)[1] > 0 and dtype != torch.float32
    assert stated(configs, "PAD") == ({True} if two_slices else set())
    torch.manual_seed(d)
    qkv = torch.randn(1, 133, 3, 1, d) * 0.1
    qkv[:, :, 0] += 2
    qkv[:, :, 1] -= 2
    qkv[:, :, 2] += 5
    qkv = qkv.to(device, dtype)
    expected, same_dtype = reference.attention(qkv), sdpa(qkv)
    check(configs, lambda c: [attention(qkv, c)], expected, same_dtype)


def test_attention_pool(dtype, backend, device):
    torch.manual_seed(0)
    B, N, D, H = 3, 37, 168, 3
    y = reference.outliers(B, N, D).to(device, dtype)
    scores = (torch.randn(H, D) * 1e-3).to(device)
    weight, bias = (torch.randn(D, D) * D**-0.5).to(device, dtype), torch.randn(D).to(device, dtype)
    pool = Pool(scores, Linear(weight, bias))
    p = torch.softmax(y.double() @ scores.double().T, dim=1)
    pooled = torch.einsum("bnh,bnk->bhk", p, y.double())
    expected = torch.einsum("bhk,hdk->bhd", pooled, weight.double().unflatten(0, (H, -1))).flatten(1)
    expected += bias.double()
    launch = lambda c: [attention_pool(y, scores, weight, bias, c)]  # noqa: E731
    configs = attention_pool_configs(dtype, "", B, N)
    assert {-(-N // config["pool"]["BLOCK_N"]) for config in configs} == {1, 2, 3}  # splits
    check(configs, launch, expected, plain.attention_pool(y, pool))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lists(arch, dtype, backend):
    """The default first, nothing twice, and tensor descriptors and one stage only where they can be."""
    described = arch in ("sm_90", "sm_100", "sm_120") and dtype != torch.float32
    for M in (1, 196, 12544):
        configs = linear_residual_configs(dtype, arch, M, 768, 3072)
        assert len({str(sorted(config.items(), key=str)) for config in configs}) == len(configs)
        assert configs[0] == gemm_default(dtype, arch, M, 768, 3072, tma=True, split=True)
        assert stated(configs, "TMA") == ({True} if described else set())
        assert stated(configs, "PERSISTENT") == ({True} if described and arch != "sm_120" and M > 64 else set())
        assert bool(stated(configs, "SPLIT_K")) == (M < 12544)
        assert (1 in stated(configs, "num_stages")) == arch.startswith("gfx9")
