"""The operations as torch.autocast wants them: weights in 16 bits, the residual stream in float32.

Each against float64, by the accuracy rule: PyTorch's own error is that of what stock computes under autocast.
"""

import pytest
import reference
import torch
from test_layernorm_linear import fold, make
from torch.nn import functional as F

from siglip_fast.ops import Linear, Ops, PatchEmbedding


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


def stream(*shape: int, device: str) -> torch.Tensor:
    """Float32, so far from zero that rounding it to 16 bits as it is would leave little of the deviations."""
    return (torch.randn(shape) + 100).to(device)


@pytest.mark.parametrize("M, K, N", [(37, 72, 136), (196, 768, 96)])
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
def test_layernorm_linear(M, K, N, gelu, dtype, backend, device):
    _, norm, weight, bias = make(M, K, N, torch.float32, device)
    x = stream(M, K, device=device)
    folded = fold(norm, weight, bias, backend, tokens=M)
    folded16 = fold(norm, weight.to(dtype), bias, backend, tokens=M)
    assert folded.weight.dtype == torch.float32 and folded16.weight.dtype == dtype
    moments = reference.moments(x).float() if backend == "triton" else None
    out = Ops(backend).layernorm_linear(x, moments, folded16, "tanh" if gelu else None)
    expected = reference.linear(reference.layernorm(x, norm.weight, norm.bias, norm.eps), weight, bias)
    same_dtype = F.linear(norm(x).to(dtype), weight.to(dtype), bias.to(dtype))
    if gelu:
        expected, same_dtype = reference.gelu_tanh(expected), F.gelu(same_dtype, approximate="tanh")
    reference.assert_accurate(out, expected, same_dtype)


@pytest.mark.parametrize("M, K, N", [(37, 104, 136), (196, 96, 768)])
def test_linear_residual(M, K, N, dtype, backend, device):
    torch.manual_seed(M)
    x, weight = torch.randn(M, K).to(device, dtype), torch.randn(N, K).to(device, dtype)
    bias, residual = torch.randn(N).to(device, dtype), stream(M, N, device=device)
    ops = Ops(backend)
    out, moments = ops.linear_residual(x, ops.pack(Linear(weight, bias), M), residual)
    expected = reference.linear(x, weight, bias) + residual.double()
    reference.assert_accurate(out, expected, F.linear(x, weight, bias) + residual)
    if moments is not None:
        assert reference.relative_error(moments, reference.moments(out)) < 1e-6


def test_split_k(dtype, device):
    """The partial sums of the configurations with SPLIT_K get the residual in another kernel."""
    from siglip_fast.kernels.linear_residual import linear_residual
    from siglip_fast.kernels.tiles import gemm_tile

    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly: run under ttsem or on a GPU")
    torch.manual_seed(0)
    x, weight = torch.randn(37, 520).to(device, dtype), torch.randn(72, 520).to(device, dtype)
    bias, residual = torch.randn(72).to(device, dtype), stream(37, 72, device=device)
    config = gemm_tile(64, 64, 64, 4, 2, SPLIT_K=2)
    out, moments = linear_residual(x, weight, bias, residual, config)
    expected = reference.linear(x, weight, bias) + residual.double()
    assert out.dtype == torch.float32
    assert reference.relative_error(out, expected) < 1e-6  # neither the partial sums nor their total are rounded
    assert reference.relative_error(moments, reference.moments(out)) < 1e-6


def test_patch_embed(dtype, backend, device):
    torch.manual_seed(0)
    weight, bias = torch.randn(72, 3, 8, 8).to(device, dtype), torch.randn(72).to(device, dtype)
    pixels, position = torch.randn(2, 3, 24, 16).to(device), stream(6, 72, device=device)
    ops = Ops(backend)
    out, _ = ops.patch_embed(pixels, ops.pack(PatchEmbedding(weight.flatten(1), bias, 8), 6), position)
    conv = F.conv2d(pixels.to(dtype), weight, bias, stride=8).flatten(2).transpose(1, 2)
    expected = reference.patch_embed(pixels.to(dtype), weight, bias, position)
    reference.assert_accurate(out, expected, conv + position)


def test_vendor_routes(dtype, device):
    """What tuning may choose keeps to the same dtypes."""
    from siglip_fast.backends import vendor

    _, norm, weight, bias = make(37, 72, 136, torch.float32, device)
    x = stream(37, 72, device=device)
    folded = fold(norm, weight.to(dtype), bias, "torch", tokens=37)
    assert vendor.layernorm_linear(x, None, folded, "tanh", None).dtype == dtype
    pixels, position = torch.randn(1, 3, 8, 8).to(device), stream(1, 64, device=device)
    patch = PatchEmbedding(torch.randn(64, 192).to(device, dtype), torch.randn(64).to(device, dtype), 8)
    tokens, _ = vendor.patch_embed(pixels, patch, position)
    conv = F.linear(pixels.flatten(1).to(dtype), patch.weight, patch.bias)
    torch.testing.assert_close(tokens, (conv + position)[None], rtol=0, atol=0)
    linear = Linear(weight.to(dtype), bias.to(dtype))
    out, moments = vendor.linear_residual(x.to(dtype), linear, residual := stream(37, 136, device=device))
    assert torch.equal(out, F.linear(x.to(dtype), *linear[:2]) + residual)
    assert reference.relative_error(moments, reference.moments(out)) < 1e-6


def test_another_dtype_is_refused(backend, device):
    ops, other = Ops(backend), torch.zeros(4, 64, device=device, dtype=torch.float16)
    linear = Linear(*(torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in [(64, 32), 64]))
    x = torch.zeros(4, 32, device=device, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="residual: expected torch.bfloat16 or torch.float32"):
        ops.linear_residual(x, linear, other)
