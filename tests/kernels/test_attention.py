"""attention against softmax attention in float64."""

import pytest
import reference
import torch
from siglip_fast.kernels.attention import attention
from siglip_fast.kernels.tiles import attention_default
from torch.nn import functional as F

from siglip_fast.ops import Ops

SHAPES = [  # B, N, H, d
    pytest.param(2, 196, 2, 64, id="base-224"),
    pytest.param(1, 195, 1, 64, id="base-224-less-one"),
    pytest.param(1, 197, 1, 64, id="base-224-and-one"),
    pytest.param(1, 729, 1, 72, id="so400m-384"),
    pytest.param(1, 728, 1, 72, id="so400m-384-less-one"),
    pytest.param(1, 730, 1, 72, id="so400m-384-and-one"),
    pytest.param(1, 4096, 1, 72, id="so400m-896", marks=pytest.mark.slow),
    pytest.param(1, 257, 2, 96, id="giant"),
    pytest.param(3, 1, 2, 64, id="one-token"),
    pytest.param(2, 3, 2, 72, id="fewer-tokens-than-a-block"),
    pytest.param(2, 64, 3, 80, id="exactly-one-block"),
    pytest.param(1, 129, 2, 128, id="d-128"),
    pytest.param(2, 65, 2, 32, id="d-32"),
    pytest.param(2, 65, 4, 8, id="d-8"),
    pytest.param(1, 70, 2, 24, id="d-24"),
]


ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "gfx1100"]


def same_dtype(qkv):
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize("B, N, H, d", SHAPES)
def test_accuracy(B, N, H, d, dtype, backend, device):
    torch.manual_seed(N + d)
    qkv = torch.randn(B, N, 3, H, d).to(device, dtype)
    reference.assert_accurate(Ops(backend).attention(qkv), reference.attention(qkv), same_dtype(qkv))


@pytest.mark.parametrize("B, N, H, d", SHAPES)
def test_a_phantom_key_would_dominate(B, N, H, d, dtype, backend, device):
    """Every real score is far below the 0 of a key that is not there."""
    torch.manual_seed(N + d)
    qkv = torch.randn(B, N, 3, H, d) * 0.1
    qkv[:, :, 0] += 2
    qkv[:, :, 1] -= 2
    qkv[:, :, 2] += 5
    qkv = qkv.to(device, dtype)
    reference.assert_accurate(Ops(backend).attention(qkv), reference.attention(qkv), same_dtype(qkv))


def test_scores_that_overflow_without_the_running_maximum(dtype, backend, device):
    torch.manual_seed(0)
    qkv = (torch.randn(1, 196, 3, 2, 64) * 8).to(device, dtype)
    reference.assert_accurate(Ops(backend).attention(qkv), reference.attention(qkv), same_dtype(qkv))


def test_sliced_input(dtype, backend, device):
    """A view with an offset and gaps: read as it is or copied, never misread."""
    torch.manual_seed(0)
    qkv = torch.randn(3, 70, 4, 2, 64).to(device, dtype)[1:, 1:, 1:]
    reference.assert_accurate(Ops(backend).attention(qkv), reference.attention(qkv), same_dtype(qkv))


@pytest.mark.parametrize("d", [64, 72, 96])
@pytest.mark.parametrize("backend", ["triton"])
def test_every_default_tile(d, dtype, backend, device):
    """The default tiles of all architectures, with tokens on both sides of each one's edges."""
    torch.manual_seed(d)
    qkv = torch.randn(1, 133, 3, 1, d).to(device, dtype)
    expected, peer = reference.attention(qkv), same_dtype(qkv)
    batches = (1, 64)  # for which there may be different ones
    tiles = {tuple(attention_default(dtype, arch, B, 133, 12, d).items()) for arch in ARCHITECTURES for B in batches}
    assert len(tiles) >= (1 if dtype == torch.float32 else 4)
    for tile in sorted(tiles):
        reference.assert_accurate(attention(qkv, dict(tile)), expected, peer)
