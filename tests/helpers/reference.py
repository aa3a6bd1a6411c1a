"""The mathematics of the tower in float64 and plain torch, the accuracy rule, and inputs that make mistakes visible."""

import torch
from torch import Tensor
from torch.nn import functional as F


def patch_embed(pixel_values, weight, bias, position):
    """weight as the convolution has it, `[D, C, p, p]`."""
    out = F.conv2d(pixel_values.double(), weight.double(), bias.double(), stride=weight.shape[-1])
    return out.flatten(2).transpose(1, 2) + position.double()


def layernorm(x, weight, bias, eps):
    x = x.double()
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight.double() + bias.double()


def linear(x, weight, bias):
    return x.double() @ weight.double().T + bias.double()


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def attention(qkv, keys=None):
    q, k, v = (t.double().transpose(1, 2) for t in qkv.unbind(2))
    k, v = k[:, :, :keys], v[:, :, :keys]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def moments(x):
    """`[M, 2, ceil(D / 64)]`: mean and M2 of each block of 64 columns."""
    blocks = x.double().flatten(0, -2).split(64, dim=-1)
    mean = torch.stack([b.mean(-1) for b in blocks], 1)
    m2 = torch.stack([(b - b.mean(-1, keepdim=True)).square().sum(-1) for b in blocks], 1)
    return torch.stack([mean, m2], 1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius norm of the difference; NaN (which no bound admits) if either holds one."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_accurate(actual: Tensor, expected: Tensor, torch_same_dtype: Tensor) -> None:
    """The accuracy rule: at most twice PyTorch's own error in the same dtype, plus 1e-6."""
    assert actual.shape == expected.shape
    assert actual.dtype == torch_same_dtype.dtype
    error, bound = relative_error(actual, expected), 2 * relative_error(torch_same_dtype, expected) + 1e-6
    assert error <= bound, f"relative error {error:.3g}, allowed {bound:.3g}"


def outliers(*shape: int) -> Tensor:
    """Residual-stream-like rows: every channel far from zero, and three, the last among them, that dwarf the rest."""
    x = torch.randn(shape) + 10
    for channel in (shape[-1] // 7, shape[-1] // 2, shape[-1] - 1):
        x[..., channel] *= 100
    return x
