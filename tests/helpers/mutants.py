"""Kernels broken on purpose: what each breaks, and a test that has to notice.

Each mutant is one edit of one source file. `test_mutants.py` applies it to a copy of the package.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` occurs once in `file`; with `new` in its place, the tests that `tests` selects must fail.

    Under ttsem unless `interpreted`: then in Triton's interpreter.
    """

    file: str
    old: str
    new: str
    tests: str
    interpreted: bool = False


_ATTENTION = "tests/kernels/test_attention.py -k 'triton and fp16 and (accuracy or phantom) and"
_RESIDUAL = "tests/kernels/test_linear_residual.py -k 'triton and"
_SPLIT = "tests/kernels/test_linear_residual.py -k 'triton and bf16 and test_split_k and no-residual and"
_EPILOGUE = "tests/kernels/test_residual_epilogue.py -k 'triton and bf16 and"
_UINT8 = "tests/running/test_uint8.py -k 'TestOperation and accuracy and bf16"
_NORMED = "tests/kernels/test_layernorm_linear.py -k 'triton and"

_POOL = "tests/kernels/test_attention_pool.py -k 'triton and bf16 and"
_STREAM = "tests/kernels/test_float32_stream.py -k 'triton and bf16 and"

MUTANTS = {
    "stream-rounded-around-its-mean": Mutant(
        "kernels/layernorm_linear.py",
        "CENTRED=x.dtype == torch.float32",
        "CENTRED=weight.dtype == torch.float32",
        f"{_STREAM} layernorm_linear and 37 and plain'",
    ),
    "stream-mean-taken-out-twice": Mutant(
        "kernels/layernorm_linear.py",
        "    if not CENTRED:\n        acc -= mean",
        "    if True:\n        acc -= mean",
        f"{_STREAM} layernorm_linear and 37 and plain'",
    ),
    "stream-rounded-after-the-residual": Mutant(
        "kernels/linear_residual.py",
        "dtype = x.dtype if residual is None else residual.dtype",
        "dtype = x.dtype",
        f"{_STREAM} linear_residual and 37'",
    ),
    "stream-rounded-by-the-epilogue": Mutant(
        "kernels/linear_residual.py",
        "residual_epilogue(out, bias, residual, dtype)",
        "residual_epilogue(out, bias, residual, x.dtype)",
        "tests/kernels/test_float32_stream.py -k 'split_k and bf16'",
    ),
    "stream-begins-rounded": Mutant(
        "kernels/patch_embed.py",
        "out = torch.empty((B, N, D), dtype=position.dtype",
        "out = torch.empty((B, N, D), dtype=weight.dtype",
        f"{_STREAM} patch_embed'",
    ),
    "attention-mask-off-by-one": Mutant(
        "kernels/attention.py",
        "tl.where(keys[None, :] < N,",
        "tl.where(keys[None, :] <= N,",
        f"{_ATTENTION} base-224-and-one'",
    ),
    "attention-tail-not-masked": Mutant(
        "kernels/attention.py", 'tl.where(keys[None, :] < N, scores, float("-inf"))', "scores", f"{_ATTENTION} d-32'"
    ),
    "attention-tail-loads-not-masked": Mutant(
        "kernels/attention.py",
        "mask=(rows[:, None] < N) & (columns[None, :] < HEAD_DIM)",
        "mask=columns[None, :] < HEAD_DIM",
        f"{_ATTENTION} d-32'",
    ),
    "attention-first-slice-lost": Mutant(
        "kernels/attention.py",
        "scores = tl.dot(q1, k1.T, scores,",
        "scores = tl.dot(q1, k1.T,",
        f"{_ATTENTION} so400m-384-and-one'",
    ),
    "attention-keys-and-values-swapped": Mutant(
        "kernels/attention.py",
        "    k_ptr = q_ptr + HEADS * HEAD_DIM\n    v_ptr = k_ptr + HEADS * HEAD_DIM",
        "    v_ptr = q_ptr + HEADS * HEAD_DIM\n    k_ptr = v_ptr + HEADS * HEAD_DIM",
        f"{_ATTENTION} d-32'",
    ),
    "attention-no-scale": Mutant("kernels/attention.py", "    scores *= scale\n", "", f"{_ATTENTION} d-32'"),
    "attention-old-sum-not-rescaled": Mutant(
        "kernels/attention.py", "acc0 * alpha[:, None]", "acc0", f"{_ATTENTION} base-224-and-one'"
    ),
    "attention-batches-race-for-one-output": Mutant(
        "kernels/attention.py",
        "out_ptr += batch * N * STRIDE_OUT + head * HEAD_DIM",
        "out_ptr += head * HEAD_DIM",
        f"{_ATTENTION} d-32'",
    ),
    "gemm-last-k-block-dropped": Mutant(
        "kernels/gemm.py",
        "for k in range(first, last, BLOCK_K):",
        "for k in range(first, last // BLOCK_K * BLOCK_K, BLOCK_K):",
        f"{_RESIDUAL} bf16 and N-and-K'",
    ),
    "gemm-k-tail-not-masked": Mutant(
        "kernels/gemm.py", "if K % BLOCK_K == 0:", "if K > 0:", f"{_RESIDUAL} bf16 and N-and-K'"
    ),
    "gemm-rows-not-clamped": Mutant(
        "kernels/gemm.py",
        "rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)",
        "rows = row + tl.arange(0, BLOCK_M)",
        f"{_RESIDUAL} bf16 and N-and-K'",
    ),
    "gemm-row-offsets-in-32-bits": Mutant(
        "kernels/gemm.py",
        "tile_m.to(tl.int64) * BLOCK_M",
        "tile_m * BLOCK_M",
        "tests/kernels/test_patch_embed.py -k 'beyond_32_bits and batch'",
        interpreted=True,
    ),
    "gemm-group-forgets-its-start": Mutant(
        "kernels/gemm.py", "tile_m = group * GROUP_M + ", "tile_m = ", f"{_NORMED} bf16 and plain and group'"
    ),
    "gelu-without-its-cube": Mutant(
        "kernels/gemm.py", "(x + 0.044715 * x * x * x)", "x", f"{_NORMED} bf16 and gelu and K-no'"
    ),
    "split-k-parts-one-block-short": Mutant(
        "kernels/gemm.py",
        "last = min(first + PART, K) if",
        "last = min(first + PART - BLOCK_K, K) if",
        f"{_SPLIT} parts-of'",
    ),
    "split-k-parts-overlap": Mutant(
        "kernels/gemm.py", "last = min(first + PART, K) if", "last = K if", f"{_SPLIT} parts-of'"
    ),
    "split-k-parts-of-a-rounded-down-size": Mutant(
        "kernels/gemm.py",
        "(K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K",
        "K // (BLOCK_K * SPLIT_K) * BLOCK_K",
        f"{_SPLIT} ragged-K'",
    ),
    "split-k-parts-all-begin-at-the-beginning": Mutant(
        "kernels/gemm.py", "first = tl.program_id(1) * PART if SPLIT_K > 1 else 0", "first = 0", f"{_SPLIT} parts-of'"
    ),
    "split-k-weights-of-the-first-part": Mutant(
        "kernels/gemm.py",
        "w_ptr + columns[None, :] * K + (first + offs_k)[:, None]",
        "w_ptr + columns[None, :] * K + offs_k[:, None]",
        f"{_SPLIT} parts-of'",
    ),
    "split-k-parts-race-for-one-partial": Mutant(
        "kernels/linear_residual.py",
        "out_ptr + tl.program_id(1).to(tl.int64) * M * N + offsets",
        "out_ptr + offsets",
        f"{_SPLIT} parts-of'",
    ),
    "tensor-descriptor-at-the-first-row": Mutant(
        "kernels/gemm.py",
        "x_ptr.load([row.to(tl.int32), k])",
        "x_ptr.load([0, k])",
        f"{_RESIDUAL} fp16 and descriptors and whole'",
        interpreted=True,
    ),
    "tensor-descriptor-at-the-first-column": Mutant(
        "kernels/gemm.py",
        "w_ptr.load([column, k])",
        "w_ptr.load([0, k])",
        f"{_RESIDUAL} fp16 and descriptors and whole'",
        interpreted=True,
    ),
    "tensor-descriptor-of-any-alignment": Mutant(
        "kernels/gemm.py",
        "if tensor.data_ptr() % 16:",
        "if False:",
        "tests/kernels/test_linear_residual.py -k cannot_read",
        interpreted=True,
    ),
    "layernorm-colsum-of-the-unrounded-weight": Mutant(
        "siglip_fast/models/weights.py",
        "colsum=folded.float().sum(1)",
        "colsum=product.sum(1)",
        f"{_NORMED} bf16 and dwarfs'",
    ),
    "layernorm-mean-not-subtracted": Mutant(
        "kernels/layernorm_linear.py",
        "    if not CENTRED:\n        acc -= mean[:, None] * colsum[None, :]\n",
        "",
        f"{_NORMED} bf16 and plain and M-3'",
    ),
    "layernorm-eps-of-its-own": Mutant(
        "kernels/layernorm_linear.py",
        "read_moments(moments_ptr, rows, M, K, eps)",
        "read_moments(moments_ptr, rows, M, K, 1e-6)",
        f"{_NORMED} bf16 and eps'",
    ),
    "residual-moments-of-the-unrounded-value": Mutant(
        "kernels/linear_residual.py",
        "write_moments(moments_ptr, out.to(tl.float32),",
        "write_moments(moments_ptr, acc,",
        f"{_RESIDUAL} bf16 and N-and-K'",
    ),
    "residual-column-tail-not-masked": Mutant(
        "kernels/linear_residual.py",
        "mask = (rows[:, None] < M) & (columns[None, :] < N)",
        "mask = (rows[:, None] < M) & (columns[None, :] >= 0)",
        f"{_RESIDUAL} bf16 and N-and-K'",
    ),
    "epilogue-last-partial-dropped": Mutant(
        "kernels/residual_epilogue.py",
        "tl.static_range(1, SPLITS)",
        "tl.static_range(1, SPLITS - 1)",
        f"{_EPILOGUE} partials and 7'",
    ),
    "epilogue-first-partial-twice": Mutant(
        "kernels/residual_epilogue.py", "(split * N)", "((split - 1) * N)", f"{_EPILOGUE} partials and 7'"
    ),
    "epilogue-forgets-the-residual": Mutant(
        "kernels/residual_epilogue.py", "if residual_ptr is not None:", "if False:", f"{_EPILOGUE} after_a_gemm and 40'"
    ),
    "epilogue-forgets-the-bias": Mutant(
        "kernels/residual_epilogue.py", "if bias_ptr is not None:", "if False:", f"{_EPILOGUE} after_a_gemm and 40'"
    ),
    "epilogue-moments-of-the-unrounded-sum": Mutant(
        "kernels/residual_epilogue.py", "        out = stored.to(tl.float32)\n", "", f"{_EPILOGUE} after_a_gemm and 40'"
    ),
    "epilogue-column-tail-not-masked": Mutant(
        "kernels/residual_epilogue.py",
        "mask = (rows[:, None] < M) & (columns[None, :] < N)",
        "mask = (rows[:, None] < M) & (columns[None, :] >= 0)",
        f"{_EPILOGUE} after_a_gemm and 40'",
    ),
    "epilogue-finished-tensor-not-returned": Mutant(
        "kernels/residual_epilogue.py",
        "return partials[0] if finished else out, moments",
        "return out, moments",
        f"{_EPILOGUE} moments_alone'",
    ),
    "attention-padded-to-less-than-the-head": Mutant(
        "kernels/attention.py",
        "return max(16, triton.next_power_of_2(head_dim)), 0",
        "return max(16, 1 << (head_dim.bit_length() - 1)), 0",
        "tests/kernels/test_configs.py -k 'fp16 and test_attention and 96'",
        interpreted=True,
    ),
    "moments-of-rows-overlap": Mutant(
        "kernels/moments.py",
        "ptrs = moments_ptr + rows[:, None] * (2 * ROW_BLOCKS) + block[None, :]\n    mask = (rows[:, None] < M) & (block[None, :] < ROW_BLOCKS)\n    tl.store(",
        "ptrs = moments_ptr + rows[:, None] * ROW_BLOCKS + block[None, :]\n    mask = (rows[:, None] < M) & (block[None, :] < ROW_BLOCKS)\n    tl.store(",
        f"{_RESIDUAL} bf16 and N-and-K'",
    ),
    "moments-by-the-difference-of-squares": Mutant(
        "kernels/moments.py",
        "m2 = tl.sum(deviation * deviation, axis=2)",
        "m2 = tl.sum(tl.where(inside, x * x, 0.0), axis=2) - mean * mean * count[None, :].to(tl.float32)",
        "tests/kernels/test_linear_residual.py -k large_mean",
    ),
    "moments-merged-without-the-spread-of-the-means": Mutant(
        "kernels/moments.py",
        "(tl.sum(m2, axis=1) + tl.sum(delta * delta * count[None, :], axis=1)) / D",
        "tl.sum(m2, axis=1) / D",
        "tests/kernels/test_layernorm.py -k 'triton and bf16 and 3-72'",
    ),
    "moments-without-eps": Mutant(
        "kernels/moments.py",
        "tl.rsqrt(variance + eps)",
        "tl.rsqrt(variance)",
        "tests/kernels/test_layernorm.py -k 'triton and bf16 and constant'",
    ),
    "patch-k-tail-not-masked": Mutant(
        "kernels/patch_embed.py",
        "mask=(k < K)[:, None], other=0.0)",
        "mask=(k >= 0)[:, None], other=0.0)",
        "tests/kernels/test_patch_embed.py -k 'triton and bf16 and dropped-pixels'",
    ),
    "patch-rows-of-the-image-not-floored": Mutant(
        "kernels/patch_embed.py",
        "            width // patch_size,",
        "            triton.cdiv(width, patch_size),",
        "tests/kernels/test_patch_embed.py -k 'triton and bf16 and dropped-pixels'",
    ),
    "uint8-scale-forgotten": Mutant(
        "kernels/patch_embed.py", "acc = acc * scale + ", "acc = acc + ", f"{_UINT8} and random and siglip'"
    ),
    "uint8-not-around-zero": Mutant(
        "kernels/patch_embed.py",
        "(pixels ^ 128).to(tl.int8, bitcast=True)",
        "pixels.to(tl.int8, bitcast=True)",
        f"{_UINT8} and random and siglip'",
    ),
    "uint8-scale-of-the-first-channel-for-all": Mutant(
        "siglip_fast/running/uint8.py", "if not (ratio == 1).all():", "if False:", f"{_UINT8} and random and imagenet'"
    ),
    "uint8-shift-of-the-unrounded-weights": Mutant(
        "siglip_fast/running/uint8.py",
        "(weight.double().sum(2) / ratio * ratio.new_tensor(t)).sum(1)",
        "(patch.weight.double().unflatten(1, (C, -1)).sum(2) * ratio.new_tensor(t)).sum(1)",
        f"{_UINT8} and bright and white'",
    ),
    "pool-phantom-tokens": Mutant(
        "kernels/attention_pool.py",
        'tl.where(tokens[None, :] < N, scores * 1.4426950408889634, float("-inf"))',
        "scores * 1.4426950408889634",
        f"{_POOL} phantom'",
    ),
    "pool-softmax-in-the-wrong-base": Mutant(
        "kernels/attention_pool.py", "scores * 1.4426950408889634", "scores", f"{_POOL} more-images'"
    ),
    "pool-value-bias-of-the-first-head": Mutant(
        "kernels/attention_pool.py",
        "bias_ptr + head * HEAD_DIM + column,",
        "bias_ptr + column,",
        f"{_POOL} more-images'",
    ),
    "pool-last-token-for-those-that-are-not-there": Mutant(
        "kernels/attention_pool.py",
        "tl.where(tokens[None, :] < N,",
        "tl.where(tokens[None, :] < N + BLOCK_N,",
        f"{_POOL} counts_once and 33'",
    ),
    "pool-last-split-for-those-that-are-not-there": Mutant(
        "kernels/attention_pool.py",
        'tl.where(split < splits, tl.load(logsumexp_ptr + row), float("-inf"))',
        "tl.load(logsumexp_ptr + row)",
        f"{_POOL} counts_once and 33'",
    ),
    "pool-splits-merged-by-their-maximum-alone": Mutant(
        "kernels/attention_pool.py", "head_max + tl.log2(head_sum)", "head_max", f"{_POOL} counts_once and 33'"
    ),
    "pool-splits-averaged": Mutant(
        "kernels/attention_pool.py",
        "weight = tl.exp2(logsumexp - new_max[:, None])",
        'weight = tl.where(logsumexp > float("-inf"), 1.0, 0.0)',
        f"{_POOL} merged and 33'",
    ),
    "pool-splits-of-before-not-rescaled": Mutant(
        "kernels/attention_pool.py",
        "out = out * alpha[:, None] + tl.sum(",
        "out = out + tl.sum(",
        f"{_POOL} merged and 261'",
    ),
}
