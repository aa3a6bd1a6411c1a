"""The rotation of Q and K in layernorm_linear against complex numbers in float64."""

import pytest
import reference
import torch
from siglip_fast.kernels.layernorm_linear import layernorm_linear
from test_layernorm_linear import fold, make, moments_of
from test_tiles import TILE, two_multiprocessors  # noqa: F401
from torch.nn import functional as F

from siglip_fast.backends import torch as plain
from siglip_fast.ops import Ops, Rotation

SIDE = 50


def rotation_of(M: int, d: int, device) -> Rotation:
    """Each row at another place, other on either axis; angles of any size, other for each pair."""
    angles = torch.arange(SIDE)[:, None] * 10000 ** (-torch.arange(d // 4) * 4 / d)
    place = torch.randint(0, SIDE, (M, 2), dtype=torch.int32)
    place[-1] = torch.tensor([SIDE - 1, 1])
    return Rotation(torch.stack([angles.cos(), angles.sin()], -1).float().to(device), place.to(device))


def turned(qkv, rotation, heads):
    """`[M, 3·H·d]` in float64."""
    table, place = (t.double().cpu() for t in rotation)
    cos, sin = (table[place.long(), :, i].flatten(1)[:, None, :] for i in (0, 1))  # [M, 1, d / 2]
    q, k, v = qkv.cpu().unflatten(1, (3, heads, -1)).unbind(1)
    pairs = [(x[..., 0::2], x[..., 1::2]) for x in (q, k)]
    q, k = (torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2) for a, b in pairs)
    return torch.stack([q, k, v], 1).flatten(1).to(qkv.device)


@pytest.mark.parametrize("d, heads", [(64, 2), (72, 2), (80, 1), (96, 3)])
def test_accuracy(d, heads, dtype, backend, device):
    """Parts of columns that begin within a head, and one that holds both K and V."""
    M, D = 37, 72
    x, norm, weight, bias = make(M, D, 3 * heads * d, dtype, device)
    rotation = rotation_of(M, d, device)
    folded = fold(norm, weight, bias, backend, tokens=M)
    out = Ops(backend).layernorm_linear(x, moments_of(x, backend), folded, rotation=rotation)
    qkv = reference.linear(reference.layernorm(x, norm.weight, norm.bias, norm.eps), weight, bias)
    same_dtype = plain.rotated(F.linear(norm(x), weight, bias), rotation)
    reference.assert_accurate(out, turned(qkv, rotation, heads), same_dtype)


@pytest.mark.parametrize("more", [{"PERSISTENT": True}, {"PERSISTENT": True, "TMA": True}, {"TMA": True}], ids=str)
@pytest.mark.parametrize("backend", ["triton"])
def test_other_forms(more, dtype, backend, device, two_multiprocessors):  # noqa: F811
    """Persistent programs, tensor descriptors: the bits of the plain one."""
    if dtype == torch.float32:
        pytest.skip("16-bit dtypes only")
    M, D, d, heads = 65, 104, 72, 1
    x, norm, weight, bias = make(M, D, 3 * heads * d, dtype, device)
    folded, rotation = fold(norm, weight, bias, backend, tokens=M)[:4], rotation_of(M, d, device)
    one, other = (
        layernorm_linear(x, moments_of(x, backend), *folded, None, rotation, TILE | form) for form in ({}, more)
    )
    assert torch.equal(one, other)
