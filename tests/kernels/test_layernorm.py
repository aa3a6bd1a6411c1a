"""layernorm against float64."""

import pytest
import reference
import torch
from torch.nn import functional as F

from siglip_fast.ops import Norm, Ops


@pytest.mark.parametrize("M, D", [(1, 768), (197, 1152), (33, 1536), (3, 72), (17, 40)])
def test_accuracy(M, D, dtype, backend, device):
    torch.manual_seed(M + D)
    x = reference.outliers(M, D).to(device, dtype)
    norm = Norm(torch.randn(D).to(device, dtype), torch.randn(D).to(device, dtype), 1e-6)
    moments = reference.moments(x).float() if backend == "triton" else None
    out = Ops(backend).layernorm(x, moments, norm)
    expected = reference.layernorm(x, *norm)
    reference.assert_accurate(out, expected, F.layer_norm(x, (D,), *norm))


def test_constant_rows_are_the_bias(dtype, backend, device):
    """Variance 0: eps alone is under the root."""
    x = torch.full((4, 128), 3.0).to(device, dtype)
    norm = Norm(torch.ones(128).to(device, dtype), torch.linspace(-1, 1, 128).to(device, dtype), 1e-6)
    moments = reference.moments(x).float() if backend == "triton" else None
    out = Ops(backend).layernorm(x, moments, norm)
    torch.testing.assert_close(out, norm.bias.expand(4, 128), rtol=0, atol=1e-3)


@pytest.mark.parametrize("M, rows", [(9, [8, 0, 3, 3, 8]), (2, [1, 0] * 20 + [1])], ids=["some", "more-than-there-are"])
def test_rows(M, rows, dtype, backend, device):
    torch.manual_seed(M)
    x = (reference.outliers(M, 136) * torch.arange(1, M + 1)[:, None]).to(device, dtype)
    norm = Norm(torch.randn(136).to(device, dtype), torch.randn(136).to(device, dtype), 1e-6)
    moments = reference.moments(x).float() if backend == "triton" else None
    out = Ops(backend).layernorm(x, moments, norm, torch.tensor(rows, dtype=torch.int32).to(device))
    reference.assert_accurate(out, reference.layernorm(x[rows], *norm), F.layer_norm(x[rows], (136,), *norm))
