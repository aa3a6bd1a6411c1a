"""What follows a GEMM that left its sums in memory: bias, residual, one rounding, and the row moments of the result.

    out = Σₛ partials[s] (+ b) (+ residual)        summed in fp32, in the order of s

partials [S, M, N], b [N], residual and out [M, N] in bf16, fp16 or fp32; moments fp32
[M, 2, ceil(N / 64)] of the rounded result (see moments.py). S > 1 fp32 partials are those of a split-K GEMM
(linear_residual.py); a vendor's GEMM leaves one, `y[None]`, and with this kernel behind it keeps the contract of
linear_residual. One read of everything and one write.
"""

import torch
import triton
import triton.language as tl

from .gemm import device_guard
from .launch import empty, launch
from .moments import empty_moments, write_moments


@triton.jit(do_not_specialize=["M"])
def _residual_epilogue_kernel(
    partials_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    moments_ptr,
    M,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows[:, None] * N + columns[None, :]
    # [BLOCK_M, BLOCK_N]
    out = tl.load(partials_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        partial_ptr = partials_ptr + tl.cast(M, tl.int64) * (split * N)
        out += tl.load(partial_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if out_ptr is not None:
        stored = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, stored, mask=mask)
        out = stored.to(tl.float32)
    write_moments(moments_ptr, out, rows, columns, M, N, BLOCK_M, BLOCK_N)


CONFIG = {"BLOCK_M": 8, "BLOCK_N": 128, "num_warps": 4}


def residual_epilogue(
    partials: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S, ..., N]` → `[..., N]` in `dtype` and its moments. Where there is nothing to do, out is partials[0] itself."""
    S, N = partials.shape[0], partials.shape[-1]
    finished = S == 1 and partials.dtype == dtype and bias is None and residual is None
    out = None if finished else empty(partials.shape[1:], dtype, partials.device)
    moments = empty_moments(partials.numel() // (S * N), N, partials.device)
    residual_epilogue_into(partials, bias, residual, out, moments)
    return partials[0] if finished else out, moments


def residual_epilogue_into(
    partials: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None,
    moments: torch.Tensor,
) -> None:
    """The same into tensors that are there; no out where there is nothing to do."""
    M, N = len(moments), partials.shape[-1]
    grid = (-(-M // CONFIG["BLOCK_M"]), -(-N // CONFIG["BLOCK_N"]))
    with device_guard(partials):
        splits = len(partials)
        launch(_residual_epilogue_kernel, grid, partials, bias, residual, out, moments, M, N=N, SPLITS=splits, **CONFIG)
