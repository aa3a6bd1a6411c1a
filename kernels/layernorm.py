"""LayerNorm of rows whose moments are already known (Ba, Kiros & Hinton 2016).

    out = (x − mean) · rstd · γ + β

x, out [M, D], γ, β [D] in bf16, fp16 or fp32; row moments fp32 (see moments.py). One read and one write of x.
"""

import torch
import triton
import triton.language as tl

from .gemm import device_guard
from .launch import empty, launch
from .moments import read_moments

CONFIG = {"BLOCK_M": 8, "BLOCK_N": 256, "num_warps": 4}


@triton.jit(do_not_specialize=["M"])
def _layernorm_kernel(
    x_ptr,
    moments_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mean, rstd = read_moments(moments_ptr, rows, M, D, eps)
    # [BLOCK_N]
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    # [BLOCK_M, BLOCK_N]
    mask = (rows[:, None] < M) & (columns[None, :] < D)
    offsets = rows[:, None] * D + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def layernorm_configs() -> list[dict[str, int]]:
    """Candidates, the default first."""
    tiles = [(1, 1024, 4), (2, 512, 4), (4, 256, 4), (4, 512, 4), (8, 128, 4), (8, 512, 8), (16, 128, 8)]
    return [CONFIG, *({"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps} for m, n, warps in tiles)]


def layernorm(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`[..., D]` → `[..., D]`."""
    D = x.shape[-1]
    M = x.numel() // D
    out = empty(x.shape, x.dtype, x.device)
    config = config or CONFIG
    grid = (-(-M // config["BLOCK_M"]), -(-D // config["BLOCK_N"]))
    with device_guard(x):
        launch(_layernorm_kernel, grid, x, moments, weight, bias, out, M, eps, D=D, **config)
    return out
