"""Multi-head attention pooling with one constant query (the probe), up to but without its output projection.

    p[b, h] = softmax(S[h] · y[b]ᵀ)        S[h] = W_kᵀ q_h / √d, precomputed, because the probe never changes
    pooled[b, h] = p[b, h] · y[b]
    out[b, h] = W_v[h] · pooled[b, h] + b_v[h]

which equals projecting every token to keys and values (the key bias adds one constant per head and cancels in the
softmax; the weights p sum to one, so the value bias moves out of the sum) at a fraction of the work, and reads the
tokens instead of their keys and values. Attention pooling: Zhai et al. 2022 (MAP head).

y [B, N, D], W_v [D, D], b_v [D], out [B, D] in bf16, fp16 or fp32; S [H, D] in fp32.
"""

import torch
import triton
import triton.language as tl

from .gemm import device_guard, input_precision, main_loop


@triton.jit
def _pool_kernel(
    y_ptr,
    scores_weight_ptr,
    pooled_ptr,
    N,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One image and BLOCK_D of its channels; the scores need all channels, so each program computes all of them."""
    batch = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    heads = tl.arange(0, BLOCK_H)
    offs_k = tl.arange(0, BLOCK_K)
    y_ptr += batch * N * D
    head_max = tl.full([BLOCK_H], float("-inf"), dtype=tl.float32)
    head_sum = tl.zeros([BLOCK_H], dtype=tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        # [BLOCK_H, BLOCK_N]
        scores = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            inside = offs_k < D - k
            w = tl.load(
                scores_weight_ptr + heads[:, None] * D + (k + offs_k)[None, :],
                mask=(heads[:, None] < HEADS) & inside[None, :],
                other=0.0,
            )
            y = tl.load(
                y_ptr + tokens[:, None] * D + (k + offs_k)[None, :],
                mask=(tokens[:, None] < N) & inside[None, :],
                other=0.0,
            )
            scores = tl.dot(w, y.to(tl.float32).T, scores, input_precision=SCORE_PRECISION)
        scores = tl.where(tokens[None, :] < N, scores * 1.4426950408889634, float("-inf"))
        new_max = tl.maximum(head_max, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_max[:, None])
        alpha = tl.exp2(head_max - new_max)
        head_sum = head_sum * alpha + tl.sum(p, axis=1)
        head_max = new_max
        # [BLOCK_N, BLOCK_D]
        values = tl.load(
            y_ptr + tokens[:, None] * D + columns[None, :],
            mask=(tokens[:, None] < N) & (columns[None, :] < D),
            other=0.0,
        )
        acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision=INPUT_PRECISION)
    out = acc / head_sum[:, None]
    tl.store(
        pooled_ptr + batch * HEADS * D + heads[:, None] * D + columns[None, :],
        out.to(pooled_ptr.dtype.element_ty),
        mask=(heads[:, None] < HEADS) & (columns[None, :] < D),
    )


@triton.jit
def _value_kernel(
    pooled_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    B,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The value projection of one head for BLOCK_M images."""
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    acc = main_loop(
        pooled_ptr + head * D,
        w_ptr + head * HEAD_DIM * D,
        row,
        0,
        B,
        HEAD_DIM,
        D,
        HEADS * D,
        INPUT_PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    column_mask = columns < HEAD_DIM
    acc += tl.load(bias_ptr + head * HEAD_DIM + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows[:, None] * D + (head * HEAD_DIM + columns)[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows[:, None] < B) & column_mask[None, :],
    )


# BLOCK_K 64 spills on sm_86 in fp32, and under Triton 3.6 in bf16 too.
POOL_CONFIG = {"BLOCK_N": 32, "BLOCK_K": 32, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}


def value_config(dtype: torch.dtype) -> dict[str, int]:
    num_stages = 2 if dtype == torch.float32 else 3  # 3 do not fit AMD's 64 KB in fp32
    return {"BLOCK_M": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": num_stages}


# BLOCK_N, BLOCK_K, BLOCK_D, num_warps, num_stages, and BLOCK_M, BLOCK_K, num_stages
POOL_TILES = [
    (16, 64, 128, 4, 2),
    (32, 32, 64, 4, 2),
    (32, 32, 128, 4, 3),
    (32, 32, 256, 4, 2),
    (32, 64, 128, 8, 2),
    (64, 32, 128, 8, 2),
    (64, 32, 256, 8, 2),
]
VALUE_TILES = [(16, 32, 3), (16, 128, 2), (32, 64, 2), (64, 32, 2)]


def attention_pool_config(dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """The default: a tile for each of the two kernels."""
    return {"pool": POOL_CONFIG, "value": value_config(dtype)}


def attention_pool_configs(dtype: torch.dtype) -> list[dict[str, dict[str, int]]]:
    """Candidates, the default first: the two kernels do not depend on each other, so one at a time differs from it."""
    default = attention_pool_config(dtype)
    pools = [
        {"BLOCK_N": n, "BLOCK_K": k, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}
        for n, k, d, warps, stages in POOL_TILES
    ]
    values = [{"BLOCK_M": m, "BLOCK_K": k, "num_warps": 4, "num_stages": stages} for m, k, stages in VALUE_TILES]
    return [default, *(default | {"pool": p} for p in pools), *(default | {"value": v} for v in values)]


def attention_pool(
    y: torch.Tensor,
    scores_weight: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    config: dict[str, dict[str, int]] | None = None,
) -> torch.Tensor:
    """`[B, N, D]` → `[B, D]`."""
    config = config or attention_pool_config(y.dtype)
    pool, value = config["pool"], config["value"]
    B, N, D = y.shape
    H = scores_weight.shape[0]
    precision = input_precision(y.dtype)
    # 16-bit tokens are exact in TF32, so only S is rounded there (to 10 bits of mantissa).
    score_precision = precision if y.dtype == torch.float32 or torch.version.hip else "tf32"
    pooled = torch.empty((B, H, D), dtype=y.dtype, device=y.device)
    out = torch.empty((B, D), dtype=y.dtype, device=y.device)
    with device_guard(y):
        _pool_kernel[B, triton.cdiv(D, pool["BLOCK_D"])](
            y,
            scores_weight,
            pooled,
            N,
            D=D,
            HEADS=H,
            SCORE_PRECISION=score_precision,
            INPUT_PRECISION=precision,
            BLOCK_H=max(16, triton.next_power_of_2(H)),
            **pool,
        )
        _value_kernel[triton.cdiv(B, value["BLOCK_M"]), H](
            pooled,
            value_weight,
            value_bias,
            out,
            B,
            D=D,
            HEADS=H,
            HEAD_DIM=D // H,
            INPUT_PRECISION=precision,
            BLOCK_N=max(16, triton.next_power_of_2(D // H)),
            **value,
        )
    return out
