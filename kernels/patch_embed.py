"""Patch embedding: a strided convolution as an implicit GEMM, plus bias, position embedding and row moments.

    tokens[b, n] = scale · W · patch(b, n) + bias + position[n]        n = row-major over the grid of whole patches

pixel_values [B, C, H, W] of any float dtype and any strides (cast to the weights' dtype in registers, as the stock
model casts before its convolution), or uint8, which stand for their value − 128: exact in every dtype, and around zero.
W [D, C·p·p] is the convolution's weight, flattened; scale a number; bias [D] and position [N, D], of W's dtype or fp32;
tokens [B, N, D], of position's. Pixels beyond the last whole patch are dropped. moments fp32 [B·N, 2, ceil(D / 64)] of the tokens.
"""

import torch
import triton
import triton.language as tl

from .gemm import device_guard, gemm_grid, gpu_arch, input_precision, multiprocessors, tile_origin
from .launch import empty, launch
from .moments import empty_moments, write_moments
from .tiles import default_first, gemm_configs, gemm_default


@triton.jit(do_not_specialize=["M", "tokens", "grid_w"])
def _patch_embed_kernel(
    pixels_ptr,
    w_ptr,
    bias_ptr,
    position_ptr,
    out_ptr,
    moments_ptr,
    scale,
    M,
    tokens,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    D: tl.constexpr,
    K: tl.constexpr,
    PATCH: tl.constexpr,
    STRIDE_W: tl.constexpr,
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
    column = tl.minimum(columns, D - 1)
    token = row % tokens
    # [BLOCK_M]: where each patch begins
    patch = row // tokens * stride_b + token // grid_w * (PATCH * stride_h) + token % grid_w * (PATCH * STRIDE_W)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        # [BLOCK_K]: k runs over (channel, row, column) of a patch, as the convolution's weight does
        channel = (k // (PATCH * PATCH)).to(tl.int64)  # planes of a large batch may lie 2^31 apart
        inside = channel * stride_c + k // PATCH % PATCH * stride_h + k % PATCH * STRIDE_W
        # [BLOCK_M, BLOCK_K]
        pixels = tl.load(pixels_ptr + patch[:, None] + inside[None, :], mask=(k < K)[None, :], other=0.0)
        # [BLOCK_K, BLOCK_N]
        w = tl.load(w_ptr + column[None, :] * K + k[:, None], mask=(k < K)[:, None], other=0.0)
        if pixels.dtype == tl.uint8:
            pixels = (pixels ^ 128).to(tl.int8, bitcast=True)  # value − 128 in one instruction
        acc = tl.dot(pixels.to(w.dtype), w, acc, input_precision=INPUT_PRECISION)
    acc = acc * scale + tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < D)
    position = tl.load(position_ptr + token[:, None] * D + columns[None, :], mask=mask, other=0.0)
    out = (acc + position.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * D + columns[None, :], out, mask=mask)
    write_moments(moments_ptr, out.to(tl.float32), rows, columns, M, D, BLOCK_M, BLOCK_N)


def patch_embed_configs(dtype: torch.dtype, arch: str, M: int, D: int, K: int) -> list[dict[str, int]]:
    """Candidates for M patches, the default first."""
    return default_first(gemm_default(dtype, arch, M, D, K), gemm_configs(dtype, arch, M))


def patch_embed(
    pixel_values: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    position: torch.Tensor,
    patch_size: int,
    scale: float = 1.0,
    config: dict[str, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, C, H, W]` → `[B, N, D]` and its moments."""
    B, _, _, width = pixel_values.shape
    D, K = weight.shape
    N = position.shape[0]
    stride_b, stride_c, stride_h, stride_w = pixel_values.stride()
    out = empty((B, N, D), position.dtype, weight.device)
    moments = empty_moments(B * N, D, weight.device)
    with device_guard(pixel_values):
        config = config or gemm_default(weight.dtype, gpu_arch(), B * N, D, K, sms=multiprocessors())
        launch(
            _patch_embed_kernel,
            gemm_grid(B * N, D, config),
            pixel_values,
            weight,
            bias,
            position,
            out,
            moments,
            scale,
            B * N,
            N,
            width // patch_size,
            stride_b,
            stride_c,
            stride_h,
            D=D,
            K=K,
            PATCH=patch_size,
            STRIDE_W=stride_w,
            INPUT_PRECISION=input_precision(weight.dtype),
            **config,
        )
    return out, moments
