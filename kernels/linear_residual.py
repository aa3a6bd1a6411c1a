"""A linear projection, its bias, the residual, and the row moments of the result, in one GEMM.

    out = x · Wᵀ + b (+ residual)

x [M, K], W [N, K], b [N], residual and out [M, N], all of one dtype (bf16, fp16 or fp32), rounded once at the end;
moments fp32 [M, 2, ceil(N / 64)] of the rounded result (see moments.py).
"""

import torch
import triton
import triton.language as tl

from .gemm import device_guard, gemm_config, gemm_grid, gpu_arch, input_precision, main_loop, tile_indices
from .moments import empty_moments, write_moments


@triton.jit
def _linear_residual_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    rows, columns = tile_indices(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # [BLOCK_M, BLOCK_N]
    acc = main_loop(x_ptr, w_ptr, rows, columns, M, N, K, K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows[:, None] * N + columns[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=mask)
    write_moments(moments_ptr, out.to(tl.float32), rows, columns, M, N, BLOCK_M, BLOCK_N)


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[..., K]`, `[..., N]` → `[..., N]` and its moments."""
    N, K = weight.shape
    M = x.numel() // K
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    moments = empty_moments(M, N, x.device)
    with device_guard(x):
        config = config or gemm_config(x.dtype, gpu_arch())
        _linear_residual_kernel[gemm_grid(M, N, config)](
            x,
            weight,
            bias,
            residual,
            out,
            moments,
            M,
            N=N,
            K=K,
            HAS_RESIDUAL=residual is not None,
            INPUT_PRECISION=input_precision(x.dtype),
            **config,
        )
    return out, moments
