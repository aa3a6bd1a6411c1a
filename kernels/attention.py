"""Softmax attention in one pass (FlashAttention: Dao et al. 2022; online softmax: Milakov & Gimelshein 2018).

    out[b, :, h] = softmax(q kᵀ / √d) v        no mask, no dropout

qkv [B, N, 3, H, d] as the merged projection leaves it, read in place; out [B, N, H, d]; bf16, fp16 or fp32, softmax
in fp32, base 2. A head_dim that is no power of two is computed as two slices that are (72 = 64 + 8, 96 = 64 + 32),
not padded to the next one. The ragged tail of the keys is masked once, before the main loop: after it, ptxas for Hopper
gives up on asynchronous products in the loop (C7515) and has each wait for the last.
"""

import torch
import triton
import triton.language as tl

from .gemm import device_guard, gpu_arch, input_precision, multiprocessors
from .launch import empty, launch
from .tiles import attention_default, attention_tiles, default_first


@triton.jit
def _load_slice(ptr, rows, N, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
                STRIDE: tl.constexpr, MASK_ROWS: tl.constexpr):  # fmt: skip
    """`[BLOCK, WIDTH]`: columns FIRST… of a head, zero beyond the head's end and, if asked, beyond row N."""
    columns = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + rows[:, None] * STRIDE + columns[None, :]
    if MASK_ROWS:
        return tl.load(ptrs, mask=(rows[:, None] < N) & (columns[None, :] < HEAD_DIM), other=0.0)
    if FIRST + WIDTH > HEAD_DIM:
        return tl.load(ptrs, mask=columns[None, :] < HEAD_DIM, other=0.0)
    return tl.load(ptrs)


