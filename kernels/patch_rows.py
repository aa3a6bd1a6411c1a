"""Patch embedding of patches that are rows already: a GEMM of gathered rows, plus bias, position embedding and row moments.

    out[m] = W · pixel_rows[rows[m]] + bias + Σ_t weight[m, t] · table[index[m, t]]        t < T, T taps of an interpolation

pixel_rows [R, K] of any float dtype, cast to the weights' in registers; rows int32 [M], or None for all in their order;
W [D, K] and bias [D] of one dtype; table [P, D] of that or fp32; index int32 [M, T]; weight fp32 [M, T], or None for ones
where T = 1. out [M, D] in the table's dtype, rounded once; moments fp32 [M, 2, ceil(D / 64)] of it (see moments.py).
"""

import torch
import triton
import triton.language as tl

from .gemm import device_guard, gemm_grid, gpu_arch, input_precision, main_loop, multiprocessors, tile_origin
from .launch import empty, launch
from .moments import empty_moments, write_moments
from .tiles import gemm_default


@triton.jit(do_not_specialize=["M"])
def _patch_rows_kernel(
    pixels_ptr,
    w_ptr,
    bias_ptr,
    rows_ptr,
    table_ptr,
    index_ptr,
    weight_ptr,
    out_ptr,
    moments_ptr,
    M,
    D: tl.constexpr,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    first_row, first_column = tile_origin(tl.program_id(0), M, D, BLOCK_M, BLOCK_N, GROUP_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_column + tl.arange(0, BLOCK_N)
    row = tl.minimum(rows, M - 1)
    source = row if rows_ptr is None else tl.load(rows_ptr + row).to(tl.int64)
    # [BLOCK_M, BLOCK_N]
    acc = main_loop(
        pixels_ptr, w_ptr, first_row, first_column, M, D, K, K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        x_rows=source,
    )  # fmt: skip
    inside = columns[None, :] < D
    acc += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    for tap in range(TAPS):  # a loop, because the loads of all taps at once would hold more registers than there are
        taken = tl.load(index_ptr + row * TAPS + tap).to(tl.int64)
        position = tl.load(table_ptr + taken[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            position *= tl.load(weight_ptr + row * TAPS + tap)[:, None]
        acc += position
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], out, mask=(rows[:, None] < M) & inside)
    write_moments(moments_ptr, out.to(tl.float32), rows, columns, M, D, BLOCK_M, BLOCK_N)


def patch_rows(
    pixel_rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    rows: torch.Tensor | None,
    table: torch.Tensor,
    index: torch.Tensor,
    tap_weight: torch.Tensor | None,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[R, K]` → `[M, D]` and its moments."""
    D, K = weight.shape
    M, taps = index.shape
    out = empty((M, D), table.dtype, weight.device)
    moments = empty_moments(M, D, weight.device)
    with device_guard(pixel_rows):
        config = config or gemm_default(weight.dtype, gpu_arch(), M, D, K, sms=multiprocessors())
        launch(
            _patch_rows_kernel,
            gemm_grid(M, D, config),
            pixel_rows,
            weight,
            bias,
            rows,
            table,
            index,
            tap_weight,
            out,
            moments,
            M,
            D=D,
            K=K,
            TAPS=taps,
            INPUT_PRECISION=input_precision(weight.dtype),
            **config,
        )
    return out, moments
