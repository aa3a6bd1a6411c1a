"""LayerNorm of rows whose moments are already known (Ba, Kiros & Hinton 2016).

    out = (x − mean) · rstd · γ + β

x, out [M, D], γ, β [D] in bf16, fp16 or fp32; row moments fp32 (see moments.py). One read and one write of x. Or of x only
some rows, int32 [R], in their order: out [R, D].
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
    rows_ptr,
    out_ptr,
    M,
    eps,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = rows < M
    source = rows
    if rows_ptr is not None:
        source = tl.load(rows_ptr + rows, mask=exists, other=0).to(tl.int64)
    mean, rstd = read_moments(moments_ptr, source, exists, D, eps)
    # [BLOCK_N]
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    # [BLOCK_M, BLOCK_N]
    mask = exists[:, None] & (columns[None, :] < D)
    x = tl.load(x_ptr + source[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    out = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


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
    rows: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`[..., D]` → `[..., D]`, or of `[M, D]` these rows: `[R, D]`."""
    D = x.shape[-1]
    M = x.numel() // D if rows is None else len(rows)
    out = empty(x.shape if rows is None else (M, D), x.dtype, x.device)
    config = config or CONFIG
    grid = (-(-M // config["BLOCK_M"]), -(-D // config["BLOCK_N"]))
    with device_guard(x):
        launch(_layernorm_kernel, grid, x, moments, weight, bias, rows, out, M, eps, D=D, **config)
    return out
