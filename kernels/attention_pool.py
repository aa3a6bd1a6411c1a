"""Multi-head attention pooling with one constant query (the probe), up to but without its output projection.

    p[b, h] = softmax(S[h] · y[b]ᵀ)        S[h] = W_kᵀ q_h / √d, precomputed, because the probe never changes
    pooled[b, h] = p[b, h] · y[b]
    out[b, h] = W_v[h] · pooled[b, h] + b_v[h]

which equals projecting every token to keys and values (the key bias adds one constant per head and cancels in the
softmax; the weights p sum to one, so the value bias moves out of the sum) at a fraction of the work, and reads the
tokens instead of their keys and values. Attention pooling: Zhai et al. 2022 (MAP head).

The tokens are split among programs, because there may be one image only (Flash-Decoding: Dao et al. 2023). Each split
leaves the pooled tokens of its own softmax and that softmax's logsumexp L; the value projection is linear, so the
splits are merged behind it, with the weights exp(L - logsumexp(L)), and no launch is needed for that.

y [B, N, D], W_v [D, D], b_v [D], out [B, D] in bf16, fp16 or fp32; S [H, D] in fp32. Images of any size are segments of
y [R, D] instead, by a table int32 [S, 3] of first row, queries and keys, of which the keys are pooled. There are as many
splits as the largest image has: of another those beyond its keys leave zeros and a logsumexp of -inf.
"""

import torch
import triton
import triton.language as tl

from .gemm import device_guard, gpu_arch, input_precision
from .launch import empty, launch


