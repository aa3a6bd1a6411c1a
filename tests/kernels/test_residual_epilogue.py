"""residual_epilogue against sums in float64: after a vendor's GEMM, and alone for the moments."""

import pytest
import reference
import torch
from siglip_fast.kernels.residual_epilogue import residual_epilogue
from torch.nn import functional as F

pytestmark = pytest.mark.parametrize("backend", ["triton"])


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(2, 65, 768), (1, 3, 100), (5, 40)], ids=str)
def test_after_a_gemm(shape, with_bias, dtype, backend, device):
    torch.manual_seed(sum(shape))
    y, residual = torch.randn(shape).to(device, dtype), reference.outliers(*shape).to(device, dtype)
    bias = (torch.randn(shape[-1]) * 8).to(device, dtype) if with_bias else None
    out, moments = residual_epilogue(y[None], bias, residual, dtype)
    expected, same_dtype = y.double() + residual.double(), y + residual
    if with_bias:
        expected, same_dtype = expected + bias.double(), y + bias + residual
    reference.assert_accurate(out, expected, same_dtype)
    assert reference.relative_error(moments, reference.moments(out)) < 1e-6
    assert reference.relative_error(moments[:, 1], reference.moments(out)[:, 1]) < 1e-5


def test_with_addmm_it_is_linear_residual(dtype, backend, device):
    torch.manual_seed(0)
    x, residual = torch.randn(37, 136).to(device, dtype), torch.randn(37, 200).to(device, dtype)
    weight, bias = torch.randn(200, 136).to(device, dtype), torch.randn(200).to(device, dtype)
    y = torch.addmm(bias, x, weight.T)
    out, moments = residual_epilogue(y[None], None, residual, dtype)
    expected = reference.linear(x, weight, bias) + residual.double()
    reference.assert_accurate(out, expected, F.linear(x, weight, bias) + residual)
    assert reference.relative_error(moments, reference.moments(out)) < 1e-6


def test_moments_alone(dtype, backend, device):
    """Nothing to add or round: the tensor itself comes back, and is not written."""
    torch.manual_seed(0)
    x = reference.outliers(2, 33, 100).to(device, dtype)
    before = x.clone()
    out, moments = residual_epilogue(x[None], None, None, dtype)
    assert out.data_ptr() == x.data_ptr() and out.shape == x.shape and torch.equal(x, before)
    assert reference.relative_error(moments, reference.moments(x)) < 1e-6


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_partials_are_summed_in_fp32_and_rounded_once(splits, dtype, backend, device):
    torch.manual_seed(splits)
    partials = torch.randn(splits, 11, 200)
    partials[-1] *= 8
    partials, bias = partials.to(device), torch.randn(200).to(device, dtype)
    out, moments = residual_epilogue(partials, bias, None, dtype)
    expected = partials.double().sum(0) + bias.double()
    assert out.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 1.01 * torch.finfo(dtype).eps / 2
    assert ((out.double() - expected).abs() <= rounding * (expected.abs() + 1)).all()
    assert reference.relative_error(moments, reference.moments(out)) < 1e-6
