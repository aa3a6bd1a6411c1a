"""A linear projection, its bias, the residual, and the row moments of the result, in one GEMM.

    out = x · Wᵀ + b (+ residual)

x [M, K], W [N, K], b [N], residual and out [M, N], all of one dtype (bf16, fp16 or fp32), rounded once at the end, but
residual and out may be fp32 beside 16 bits, as torch.autocast keeps them;
moments fp32 [M, 2, ceil(N / 64)] of the rounded result (see moments.py). With SPLIT_K > 1 in the configuration, for
so few rows that the tiles would not fill the GPU, the GEMM leaves fp32 sums over parts of K, and a second kernel
(residual_epilogue.py) adds them up in order and does the rest: the same bits every time, which atomics do not give.
"""

import math

import torch
import triton
import triton.language as tl

from .gemm import (
    default_config,
    device_guard,
    gemm_grid,
    gemm_operands,
    halves,
    input_precision,
    main_loop,
    multiprocessors,
    next_step,
    persistent_steps,
    tile_origin,
)
from .launch import empty, launch
from .moments import MOMENT_BLOCK, empty_moments, write_moments
from .residual_epilogue import residual_epilogue_into
from .tiles import default_first, gemm_configs, gemm_default, split_tiles, tma_configs, whole_waves


@triton.jit
def _finish(
    acc,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    row,
    column,
    M,
    N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if BLOCK_N > MOMENT_BLOCK:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _finish(left, bias_ptr, residual_ptr, out_ptr, moments_ptr, row, column, M, N, HAS_RESIDUAL, BLOCK_M, HALF)
        _finish(
            right, bias_ptr, residual_ptr, out_ptr, moments_ptr, row, column + HALF, M, N, HAS_RESIDUAL, BLOCK_M, HALF
        )
    else:
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        mask = (rows[:, None] < M) & (columns[None, :] < N)
        offsets = rows[:, None] * N + columns[None, :]
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        out = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, out, mask=mask)
        write_moments(moments_ptr, out.to(tl.float32), rows, columns, M, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M"])
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
    PERSISTENT: tl.constexpr = False,
):
    """With SPLIT_K > 1, out_ptr takes fp32 partial sums `[SPLIT_K, M, N]`, and the rest is left to the epilogue."""
    if PERSISTENT:
        BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
        tile = tl.program_id(0) - tl.num_programs(0)
        block = BLOCKS - 1
        row = tl.cast(0, tl.int64)
        column = 0
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for _ in range(0, persistent_steps(M, N, BLOCKS, BLOCK_M, BLOCK_N)):
            tile, block, row, column, x, w = next_step(
                x_ptr, w_ptr, tile, block, row, column, M, N, K, BLOCKS, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA
            )  # fmt: skip
            acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
            if block == BLOCKS - 1:
                _finish(
                    acc, bias_ptr, residual_ptr, out_ptr, moments_ptr, row, column, M, N, HAS_RESIDUAL,
                    BLOCK_M, BLOCK_N,
                )  # fmt: skip
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    else:
        row, column = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
        # [BLOCK_M, BLOCK_N]
        acc = main_loop(
            x_ptr, w_ptr, row, column, M, N, K, K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            SPLIT_K=SPLIT_K, TMA=TMA,
        )  # fmt: skip
        if SPLIT_K > 1:
            rows = row + tl.arange(0, BLOCK_M)
            columns = column + tl.arange(0, BLOCK_N)
            mask = (rows[:, None] < M) & (columns[None, :] < N)
            offsets = rows[:, None] * N + columns[None, :]
            tl.store(out_ptr + tl.program_id(1).to(tl.int64) * M * N + offsets, acc, mask=mask)
        else:
            _finish(
                acc, bias_ptr, residual_ptr, out_ptr, moments_ptr, row, column, M, N, HAS_RESIDUAL, BLOCK_M, BLOCK_N
            )  # fmt: skip


def linear_residual_configs(dtype: torch.dtype, arch: str, M: int, N: int, K: int) -> list[dict[str, int]]:
    """Candidates for an `[M, K]` by `[N, K]` product, the default first."""
    configs, tma = gemm_configs(dtype, arch, M), tma_configs(dtype, arch, M, K)
    # at most two waves on the 132 SMs of an H100
    split = [tile for tile in split_tiles(configs[:3] + tma[:3], K) if math.prod(gemm_grid(M, N, tile)) <= 264]
    return default_first(gemm_default(dtype, arch, M, N, K, tma=True, split=True), configs + tma + split)


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
    out = empty((*x.shape[:-1], N), dtype, x.device)
    moments = empty_moments(M, N, x.device)
    with device_guard(x):
        config = dict(config or default_config(x, weight, split=True))
        tail = config.pop("TAIL", None)
        rows = whole_waves(config, multiprocessors(), M, N) if tail else M
        for part, tile in ((slice(rows), config), (slice(rows, None), tail)):
            of_x, of_residual, of_out = (
                None if t is None else t.view(M, t.shape[-1])[part] for t in (x, residual, out)
            )
            if len(of_x):
                _launch(of_x, weight, bias, of_residual, of_out, moments[part], tile)
    return out, moments


def _launch(x, weight, bias, residual, out, moments, config: dict[str, int]) -> None:
    """Of `x [M, K]`, residual and out `[M, N]`."""
    M, (N, K) = len(x), weight.shape
    splits = config.get("SPLIT_K", 1)
    x_operand, w_operand = gemm_operands(x, weight, config)
    sums = empty((splits, M, N), torch.float32, x.device) if splits > 1 else out
    launch(
        _linear_residual_kernel,
        gemm_grid(M, N, config),
        x_operand,
        w_operand,
        bias,
        residual,
        sums,
        None if splits > 1 else moments,
        M,
        N=N,
        K=K,
        HAS_RESIDUAL=residual is not None,
        INPUT_PRECISION=input_precision(x.dtype),
        **config,
    )
    if splits > 1:
        residual_epilogue_into(sums, bias, residual, out, moments)
