"""layernorm_linear, and linear, against LayerNorm, Linear and GELU in float64."""

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from siglip_fast.models.weights import Maker
from siglip_fast.ops import Linear, Ops

SHAPES = [  # M, K, N
    *(pytest.param(M, 768, 136, id=f"M-{M}") for M in (1, 3, 127, 128, 129, 196, 197, 729)),
    pytest.param(131, 768, 2304, id="base-qkv"),
    pytest.param(131, 768, 3072, id="base-fc1"),
    pytest.param(65, 1024, 3072, id="large-qkv"),
    pytest.param(65, 1024, 4096, id="large-fc1"),
    pytest.param(130, 1152, 3456, id="so400m-qkv"),
    pytest.param(129, 1152, 4304, id="so400m-fc1"),
    pytest.param(65, 1536, 4608, id="giant-qkv"),
    pytest.param(65, 1536, 6144, id="giant-fc1"),
    pytest.param(2100, 40, 300, id="more-row-tiles-than-a-group"),
    pytest.param(3, 72, 100, id="K-no-multiple-of-64"),
    pytest.param(131, 40, 36, id="narrower-than-a-tile"),
]


def make(M, K, N, dtype, device):
    torch.manual_seed(M + K + N)
    norm = nn.LayerNorm(K, eps=1e-6)
    nn.init.normal_(norm.weight, 1, 0.4)
    nn.init.normal_(norm.bias, 0, 0.3)
    norm = norm.to(device, dtype).requires_grad_(False)
    x = reference.outliers(M, K).to(device, dtype)
    weight = (torch.randn(N, K) * K**-0.5).to(device, dtype)
    weight[:, -1] *= 4
    bias = torch.randn(N).to(device, dtype)
    return x, norm, weight, bias


def fold(norm, weight, bias, backend, tokens):
    return Maker(Ops(backend), weight.dtype, tokens).fold(norm, weight, bias)


def moments_of(x, backend):
    return reference.moments(x).float() if backend == "triton" else None


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_accuracy(M, K, N, gelu, dtype, backend, device):
    x, norm, weight, bias = make(M, K, N, dtype, device)
    out = Ops(backend).layernorm_linear(
        x, moments_of(x, backend), fold(norm, weight, bias, backend, tokens=len(x)), "tanh" if gelu else None
    )
    expected = reference.linear(reference.layernorm(x, norm.weight, norm.bias, norm.eps), weight, bias)
    same_dtype = F.linear(norm(x), weight, bias)
    if gelu:
        expected, same_dtype = reference.gelu_tanh(expected), F.gelu(same_dtype, approximate="tanh")
    reference.assert_accurate(out, expected, same_dtype)


def test_eps_counts(dtype, backend, device):
    x, norm, weight, bias = make(3, 128, 136, dtype, device)
    x, norm.eps = (0.1 * torch.randn(3, 128)).to(device, dtype), 0.5
    out = Ops(backend).layernorm_linear(x, moments_of(x, backend), fold(norm, weight, bias, backend, tokens=len(x)))
    expected = reference.linear(reference.layernorm(x, norm.weight, norm.bias, 0.5), weight, bias)
    reference.assert_accurate(out, expected, F.linear(norm(x), weight, bias))


def test_a_mean_that_dwarfs_the_deviation(dtype, backend, device):
    """What the mean contributes to the GEMM is many times what is to remain."""
    x, norm, weight, bias = make(3, 768, 136, dtype, device)
    x = (torch.randn(3, 768) + 30).to(device, dtype)
    out = Ops(backend).layernorm_linear(x, moments_of(x, backend), fold(norm, weight, bias, backend, tokens=len(x)))
    expected = reference.linear(reference.layernorm(x, norm.weight, norm.bias, norm.eps), weight, bias)
    reference.assert_accurate(out, expected, F.linear(norm(x), weight, bias))


def test_colsum_is_summed_from_the_rounded_weight():
    """With the mean a hundred times the deviation, the unrounded sum would leave mean · (difference) behind."""
    _, norm, weight, bias = make(1, 768, 64, torch.bfloat16, "cpu")
    folded = fold(norm, weight, bias, "torch", tokens=1)
    assert folded.weight.dtype == torch.bfloat16
    torch.testing.assert_close(folded.colsum.double(), folded.weight.double().sum(1), rtol=1e-6, atol=1e-6)
    unrounded = (weight.float() * norm.weight.float()).sum(1)
    assert (folded.colsum - unrounded).abs().max() > 1e-3


