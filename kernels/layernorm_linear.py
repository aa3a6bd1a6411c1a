"""LayerNorm, a linear projection and optionally GELU-tanh in one GEMM.

    out = rstd · (x · W'ᵀ − mean · c) + b'        W' = round(W · diag(γ)), c = rowsum(W'), b' = W·β + b

which is LN(x)·Wᵀ + b with the affine LayerNorm folded into the weights: the main loop is a plain GEMM on the raw
residual stream, the normalisation is four instructions of the epilogue. c has to be summed from the rounded W', or
mean · c would not cancel what the mean contributes to x · W'ᵀ. In fp32, which has no rounding to hide behind and where
TF32 would round x around its mean, the main loop runs on x − mean instead.

x [M, K], W' [N, K], out [M, N] in bf16, fp16 or fp32; c, b' [N] and the row moments (see moments.py) in fp32. Beside W'
and out in 16 bits x may be fp32, as torch.autocast keeps it: then x − mean is what gets rounded.
"""

import torch
import triton
import triton.language as tl

from .gemm import (
    device_guard,
    gelu_tanh,
    gemm_config,
    gemm_configs,
    gemm_grid,
    gemm_operands,
    gemm_tile,
    gpu_arch,
    input_precision,
    main_loop,
    tile_origin,
    tma_configs,
)
from .moments import read_moments


@triton.jit
def _layernorm_linear_kernel(
    x_ptr,
    moments_ptr,
    w_ptr,
    colsum_ptr,
    bias_ptr,
    out_ptr,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    CENTRED: tl.constexpr,
    GELU: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr = False,
):
    row, column = tile_origin(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    # [BLOCK_M]
    mean, rstd = read_moments(moments_ptr, rows, M, K, eps)
    # [BLOCK_M, BLOCK_N]
    acc = main_loop(
        x_ptr, w_ptr, row, column, M, N, K, K, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        mean if CENTRED else None, TMA=TMA,
    )  # fmt: skip
    # [BLOCK_N]
    colsum = tl.load(colsum_ptr + columns, mask=columns < N, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0)
    if not CENTRED:
        acc -= mean[:, None] * colsum[None, :]
    out = rstd[:, None] * acc + bias[None, :]
    if GELU:
        out = gelu_tanh(out)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def layernorm_linear_configs(dtype: torch.dtype, arch: str, M: int, N: int, K: int) -> list[dict[str, int]]:
    """Candidates for an `[M, K]` by `[N, K]` product, the default first."""
    configs, tma = gemm_configs(dtype, arch, M), tma_configs(dtype, arch, M, K)
    if dtype.itemsize == 2 and M > 64:  # moments leave no registers for so many rows in the other kernels
        configs.append(gemm_tile(256, 128, 64, 8, 3))
        configs += [gemm_tile(256, 128, 64, 8, 3, TMA=True)] if tma else []
    return configs + tma


def layernorm_linear(
    x: torch.Tensor,
    moments: torch.Tensor,
    weight: torch.Tensor,
    colsum: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    gelu: bool = False,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`[..., K]` → `[..., N]`."""
    N, K = weight.shape
    M = x.numel() // K
    out = torch.empty((*x.shape[:-1], N), dtype=weight.dtype, device=x.device)
    with device_guard(x):
        config = config or gemm_config(x.dtype, gpu_arch())
        x_operand, w_operand = gemm_operands(x, weight, config)
        _layernorm_linear_kernel[gemm_grid(M, N, config)](
            x_operand,
            moments,
            w_operand,
            colsum,
            bias,
            out,
            M,
            eps,
            N=N,
            K=K,
            # In fp32 the mean is taken out before the product: after it, its rounding error would stay behind.
            CENTRED=x.dtype == torch.float32,
            GELU=gelu,
            INPUT_PRECISION=input_precision(x.dtype),
            **config,
        )
    return out