@triton.jit
def _load_columns(ptrs, columns, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """`[rows, BLOCK_K]` of rows that begin at `ptrs [rows, 1]`, zero beyond column D."""
    if D % BLOCK_K == 0:
        return tl.load(ptrs + columns[None, :])
    return tl.load(ptrs + columns[None, :], mask=columns[None, :] < D, other=0.0)


@triton.jit(do_not_specialize=["N"])
def _pool_kernel(
    y_ptr,
    scores_weight_ptr,
    table_ptr,
    pooled_ptr,
    logsumexp_ptr,
    N,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    SCORE_PRECISION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N tokens of one image, all heads. N: tokens of each image, or with a table of the largest."""
    batch = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.cdiv(N, BLOCK_N)
    first = batch * N
    if table_ptr is not None:
        first = tl.load(table_ptr + 3 * batch).to(tl.int64)
        N = tl.maximum(tl.load(table_ptr + 3 * batch + 2), 1)  # an entry of zeros, which is padding, reads row 0
    heads = tl.arange(0, BLOCK_H)
    tokens = split * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Clamped instead of masked: what is beyond N gets the weight 0, what is beyond HEADS is not stored.
    y_ptrs = y_ptr + first * D + tl.minimum(tokens, N - 1)[:, None] * D
    w_ptrs = scores_weight_ptr + tl.minimum(heads, HEADS - 1)[:, None] * D
    # [BLOCK_H, BLOCK_N]
    scores = tl.zeros([BLOCK_H, BLOCK_N], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        w = _load_columns(w_ptrs, k + offs_k, D, BLOCK_K)
        y = _load_columns(y_ptrs, k + offs_k, D, BLOCK_K)
        scores = tl.dot(w, y.to(tl.float32).T, scores, input_precision=SCORE_PRECISION)
    scores = tl.where(tokens[None, :] < N, scores * 1.4426950408889634, float("-inf"))
    head_max = tl.max(scores, axis=1)
    if table_ptr is not None:  # where there is no key, the maximum is 0 and so is the sum
        head_max = tl.where(split * BLOCK_N < N, head_max, 0.0)
    p = tl.exp2(scores - head_max[:, None])
    head_sum = tl.sum(p, axis=1)
    row = batch * splits + split
    tl.store(logsumexp_ptr + row * HEADS + heads, head_max + tl.log2(head_sum), mask=heads < HEADS)
    if table_ptr is not None:
        head_sum = tl.maximum(head_sum, 1.0)  # as that of any key is
    p = p.to(y_ptr.dtype.element_ty)
    for k in range(0, D, BLOCK_K):
        columns = k + offs_k
        # [BLOCK_H, BLOCK_K]
        pooled = tl.dot(p, _load_columns(y_ptrs, columns, D, BLOCK_K), input_precision=INPUT_PRECISION)
        tl.store(
            pooled_ptr + (row * HEADS + heads[:, None]) * D + columns[None, :],
            (pooled / head_sum[:, None]).to(pooled_ptr.dtype.element_ty),
            mask=(heads[:, None] < HEADS) & (columns[None, :] < D),
        )


@triton.jit(do_not_specialize=["B", "splits"])
def _value_kernel(
    pooled_ptr,
    logsumexp_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    B,
    splits,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N columns of one head for so many images: all splits projected, then merged."""
    BLOCK_M: tl.constexpr = IMAGES * BLOCK_S
    image = tl.program_id(0).to(tl.int64) * IMAGES
    head = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + (head * HEAD_DIM + tl.minimum(column, HEAD_DIM - 1))[:, None] * D
    out = tl.zeros([IMAGES, BLOCK_N], dtype=tl.float32)
    total_max = tl.full([IMAGES], float("-inf"), dtype=tl.float32)
    total = tl.zeros([IMAGES], dtype=tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + rows % BLOCK_S
        row = tl.minimum(image + rows // BLOCK_S, B - 1) * splits + tl.minimum(split, splits - 1)
        row = row * HEADS + head
        logsumexp = tl.where(split < splits, tl.load(logsumexp_ptr + row), float("-inf"))
        # [BLOCK_M, BLOCK_N]
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            x = _load_columns(pooled_ptr + row[:, None] * D, k + offs_k, D, BLOCK_K)
            w = _load_columns(w_ptrs, k + offs_k, D, BLOCK_K)
            acc = tl.dot(x, w.T, acc, input_precision=INPUT_PRECISION)
        # [IMAGES, BLOCK_S], [IMAGES, BLOCK_S, BLOCK_N]
        logsumexp = tl.reshape(logsumexp, [IMAGES, BLOCK_S])
        acc = tl.reshape(acc, [IMAGES, BLOCK_S, BLOCK_N])
        new_max = tl.maximum(total_max, tl.max(logsumexp, axis=1))
        weight = tl.exp2(logsumexp - new_max[:, None])
        alpha = tl.exp2(total_max - new_max)
        total = total * alpha + tl.sum(weight, axis=1)
        out = out * alpha[:, None] + tl.sum(acc * weight[:, :, None], axis=1)
        total_max = new_max
    bias = tl.load(bias_ptr + head * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0).to(tl.float32)
    out = out / total[:, None] + bias[None, :]
    images = image + tl.arange(0, IMAGES)
    tl.store(
        out_ptr + images[:, None] * D + (head * HEAD_DIM + column)[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(images[:, None] < B) & (column[None, :] < HEAD_DIM),
    )


def pool_tile(BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {"BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "num_warps": num_warps, "num_stages": num_stages}


def value_tile(BLOCK_M: int, *others: int) -> dict[str, int]:
    """BLOCK_M: images times splits."""
    return {"BLOCK_M": BLOCK_M} | pool_tile(*others)


def pool_config(dtype: torch.dtype, arch: str, B: int, N: int) -> dict[str, int]:
    fp32, rdna = dtype == torch.float32, arch.startswith("gfx11")
    # As many tokens as leave each of about 128 programs one split: splits are parallel, but each is a pooled token more.
    tokens = min(B * N // 128, N, 64 if fp32 else 128)
    BLOCK_N = max(16, triton.next_power_of_2(tokens))
    few = BLOCK_N <= 32  # whose loops take no more than the latency of their loads
    BLOCK_K = (128 if BLOCK_N == 16 else 64) // (2 if fp32 or rdna else 1)  # or there are spills
    return pool_tile(BLOCK_N, BLOCK_K, 4, 2 if rdna else 4 if few else 3)


def value_config(dtype: torch.dtype, arch: str, B: int, N: int) -> dict[str, int]:
    fp32, few = dtype == torch.float32, B * N <= 2048
    if arch.startswith("gfx11"):  # whose registers hold no more
        return value_tile(16, 16 if few else 32, 32 if fp32 else 64, 4, 2)
    if few:  # short chains of loads; else fewer programs that read the same weights and pooled tokens
        return value_tile(16, 16, 64 if fp32 else 256, 4, 3)
    if fp32:
        return value_tile(32, 32, 32, 4, 2)
    return value_tile(32, 32, 64, 4, 2 if arch == "sm_120" else 3)  # with three stages it spills there under Triton 3.7


# BLOCK_N, BLOCK_K, num_warps, num_stages; none spills on sm_90
POOL_TILES = [
    (16, 64, 4, 4),
    (16, 128, 2, 4),
    (16, 128, 4, 4),
    (32, 128, 4, 3),
    (32, 128, 4, 4),
    (64, 64, 4, 3),
    (64, 128, 4, 3),
    (128, 32, 4, 4),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
]
FP32_POOL_TILES = [(16, 64, 4, 4), (32, 32, 4, 3), (32, 64, 4, 3), (64, 32, 4, 3), (64, 32, 8, 3)]
# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
VALUE_TILES = [
    (16, 16, 128, 4, 3),
    (16, 16, 256, 4, 3),
    (16, 64, 64, 4, 3),
    (32, 16, 128, 4, 3),
    (32, 32, 64, 4, 3),
    (32, 32, 128, 4, 3),
    (32, 64, 64, 4, 3),
]
FP32_VALUE_TILES = [(16, 16, 64, 4, 3), (16, 32, 32, 4, 3), (32, 32, 32, 4, 2), (32, 32, 32, 8, 2)]


def attention_pool_config(dtype: torch.dtype, arch: str, B: int, N: int) -> dict[str, dict[str, int]]:
    """The default: a tile for each of the two kernels."""
    return {"pool": pool_config(dtype, arch, B, N), "value": value_config(dtype, arch, B, N)}


def attention_pool_configs(dtype: torch.dtype, arch: str, B: int, N: int) -> list[dict[str, dict[str, int]]]:
    """Candidates, the default first; one kernel at a time differs from it."""
    fp32, default = dtype == torch.float32, attention_pool_config(dtype, arch, B, N)
    pools = [pool_tile(*tile) for tile in (FP32_POOL_TILES if fp32 else POOL_TILES)]
    values = [value_tile(*tile) for tile in (FP32_VALUE_TILES if fp32 else VALUE_TILES)]
    others = [*(default | {"pool": tile} for tile in pools), *(default | {"value": tile} for tile in values)]
    return [default, *(config for config in others if config != default)]


def attention_pool(
    y: torch.Tensor,
    scores_weight: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    config: dict[str, dict[str, int]] | None = None,
) -> torch.Tensor:
    """`[B, N, D]` → `[B, D]`."""
    B, N, _ = y.shape
    with device_guard(y):
        config = config or attention_pool_config(y.dtype, gpu_arch(), B, N)
        BLOCK_S = min(config["value"]["BLOCK_M"], triton.next_power_of_2(-(-N // config["pool"]["BLOCK_N"])))
        return _launch(y, None, B, N, scores_weight, value_weight, value_bias, config, BLOCK_S)


def attention_pool_segments(
    y: torch.Tensor,
    table: torch.Tensor,
    longest: int,
    scores_weight: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    config: dict[str, dict[str, int]] | None = None,
) -> torch.Tensor:
    """`[R, D]` → `[S, D]`, the pooled keys of the segments in `table [S, 3]`, of which the longest has so many."""
    with device_guard(y):
        config = config or attention_pool_config(y.dtype, gpu_arch(), len(table), longest)
        # Whatever the longest: in which order splits are added up must not depend on the other images.
        return _launch(y, table, len(table), longest, scores_weight, value_weight, value_bias, config, BLOCK_S=16)


def _launch(
    y: torch.Tensor,
    table: torch.Tensor | None,
    B: int,
    N: int,
    scores_weight: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    config: dict[str, dict[str, int]],
    BLOCK_S: int,
) -> torch.Tensor:
    """Of B images of at most N tokens."""
    H, D = scores_weight.shape
    pool, value = config["pool"], dict(config["value"])
    splits = -(-N // pool["BLOCK_N"])
    IMAGES = value.pop("BLOCK_M") // BLOCK_S
    precision = input_precision(y.dtype)
    # 16-bit tokens are exact in TF32, so only S is rounded there (to 10 bits of mantissa).
    score_precision = precision if y.dtype == torch.float32 or torch.version.hip else "tf32"
    pooled = empty((B, splits, H, D), y.dtype, y.device)
    logsumexp = empty((B, splits, H), torch.float32, y.device)
    out = empty((B, D), y.dtype, y.device)
    launch(
        _pool_kernel,
        (B, splits),
        y,
        scores_weight,
        table,
        pooled,
        logsumexp,
        N,
        D=D,
        HEADS=H,
        SCORE_PRECISION=score_precision,
        INPUT_PRECISION=precision,
        BLOCK_H=max(16, triton.next_power_of_2(H)),
        **pool,
    )
    launch(
        _value_kernel,
        (-(-B // IMAGES), H, -(-(D // H) // value["BLOCK_N"])),
        pooled,
        logsumexp,
        value_weight,
        value_bias,
        out,
        B,
        splits,
        D=D,
        HEADS=H,
        HEAD_DIM=D // H,
        INPUT_PRECISION=precision,
        IMAGES=IMAGES,
        BLOCK_S=BLOCK_S,
        **value,
    )
    return out
