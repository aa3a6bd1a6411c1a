"""LayerNorm, a linear projection and GELU or a rotation in one GEMM; and the same without LayerNorm.

    out = rstd · (x · W'ᵀ − mean · c) + b'        W' = round(W · diag(γ)), c = rowsum(W'), b' = W·β + b

which is LN(x)·Wᵀ + b with the affine LayerNorm folded into the weights: the main loop is a plain GEMM on the raw
residual stream, the normalisation is four instructions of the epilogue. c has to be summed from the rounded W', or
mean · c would not cancel what the mean contributes to x · W'ᵀ. In fp32, which has no rounding to hide behind and where
TF32 would round x around its mean, the main loop runs on x − mean instead.

x [M, K], W' [N, K], out [M, N] in bf16, fp16 or fp32; c, b' [N] and the row moments (see moments.py) in fp32. Beside W'
and out in 16 bits x may be fp32, as torch.autocast keeps it: then x − mean is what gets rounded.

A row of x may be several rows of the stream, side by side, each with moments of its own, normalised together. GELU has
three forms (gemm.py); the rotation is that of Q and K (rotation.py). Without LayerNorm, out = x·Wᵀ + b.
"""

import torch
import triton
import triton.language as tl

from .gemm import (
    default_config,
    device_guard,
    gelu,
    gemm_grid,
    gemm_operands,
    gpu_arch,
    halves,
    input_precision,
    main_loop,
    next_step,
    persistent_steps,
    tile_origin,
)
from .launch import empty, launch
from .moments import read_moments
from .rotation import rotate
from .tiles import default_first, gemm_configs, gemm_default, tma_configs