def test_a_row_does_not_depend_on_its_batch(dtype, backend, device):
    if backend != "triton":
        pytest.skip("the libraries behind the torch backend choose their algorithm by the batch")
    x, norm, weight, bias = make(131, 128, 96, dtype, device)
    folded = fold(norm, weight, bias, backend, tokens=len(x))
    together = Ops(backend).layernorm_linear(x, moments_of(x, backend), folded)
    alone = Ops(backend).layernorm_linear(x[130:], moments_of(x[130:], backend), folded)
    assert torch.equal(together[130:], alone)


FORMS = {  # of the activation: in float64, and as stock computes it
    None: (lambda y: y, lambda y: y),
    "tanh": (reference.gelu_tanh, ACT2FN["gelu_pytorch_tanh"]),
    "erf": (F.gelu, ACT2FN["gelu"]),
    "quick": (reference.quick_gelu, ACT2FN["quick_gelu"]),
}


@pytest.mark.parametrize("activation", ["erf", "quick"])
@pytest.mark.parametrize("M, K, N", [(3, 128, 136), (70, 72, 100)])
def test_other_gelus(M, K, N, activation, dtype, backend, device):
    exact, stock = FORMS[activation]
    x, norm, weight, bias = make(M, K, N, dtype, device)
    folded = fold(norm, weight, bias, backend, tokens=M)
    out = Ops(backend).layernorm_linear(x, moments_of(x, backend), folded, activation)
    expected = reference.linear(reference.layernorm(x, norm.weight, norm.bias, norm.eps), weight, bias)
    reference.assert_accurate(out, exact(expected), stock(F.linear(norm(x), weight, bias)))


@pytest.mark.parametrize("activation", FORMS)
def test_activations_far_from_zero(activation, dtype, backend, device):
    """Where exponentials overflow there is no NaN: the rows are what a weight of one column passes on."""
    x = torch.tensor([-60000.0, -700.0, -30.0, -1.0, 0.0, 1.0, 30.0, 60000.0]).to(device, dtype)[:, None].repeat(1, 64)
    weight, bias = torch.zeros(64, 64, device=device, dtype=dtype), torch.zeros(64, device=device, dtype=dtype)
    weight[:, 3] = 1
    out = Ops(backend).linear(x, Linear(weight, bias), activation)
    exact, stock = FORMS[activation]
    assert out.isfinite().all()
    reference.assert_accurate(out[:7], exact(x[:7].double()), stock(x[:7]))
    assert torch.equal(out[7:], x[7:])


@pytest.mark.parametrize("merged, D", [(4, 64), (4, 192), (2, 128)])
def test_merged_rows(merged, D, dtype, backend, device):
    """Several rows of the stream side by side, of very different means and deviations, normalised as one."""
    M, K = 37, merged * D
    x, norm, weight, bias = make(M, K, 100, dtype, device)
    scale = torch.tensor([1.0, 5.0, 0.1, 20.0])[:merged]
    parts = x.float().cpu().view(M, merged, D) * scale[:, None] - 30 * scale.flip(0)[:, None]
    x = parts.reshape(M, K).to(device, dtype)
    out = Ops(backend).layernorm_linear(
        x, moments_of(x.view(-1, D), backend), fold(norm, weight, bias, backend, tokens=M), "erf"
    )
    expected = reference.linear(reference.layernorm(x, norm.weight, norm.bias, norm.eps), weight, bias)
    reference.assert_accurate(out, F.gelu(expected), F.gelu(F.linear(norm(x), weight, bias)))


@pytest.mark.parametrize("activation", FORMS)
@pytest.mark.parametrize("M, K, N", [(3, 128, 136), (70, 72, 100)])
def test_without_layernorm(M, K, N, activation, dtype, backend, device):
    x, _, weight, bias = make(M, K, N, dtype, device)
    x = (x / 300).to(dtype)  # so that GELU is more than a step
    exact, stock = FORMS[activation]
    out = Ops(backend).linear(x, Linear(weight, bias), activation)
    reference.assert_accurate(out, exact(reference.linear(x, weight, bias)), stock(F.linear(x, weight, bias)))
