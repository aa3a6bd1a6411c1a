"""Rotary position embedding on a grid (RoPE: Su et al. 2021, an axis each half of a head) in a projection's epilogue.

Of the first two thirds of the columns, Q and K, neighbours are pairs (x₀, x₁), d / 2 of them a head. Pair i of a row turns by
an angle, whose cosine and sine are entry i of the table's row for the row's place on the first axis, or from d / 4 on
entry i − d / 4 for its place on the second:  (x₀·cos − x₁·sin, x₁·cos + x₀·sin), in fp32, before the only rounding.

table fp32 [side, d / 4, 2], place int32 [M, 2].
"""

import triton
import triton.language as tl


@triton.jit
def rotate(
    x,
    table_ptr,
    place_ptr,
    rows,
    columns,
    M,
    N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """fp32 `x [BLOCK_M, BLOCK_N]`, which holds these rows and columns of Q, K and V `[M, N]`, with Q and K turned."""
    AXIS: tl.constexpr = HEAD_DIM // 2  # channels of an axis, and numbers in a row of the table
    turns = columns < N // 3 * 2
    # [BLOCK_M]
    first = tl.load(place_ptr + rows * 2, mask=rows < M, other=0)
    second = tl.load(place_ptr + rows * 2 + 1, mask=rows < M, other=0)
    # [BLOCK_M, BLOCK_N]
    place = tl.where((columns % HEAD_DIM < AXIS)[None, :], first[:, None], second[:, None])
    angles = tl.load(table_ptr + place * AXIS + (columns % AXIS)[None, :], mask=turns[None, :], other=0.0)
    # [BLOCK_M, BLOCK_N / 2]
    cos, sin = _pairs(angles, BLOCK_M, BLOCK_N)
    x0, x1 = _pairs(x, BLOCK_M, BLOCK_N)
    turned = tl.reshape(tl.join(x0 * cos - x1 * sin, x1 * cos + x0 * sin), [BLOCK_M, BLOCK_N])
    return tl.where(turns[None, :], turned, x)


@triton.jit
def _pairs(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The even and the odd columns."""
    return tl.split(tl.reshape(x, [BLOCK_M, BLOCK_N // 2, 2]))