@triton.jit
def _finish(
    acc,
    mean,
    rstd,
    colsum_ptr,
    bias_ptr,
    table_ptr,
    place_ptr,
    out_ptr,
    row,
    column,
    M,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_N: tl.constexpr,
):
    """Normalise, add the bias, apply GELU or rotate, and store, PART_N columns at a time."""
    if BLOCK_N > PART_N:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _finish(
            left, mean, rstd, colsum_ptr, bias_ptr, table_ptr, place_ptr, out_ptr, row, column, M, N, ACTIVATION,
            HEAD_DIM, BLOCK_M, HALF, PART_N,
        )  # fmt: skip
        _finish(
            right, mean, rstd, colsum_ptr, bias_ptr, table_ptr, place_ptr, out_ptr, row, column + HALF, M, N,
            ACTIVATION, HEAD_DIM, BLOCK_M, HALF, PART_N,
        )  # fmt: skip
    else:
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        # [BLOCK_N]
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        if colsum_ptr is not None:
            colsum = tl.load(colsum_ptr + columns, mask=columns < N, other=0.0)
            acc -= mean[:, None] * colsum[None, :]
        # [BLOCK_M, BLOCK_N]
        out = rstd[:, None] * acc + bias[None, :]
        if place_ptr is not None:
            out = rotate(out, table_ptr, place_ptr, rows, columns, M, N, HEAD_DIM, BLOCK_M, BLOCK_N)
        out = gelu(out, ACTIVATION)
        mask = (rows[:, None] < M) & (columns[None, :] < N)
        tl.store(out_ptr + rows[:, None] * N + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mean_and_rstd(moments_ptr, row, M, K: tl.constexpr, eps, MERGED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the rows of a tile, fp32 `[BLOCK_M]` each: 0 and 1 where there is no LayerNorm."""
    if moments_ptr is None:
        mean, rstd = tl.zeros([BLOCK_M], dtype=tl.float32), tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        rows = row + tl.arange(0, BLOCK_M)
        mean, rstd = read_moments(moments_ptr, rows, rows < M, K, eps, MERGED)
    return mean, rstd


@triton.jit(do_not_specialize=["M"])
def _layernorm_linear_kernel(
    x_ptr,
    moments_ptr,
    w_ptr,
    colsum_ptr,
    bias_ptr,
    table_ptr,
    place_ptr,
    out_ptr,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MERGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr = False,
    PERSISTENT: tl.constexpr = False,
    SELECT: tl.constexpr = True,
    PART_N: tl.constexpr = 32,
):
    """PART_N: how many columns the epilogue works on at once; on gfx11 parts spill.

    SELECT: how a persistent program clears its sums. In a branch ptxas for Hopper copies registers, which costs 2 % of
    fc1; Triton for Blackwell fails on the selection; and linear_residual has no register left for it."""
    if PERSISTENT:
        tl.static_assert(not CENTRED, "persistent programs do not take the mean out before the product")
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
                mean, rstd = _mean_and_rstd(moments_ptr, row, M, K, eps, MERGED, BLOCK_M)
                _finish(
                    acc, mean, rstd, colsum_ptr, bias_ptr, table_ptr, place_ptr, out_ptr, row, column, M, N,
                    ACTIVATION, HEAD_DIM, BLOCK_M, BLOCK_N, PART_N,
                )  # fmt: skip
                if not SELECT:
                    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            if SELECT:
                acc = tl.where(block == BLOCKS - 1, 0.0, acc)
    else:
        row, column = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
        # [BLOCK_M] each. Before the loop only where it needs them: it would hold them in registers.
        if CENTRED:
            mean, rstd = _mean_and_rstd(moments_ptr, row, M, K, eps, MERGED, BLOCK_M)
        # [BLOCK_M, BLOCK_N]
        acc = main_loop(
            x_ptr, w_ptr, row, column, M, N, K, K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            mean if CENTRED else None, TMA=TMA,
        )  # fmt: skip
        if not CENTRED:
            mean, rstd = _mean_and_rstd(moments_ptr, row, M, K, eps, MERGED, BLOCK_M)
        _finish(
            acc, mean, rstd, colsum_ptr, bias_ptr, table_ptr, place_ptr, out_ptr, row, column, M, N, ACTIVATION,
            HEAD_DIM, BLOCK_M, BLOCK_N, PART_N,
        )  # fmt: skip


def layernorm_linear_configs(dtype: torch.dtype, arch: str, M: int, N: int, K: int) -> list[dict[str, int]]:
    """Candidates for an `[M, K]` by `[N, K]` product, the default first."""
    configs = gemm_configs(dtype, arch, M) + tma_configs(dtype, arch, M, K)
    return default_first(gemm_default(dtype, arch, M, N, K, tma=True), configs)


def layernorm_linear(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor,
    colsum: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: str | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`[..., K]` → `[..., N]`; moments of as many rows, or of r times as many, each K / r long. Rotation: its table and
    places."""
    return _launch(x, moments, weight, colsum, bias, eps, activation, rotation, config)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    activation: str | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`[..., K]` → `[..., N]` without LayerNorm, all of one dtype."""
    return _launch(x, None, weight, None, bias, 0.0, activation, None, config)


def _launch(x, moments, weight, colsum, bias, eps, activation, rotation, config) -> torch.Tensor:
    N, K = weight.shape
    M = x.numel() // K
    # In fp32 the mean is taken out before the product: after it, its rounding error would stay behind.
    centred = moments is not None and x.dtype == torch.float32
    table, place = rotation or (None, None)
    out = empty((*x.shape[:-1], N), weight.dtype, x.device)
    with device_guard(x):
        config = config or default_config(x, weight)
        x_operand, w_operand = gemm_operands(x, weight, config)
        launch(
            _layernorm_linear_kernel,
            gemm_grid(M, N, config),
            x_operand,
            moments,
            w_operand,
            None if centred else colsum,
            bias,
            table,
            place,
            out,
            M,
            eps,
            N=N,
            K=K,
            CENTRED=centred,
            ACTIVATION=activation,
            MERGED=1 if moments is None else max(1, len(moments) // max(1, M)),
            HEAD_DIM=0 if table is None else 4 * table.shape[1],
            INPUT_PRECISION=input_precision(x.dtype),
            SELECT=not gpu_arch().startswith(("sm_10", "sm_11")),
            PART_N=128 if gpu_arch().startswith("gfx11") else 32,
            **config,
        )
    return out
