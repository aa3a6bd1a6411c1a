"""Softmax attention as in attention.py, inside of segments of any length, one behind the other.

    out[q, h] = softmax over the keys of q's segment (q kᵀ / √d) v

qkv [M, 3, H, d], read in place; out [M, H, d]; bf16, fp16 or fp32, softmax in fp32. A schedule says what there is to do, so
that no program is idle however uneven the segments are: int32 [tiles, 4], a tile of BLOCK_M queries each, of which it has
the segment's first row, the tile's first query in the segment, queries and keys of the segment. A segment's tiles are one
behind the other. Queries from the number of keys on are rows that no key belongs to. Entries of zeros do nothing.

As in attention.py the masked block of keys comes before the loop; here it is always there, and as wide as the others.
"""

import torch
import triton
import triton.language as tl

from .attention import _attend, _load_slice, _store_slice, head_slices
from .gemm import device_guard, gpu_arch, input_precision, multiprocessors
from .launch import empty, launch
from .tiles import attention_segments_default, attention_tiles, default_first

MOST = 2**31  # elements of qkv within a segment, whose offsets have 32 bits


@triton.jit
def _attention_segments_kernel(
    qkv_ptr,
    schedule_ptr,
    out_ptr,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    STRIDE: tl.constexpr = 3 * HEADS * HEAD_DIM
    STRIDE_OUT: tl.constexpr = HEADS * HEAD_DIM
    # As many programs as heads for each entry. Those of a segment share out its tiles head by head: the tiles of a head,
    # which read the same keys and values, are neighbours in time.
    entry_ptr = schedule_ptr + tl.program_id(0) // HEADS * 4
    first = tl.load(entry_ptr).to(tl.int64)
    before = tl.load(entry_ptr + 1) // BLOCK_M  # tiles of the segment that come before this one
    queries = tl.load(entry_ptr + 2)
    keys = tl.load(entry_ptr + 3)
    tiles = tl.maximum(tl.cdiv(queries, BLOCK_M), 1)
    place = before * HEADS + tl.program_id(0) % HEADS
    head = place // tiles
    rows = place % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + first * STRIDE + head * HEAD_DIM
    k_ptr = q_ptr + HEADS * HEAD_DIM
    v_ptr = k_ptr + HEADS * HEAD_DIM
    # [BLOCK_M, WIDTH0] and [BLOCK_M, WIDTH1]; where there is one slice, the second is an unused copy of it
    q0 = _load_slice(q_ptr, rows, queries, 0, WIDTH0, HEAD_DIM, STRIDE, True)
    q1 = q0
    acc0 = tl.zeros([BLOCK_M, WIDTH0], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_M, 1], dtype=tl.float32)
    if WIDTH1 > 0:
        q1 = _load_slice(q_ptr, rows, queries, WIDTH0, WIDTH1, HEAD_DIM, STRIDE, True)
        acc1 = tl.zeros([BLOCK_M, WIDTH1], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    full = tl.maximum(keys - 1, 0) // BLOCK_N * BLOCK_N
    acc0, acc1, row_max, row_sum = _attend(
        q0, q1, k_ptr, v_ptr, full, keys, acc0, acc1, row_max, row_sum, scale,
        HEAD_DIM, WIDTH0, WIDTH1, STRIDE, INPUT_PRECISION, BLOCK_N, True,
    )  # fmt: skip
    for start in range(0, full, BLOCK_N):
        acc0, acc1, row_max, row_sum = _attend(
            q0, q1, k_ptr, v_ptr, start, keys, acc0, acc1, row_max, row_sum, scale,
            HEAD_DIM, WIDTH0, WIDTH1, STRIDE, INPUT_PRECISION, BLOCK_N, False,
        )  # fmt: skip
    out_ptr += first * STRIDE_OUT + head * HEAD_DIM
    _store_slice(out_ptr, acc0 / row_sum[:, None], rows, queries, 0, WIDTH0, HEAD_DIM, STRIDE_OUT)
    if WIDTH1 > 0:
        _store_slice(out_ptr, acc1 / row_sum[:, None], rows, queries, WIDTH0, WIDTH1, HEAD_DIM, STRIDE_OUT)


def attention_segments_configs(dtype: torch.dtype, arch: str, M: int, H: int, d: int) -> list[dict[str, int]]:
    """Candidates for M rows of segments that are not all short, the default first."""
    return default_first(attention_segments_default(dtype, arch, M, M, H, d), attention_tiles(dtype, arch))


def attention_segments(
    qkv: torch.Tensor, longest: int, schedule: dict[int, torch.Tensor], config: dict[str, int] | None = None
) -> torch.Tensor:
    """`[M, 3, H, d]` → `[M, H, d]`; the longest segment has so many queries; a schedule for each BLOCK_M.

    Raises ValueError where a segment's rows do not fit 32-bit offsets, or there is no schedule for the tile.
    """
    M, _, H, d = qkv.shape
    if longest > MOST // (3 * H * d):
        raise ValueError(f"segments: expected at most {MOST // (3 * H * d)} rows each, got {longest}")
    out = empty((M, H, d), qkv.dtype, qkv.device)
    with device_guard(qkv):
        if config is None:
            config = attention_segments_default(qkv.dtype, gpu_arch(), M, longest, H, d, multiprocessors())
        first, second = head_slices(d)
        entries = schedule.get(config["BLOCK_M"])
        if entries is None:
            raise ValueError(f"segments.schedule: expected one for {config['BLOCK_M']} rows, got {sorted(schedule)}")
        launch(
            _attention_segments_kernel,
            (len(entries) * H,),
            qkv,
            entries,
            out,
            d**-0.5 * 1.4426950408889634,  # log2(e): the softmax is computed in base 2
            HEADS=H,
            HEAD_DIM=d,
            WIDTH0=first,
            WIDTH1=second,
            INPUT_PRECISION=input_precision(qkv.dtype),
            **config,
        )
    return out
