"""Row moments: what lets LayerNorm ride along in the kernels before and after it.

Whoever writes the residual stream also writes, for each row and each block of 64 columns, the mean and M2 (the
sum of squared deviations from that mean) of the values as stored, in fp32, layout `[M, 2, ceil(D / 64)]`. Whoever
reads the stream merges them by the parallel variance of Chan, Golub & LeVeque (1979):
mean = Σ nᵢ·meanᵢ / D and M2 = Σ M2ᵢ + Σ nᵢ·(meanᵢ − mean)². Never E[x²] − μ², which cancels where |μ| ≫ σ.
"""

import torch
import triton
import triton.language as tl

from .launch import empty

MOMENT_BLOCK = tl.constexpr(64)


@triton.jit
def write_moments(moments_ptr, x, rows, columns, M, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write the moments of the fp32 tile `x [BLOCK_M, BLOCK_N]`; BLOCK_N is a multiple of 64."""
    BLOCKS: tl.constexpr = BLOCK_N // MOMENT_BLOCK
    ROW_BLOCKS: tl.constexpr = (D + MOMENT_BLOCK - 1) // MOMENT_BLOCK
    # [BLOCK_M, BLOCKS, 64]
    x = tl.reshape(x, [BLOCK_M, BLOCKS, MOMENT_BLOCK])
    # [BLOCKS]
    block = tl.min(columns, axis=0) // MOMENT_BLOCK + tl.arange(0, BLOCKS)
    # [BLOCK_M, BLOCKS]
    if ROW_BLOCKS * MOMENT_BLOCK == D:
        mean = tl.sum(x, axis=2) * (1.0 / MOMENT_BLOCK)
        deviation = x - mean[:, :, None]
    else:
        count = tl.minimum(D - block * MOMENT_BLOCK, MOMENT_BLOCK)
        # [1, BLOCKS, 64]
        inside = (tl.arange(0, MOMENT_BLOCK)[None, :] < count[:, None])[None, :, :]
        mean = tl.sum(tl.where(inside, x, 0.0), axis=2) / tl.maximum(count, 1)[None, :].to(tl.float32)
        deviation = tl.where(inside, x - mean[:, :, None], 0.0)
    m2 = tl.sum(deviation * deviation, axis=2)
    ptrs = moments_ptr + rows[:, None] * (2 * ROW_BLOCKS) + block[None, :]
    mask = (rows[:, None] < M) & (block[None, :] < ROW_BLOCKS)
    tl.store(ptrs, mean, mask=mask)
    tl.store(ptrs + ROW_BLOCKS, m2, mask=mask)


@triton.jit
def _merged_blocks(moments_ptr, rows, exists, D: tl.constexpr):
    """Mean and M2 of each row, fp32 `[BLOCK_M]` each, from those of its blocks."""
    ROW_BLOCKS: tl.constexpr = (D + MOMENT_BLOCK - 1) // MOMENT_BLOCK
    block = tl.arange(0, triton.next_power_of_2(ROW_BLOCKS))
    count = tl.maximum(tl.minimum(D - block * MOMENT_BLOCK, MOMENT_BLOCK), 0).to(tl.float32)
    # [BLOCK_M, next_power_of_2(ROW_BLOCKS)]
    ptrs = moments_ptr + rows[:, None] * (2 * ROW_BLOCKS) + block[None, :]
    mask = exists[:, None] & (block[None, :] < ROW_BLOCKS)
    means = tl.load(ptrs, mask=mask, other=0.0)
    m2 = tl.load(ptrs + ROW_BLOCKS, mask=mask, other=0.0)
    mean = tl.sum(means * count[None, :], axis=1) / D
    delta = means - mean[:, None]
    return mean, tl.sum(m2, axis=1) + tl.sum(delta * delta * count[None, :], axis=1)


@triton.jit
def read_moments(moments_ptr, rows, exists, D: tl.constexpr, eps, MERGED: tl.constexpr = 1):
    """Mean and 1/√(variance + eps) of each of `rows`, or where it does not exist of zeros, fp32 `[BLOCK_M]` each.

    MERGED rows of the stream, side by side, may be one row of D: their moments are merged one after the other, because
    those of all blocks at once would hold more registers than the main loop.
    """
    PART: tl.constexpr = D // MERGED
    mean, m2 = _merged_blocks(moments_ptr, rows * MERGED, exists, PART)
    for part in tl.static_range(1, MERGED):
        next_mean, next_m2 = _merged_blocks(moments_ptr, rows * MERGED + part, exists, PART)
        delta = next_mean - mean
        mean += delta / (part + 1)
        m2 += next_m2 + delta * delta * (PART * part / (part + 1))
    return mean, tl.rsqrt(m2 / D + eps)


def empty_moments(rows: int, D: int, device: torch.device) -> torch.Tensor:
    return empty((rows, 2, -(-D // MOMENT_BLOCK.value)), torch.float32, device)
