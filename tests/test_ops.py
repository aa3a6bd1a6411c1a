"""Each operation refuses what breaks its contract, and says which argument and what was expected."""

import subprocess
import sys

import pytest
import torch

from siglip_fast.ops import Linear, Norm, NormedLinear, Ops, PatchEmbedding, Pool


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


patch = PatchEmbedding(tensor(32, 48), tensor(32), 4)
normed = NormedLinear(tensor(40, 32), tensor(40), tensor(40), 1e-6)
linear = Linear(tensor(40, 32), tensor(40))
pool = Pool(tensor(2, 32), Linear(tensor(32, 32), tensor(32)))
half = torch.float16

BREACHES = {
    "pixels-rank": (
        lambda ops: ops.patch_embed(tensor(3, 8, 8), patch, tensor(4, 32)),
        ValueError,
        r"pixel_values: expected shape \[any, 3, any, any\], got \[3, 8, 8\]",
    ),
    "pixels-integer": (
        lambda ops: ops.patch_embed(tensor(1, 3, 8, 8, dtype=torch.int16), patch, tensor(4, 32)),
        TypeError,
        "pixel_values: expected a floating dtype, got torch.int16",
    ),
    "position-length": (
        lambda ops: ops.patch_embed(tensor(1, 3, 8, 8), patch, tensor(5, 32)),
        ValueError,
        r"position: expected shape \[4, 32\], got \[5, 32\]",
    ),
    "normed-width": (
        lambda ops: ops.layernorm_linear(tensor(2, 5, 33), None, normed),
        ValueError,
        r"hidden_states: expected shape \[..., 32\], got \[2, 5, 33\]",
    ),
    "normed-dtype": (
        lambda ops: ops.layernorm_linear(tensor(5, 32, dtype=half), None, normed),
        TypeError,
        "hidden_states: expected torch.float32 on cpu as weight is, got torch.float16 on cpu",
    ),
    "float64": (
        lambda ops: ops.attention(tensor(1, 5, 3, 2, 16, dtype=torch.float64)),
        TypeError,
        "qkv: expected bfloat16, float16 or float32, got torch.float64",
    ),
    "qkv-packing": (
        lambda ops: ops.attention(tensor(1, 5, 2, 2, 16)),
        ValueError,
        r"qkv: expected shape \[any, any, 3, any, any\], got \[1, 5, 2, 2, 16\]",
    ),
    "residual-shape": (
        lambda ops: ops.linear_residual(tensor(5, 32), linear, tensor(5, 32)),
        ValueError,
        r"residual: expected shape \[5, 40\], got \[5, 32\]",
    ),
    "weight-layout": (
        lambda ops: ops.linear_residual(tensor(5, 32), Linear(tensor(32, 40).T, tensor(40)), None),
        ValueError,
        r"weight: expected a contiguous tensor, got strides \(1, 40\)",
    ),
    "residual-dtype": (
        lambda ops: ops.linear_residual(tensor(5, 32), linear, tensor(5, 40, dtype=half)),
        TypeError,
        "residual: expected torch.float32",
    ),
    "norm-width": (
        lambda ops: ops.layernorm(tensor(5, 31), None, Norm(tensor(32), tensor(32), 1e-6)),
        ValueError,
        r"hidden_states: expected shape \[..., 32\], got \[5, 31\]",
    ),
    "pool-rank": (
        lambda ops: ops.attention_pool(tensor(5, 32), pool),
        ValueError,
        r"hidden_states: expected shape \[any, any, 32\], got \[5, 32\]",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_breach(name, backend, device):
    if device == "cuda":
        pytest.skip("the messages are written for tensors on the CPU; the checks are the same")
    call, error, message = BREACHES[name]
    with pytest.raises(error, match=message):
        call(Ops(backend))


@pytest.mark.parametrize("moments, error", [(None, TypeError), (tensor(5, 2, 2), ValueError)])
def test_triton_needs_the_moments(moments, error, device):
    with pytest.raises(error, match="moments: expected"):
        Ops("triton").layernorm_linear(tensor(5, 32), moments, normed)


def test_fp32_dot_precision_follows_torch():
    """Legacy setting or new one; in a process of its own, because torch refuses to read one after the other."""
    code = """
import sys, torch
from siglip_fast.kernels.gemm import input_precision as precision
exec(sys.argv[1])
print(precision(torch.float32), precision(torch.bfloat16))
"""
    for setting, expected in {
        "": "ieee",
        "torch.set_float32_matmul_precision('high')": "tf32",
        "torch.set_float32_matmul_precision('medium')": "tf32",
        "torch.set_float32_matmul_precision('highest')": "ieee",
        "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
        "torch.backends.fp32_precision = 'tf32'": "tf32",
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    }.items():
        command = [sys.executable, "-c", code, setting]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert output.split() == [expected, "ieee"], setting


@pytest.mark.parametrize(
    "head_dim, widths",
    [(64, (64, 0)), (72, (64, 16)), (96, (64, 32)), (80, (64, 16)), (128, (128, 0)), (8, (16, 0)), (24, (16, 16))],
)
def test_head_slices_cover_head_dim(head_dim, widths, device):
    from siglip_fast.kernels.attention import head_slices

    assert head_slices(head_dim) == widths
    assert sum(widths) >= head_dim