@triton.jit
def _attend(
    q0,
    q1,
    k_ptr,
    v_ptr,
    start,
    N,
    acc0,
    acc1,
    row_max,
    row_sum,
    scale,
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    STRIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One block of keys and values; TAIL masks those beyond N."""
    keys = start + tl.arange(0, BLOCK_N)
    k0 = _load_slice(k_ptr, keys, N, 0, WIDTH0, HEAD_DIM, STRIDE, TAIL)
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(q0, k0.T, input_precision=INPUT_PRECISION)
    if WIDTH1 > 0:
        k1 = _load_slice(k_ptr, keys, N, WIDTH0, WIDTH1, HEAD_DIM, STRIDE, TAIL)
        scores = tl.dot(q1, k1.T, scores, input_precision=INPUT_PRECISION)
    if TAIL:
        scores = tl.where(keys[None, :] < N, scores, float("-inf"))
    # scale > 0; scaling together with the subtraction is one instruction an element, not two
    new_max = tl.maximum(row_max, scale * tl.max(scores, axis=1))
    p = tl.exp2(scores * scale - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, axis=1)
    p = p.to(q0.dtype)
    v0 = _load_slice(v_ptr, keys, N, 0, WIDTH0, HEAD_DIM, STRIDE, TAIL)
    acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision=INPUT_PRECISION)
    if WIDTH1 > 0:
        v1 = _load_slice(v_ptr, keys, N, WIDTH0, WIDTH1, HEAD_DIM, STRIDE, TAIL)
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision=INPUT_PRECISION)
    return acc0, acc1, new_max, row_sum


@triton.jit
def _store_slice(ptr, x, rows, N, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
                 STRIDE: tl.constexpr):  # fmt: skip
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (rows[:, None] < N) & (columns[None, :] < HEAD_DIM)
    tl.store(ptr + rows[:, None] * STRIDE + columns[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _attention_kernel(
    qkv_ptr,
    out_ptr,
    N,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    TAIL_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    STRIDE: tl.constexpr = 3 * HEADS * HEAD_DIM
    STRIDE_OUT: tl.constexpr = HEADS * HEAD_DIM
    tiles = tl.cdiv(N, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % HEADS
    batch = (tl.program_id(0) // tiles // HEADS).to(tl.int64)
    q_ptr = qkv_ptr + batch * N * STRIDE + head * HEAD_DIM
    k_ptr = q_ptr + HEADS * HEAD_DIM
    v_ptr = k_ptr + HEADS * HEAD_DIM
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # [BLOCK_M, WIDTH0] and [BLOCK_M, WIDTH1]; where there is one slice, the second is an unused copy of it
    q0 = _load_slice(q_ptr, rows, N, 0, WIDTH0, HEAD_DIM, STRIDE, True)
    q1 = q0
    acc0 = tl.zeros([BLOCK_M, WIDTH0], dtype=tl.float32)
    acc1 = tl.zeros([BLOCK_M, 1], dtype=tl.float32)
    if WIDTH1 > 0:
        q1 = _load_slice(q_ptr, rows, N, WIDTH0, WIDTH1, HEAD_DIM, STRIDE, True)
        acc1 = tl.zeros([BLOCK_M, WIDTH1], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    full = N // BLOCK_N * BLOCK_N
    if TAIL_N > 0:
        acc0, acc1, row_max, row_sum = _attend(
            q0, q1, k_ptr, v_ptr, full, N, acc0, acc1, row_max, row_sum, scale,
            HEAD_DIM, WIDTH0, WIDTH1, STRIDE, INPUT_PRECISION, TAIL_N, True,
        )  # fmt: skip
    for start in range(0, full, BLOCK_N):
        acc0, acc1, row_max, row_sum = _attend(
            q0, q1, k_ptr, v_ptr, start, N, acc0, acc1, row_max, row_sum, scale,
            HEAD_DIM, WIDTH0, WIDTH1, STRIDE, INPUT_PRECISION, BLOCK_N, False,
        )  # fmt: skip
    out_ptr += batch * N * STRIDE_OUT + head * HEAD_DIM
    _store_slice(out_ptr, acc0 / row_sum[:, None], rows, N, 0, WIDTH0, HEAD_DIM, STRIDE_OUT)
    if WIDTH1 > 0:
        _store_slice(out_ptr, acc1 / row_sum[:, None], rows, N, WIDTH0, WIDTH1, HEAD_DIM, STRIDE_OUT)


def head_slices(head_dim: int, pad: bool = False) -> tuple[int, int]:
    """Widths of the one or two power-of-two slices that cover head_dim (0: no second slice), or of one padded slice.

    `tl.dot` needs at least 16 in every dimension, so a shorter slice is padded to that.
    """
    if pad:
        return max(16, triton.next_power_of_2(head_dim)), 0
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    return first, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def tail_width(N: int, BLOCK_N: int) -> int:
    """Of the block that holds the keys beyond the last whole block; 0 where there are none."""
    return max(16, triton.next_power_of_2(N % BLOCK_N)) if N % BLOCK_N else 0


def attention_configs(dtype: torch.dtype, arch: str, B: int, N: int, H: int, d: int) -> list[dict[str, int]]:
    """Candidates, the default first. PAD: one slice, padded, in place of two, for GPUs on which chained dots fail."""
    configs = default_first(attention_default(dtype, arch, B, N, H, d), attention_tiles(dtype, arch))
    two_slices = head_slices(d)[1] > 0 and dtype != torch.float32  # in fp32 every padded tile spills
    # So do those with more rows a warp.
    padded = [config for config in configs[:4] if two_slices and config["BLOCK_M"] <= 16 * config["num_warps"]]
    return configs + [config | {"PAD": True} for config in padded]


def attention(qkv: torch.Tensor, config: dict[str, int] | None = None) -> torch.Tensor:
    """`[B, N, 3, H, d]` → `[B, N, H, d]`."""
    B, N, _, H, d = qkv.shape
    out = empty((B, N, H, d), qkv.dtype, qkv.device)
    with device_guard(qkv):
        config = dict(config or attention_default(qkv.dtype, gpu_arch(), B, N, H, d, multiprocessors()))
        first, second = head_slices(d, config.pop("PAD", False))
        launch(
            _attention_kernel,
            (-(-N // config["BLOCK_M"]) * B * H,),
            qkv,
            out,
            N,
            d**-0.5 * 1.4426950408889634,  # log2(e): the softmax is computed in base 2
            HEADS=H,
            HEAD_DIM=d,
            WIDTH0=first,
            WIDTH1=second,
            TAIL_N=tail_width(N, config["BLOCK_N"]),
            INPUT_PRECISION=input_precision(qkv.dtype),
            **config,
        )
    return out
