"""A linear projection, its bias, the residual, and the row moments of the result, in one GEMM.

    out = x · Wᵀ + b (+ residual)

x [M, K], W [N, K], b [N], residual and out [M, N], all of one dtype (bf16, fp16 or fp32), rounded once at the end, but
residual and out may be fp32 beside 16 bits, as torch.autocast keeps them;
moments fp32 [M, 2, ceil(N / 64)] of the rounded result (see moments.py). With SPLIT_K > 1 in the configuration, for
so few rows that the tiles would not fill the GPU, the GEMM leaves fp32 sums over parts of K, and a second kernel
(residual_epilogue.py) adds them up in order and does the rest: the same bits every time, which atomics do not give.
"""

import torch
import triton
import triton.language as tl

from .gemm import (
    device_guard,
    gemm_config,
    gemm_configs,
    gemm_grid,
    gemm_operands,
    gpu_arch,
    input_precision,
    main_loop,
    tile_origin,
    tma_configs,
)
from .moments import empty_moments, write_moments
from .residual_epilogue import residual_epilogue


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
    SPLIT_K: tl.constexpr = 1,
    TMA: tl.constexpr = False,
):
    """With SPLIT_K > 1, out_ptr takes fp32 partial sums `[SPLIT_K, M, N]`, and the rest is left to the epilogue."""
    row, column = tile_origin(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    # [BLOCK_M, BLOCK_N]
    acc = main_loop(
        x_ptr, w_ptr, row, column, M, N, K, K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        SPLIT_K=SPLIT_K, TMA=TMA,
    )  # fmt: skip
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows[:, None] * N + columns[None, :]
    if SPLIT_K > 1:
        tl.store(out_ptr + tl.program_id(1).to(tl.int64) * M * N + offsets, acc, mask=mask)
    else:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, out, mask=mask)
        write_moments(moments_ptr, out.to(tl.float32), rows, columns, M, N, BLOCK_M, BLOCK_N)


def linear_residual_configs(dtype: torch.dtype, arch: str, M: int, N: int, K: int) -> list[dict[str, int]]:
    """Candidates for an `[M, K]` by `[N, K]` product, the default first."""
    configs, tma = gemm_configs(dtype, arch, M), tma_configs(dtype, arch, M, K)
    # Of 64 rows or fewer: Triton 3.6 serializes the main loop of higher ones on sm_90.
    small = [next(tile for tile in tiles if tile["BLOCK_M"] <= 64) for tiles in (configs[1:], tma) if tiles]
    split = [
        tile | {"SPLIT_K": splits}
        for tile in small
        for splits in (2, 4, 8)
        # at most two waves on the 132 SMs of an H100, and two blocks of K or more for each program
        if gemm_grid(M, N, tile)[0] * splits <= 264 and K >= 2 * splits * tile["BLOCK_K"]
    ]
    return configs + tma + split


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
    dtype = x.dtype if residual is None else residual.dtype
    with device_guard(x):
        config = config or gemm_config(x.dtype, gpu_arch())
        splits = config.get("SPLIT_K", 1)
        if splits > 1:
            out = torch.empty((splits, *x.shape[:-1], N), dtype=torch.float32, device=x.device)
            moments = None
        else:
            out = torch.empty((*x.shape[:-1], N), dtype=dtype, device=x.device)
            moments = empty_moments(M, N, x.device)
        x_operand, w_operand = gemm_operands(x, weight, config)
        _linear_residual_kernel[gemm_grid(M, N, config)](
            x_operand,
            w_operand,
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
    return residual_epilogue(out, bias, residual, dtype) if splits > 1 else (out, moments)
