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
_STREAM_SPLIT = "tests/kernels/test_float32_stream.py -k 'split_k and bf16"
_STREAM = "tests/kernels/test_float32_stream.py -k 'triton and bf16 and"

_TILES = "tests/kernels/test_tiles.py -k 'triton and bf16 and"
_PERSISTENT_NORMED = f"{_TILES} test_persistent_layernorm_linear and"
_DESCRIPTORS = "tests/kernels/test_tiles.py -k 'triton and fp16 and descriptors and"
_AHEAD = "tests/backends/test_ahead.py -k"
_SEGMENTS = "tests/kernels/test_attention_segments.py -k 'triton and bf16 and"
_ROTATION = "tests/kernels/test_rotation.py -k 'triton and bf16 and accuracy and"
_MERGED = f"{_NORMED} bf16 and merged_rows'"
_ROWS = "tests/kernels/test_patch_rows.py -k 'triton and bf16 and accuracy and"
_POOL_SEGMENTS = f"{_POOL} test_segments and"
_INVARIANT = "tests/backends/test_invariant.py -k"
_PLANS = "tests/running/test_plans.py -k"
_PACKED_PLANS = "tests/running/test_packed_plans.py -k"

# Launch plans: file in siglip_fast/, old, new, tests.
_PLANNED = {
    "buffers-overlap": (
        "running/recorder.py",
        "at_once = taken.first <= buffer.last and buffer.first <= taken.last",
        "at_once = False",
        "overlap",
    ),
    "last-use-forgotten": ("running/recorder.py", "buffer.last = len(self.steps)", "pass", "'same_bits and dtype0-2'"),
    "unknown-memory-taken": (
        "running/recorder.py",
        'self.reason = f"a tensor of shape {list(tensor.shape)} comes from no operation"',
        "pass",
        "no_operation",
    ),
    "storage-numbers-used-again": (
        "running/recorder.py",
        "self._storage = StorageWeakRef(tensor.untyped_storage())",
        "pass",
        "used_again",
    ),
    "output-in-the-piece": (
        "running/recorder.py",
        "self.buffers[view.buffer].own = False",
        "pass",
        "'same_bits and dtype0-2'",
    ),
    "alignment-of-pixels": ("running/plans.py", "tensor.data_ptr() % 16,", "0,", "told_apart"),
    "old-outputs-written": ("running/plans.py", "elif bound.given != addresses:", "elif False:", "that_are_kept"),
    "profilers-see-nothing": ("running/plans.py", "or is_profiled()", "", "profilers"),
    "results-of-calls-kept": (
        "running/plans.py",
        "self._done, self._offsets = call, done, offsets",
        "self._done, self._offsets = call, [], offsets",
        "results_of_calls",
    ),
    "calls-in-autocast": ("running/plans.py", ", torch.autocast(piece.device.type, enabled=False)", "", "calls_run_as"),
}

# Launch plans of images of any size: edits of running/packed_plans.py, and tests.
_PACKED_PLANNED = {
    "every-layer-the-first": ("self._layers[id(layer)]", "next(iter(self._layers.values()))", "'test_padded_rows'"),
    "layers-that-lie-elsewhere": ("key = kind, plans.kind(x), plans.kind(m)", "key = plans.kind(x)", "elsewhere"),
    "layers-without-plan": ("if plan := self._plans.get(key):", "if plan := None:", "'test_padded_rows'"),
    "rows-that-lie-elsewhere": (
        "key = sizes, plans.kind(pixel_rows),",
        "key = sizes, pixel_rows.shape,",
        "odd_address",
    ),
    "all-sizes-the-same": ("key = sizes, plans", "key = None, plans", "squares"),
    "planned-when-they-first-come": ("next(self._times(key)) < TIMES", "False", "'before and qwen3_vl and dtype0'"),
    "not-as-a-whole-not-at-all": ("or self._plans.has_tried(key)", "", "cannot_be_planned"),
    "every-epsilon-the-first": (
        "plans.kind(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves",
        "plans.kind(leaf) for leaf in tensors",
        "epsilon",
    ),
    "profilers-see-nothing": ("run if plans.is_profiled() else PlannedLayer", "PlannedLayer", "'test_profilers'"),
    "more-remembered-than-kept": ("lru_cache(plans.MOST)", "lru_cache(None)", "so_many"),
}

# Edits of a persistent program's steps, which both kernels take, and of the loop that both hold: old and new.
_STEPS = {
    "tiles-one-apart": ("tile += tl.num_programs(0)", "tile += 1"),
    "last-tile-lost": ("tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0))", "(tiles // tl.num_programs(0))"),
    "every-tile-the-first": ("column = tile_origin(tile, M,", "column = tile_origin(tl.program_id(0), M,"),
    "tile-of-one-block-more": (
        "tl.where(block == BLOCKS - 1, 0, block + 1)",
        "tl.where(block == BLOCKS, 0, block + 1)",
    ),
    "first-block-for-all": ("row, column, block * BLOCK_K, M,", "row, column, 0, M,"),
}
_LOOP = {
    "first-tile-skipped": ("tile = tl.program_id(0) - tl.num_programs(0)", "tile = tl.program_id(0)"),
    "tile-finished-before-its-last-block": ("if block == BLOCKS - 1:", "if block == BLOCKS - 2:"),
}

# What packed images need: file in kernels/, old, new, tests.
_PACKED = {
    "segment-at-the-first-row": (
        "attention_segments.py",
        "first = tl.load(entry_ptr).to(tl.int64)",
        "first = tl.cast(0, tl.int64)",
        f"{_SEGMENTS} around-a-block'",
    ),
    "segment-one-key-more": (
        "attention_segments.py",
        "keys = tl.load(entry_ptr + 3)",
        "keys = tl.load(entry_ptr + 3) + 1",
        f"{_SEGMENTS} around-a-block'",
    ),
    "segment-rows-that-are-no-keys": (
        "attention_segments.py",
        "keys = tl.load(entry_ptr + 3)",
        "keys = queries",
        f"{_SEGMENTS} query-only-rows'",
    ),
    "segment-stores-beyond-its-end": (
        "attention_segments.py",
        "acc0 / row_sum[:, None], rows, queries, 0,",
        "acc0 / row_sum[:, None], rows, queries + 1, 0,",
        f"{_SEGMENTS} around-a-block'",
    ),
    "segment-whole-block-of-keys-twice": (
        "attention_segments.py",
        "full = tl.maximum(keys - 1, 0) // BLOCK_N * BLOCK_N",
        "full = keys // BLOCK_N * BLOCK_N",
        f"{_SEGMENTS} around-a-block'",
    ),
    "segment-tiles-all-the-first": (
        "attention_segments.py",
        "place = before * HEADS + ",
        "place = ",
        f"{_SEGMENTS} query-only-rows'",
    ),
    "segment-tiles-of-two-orders": (
        "attention_segments.py",
        "rows = place % tiles * BLOCK_M",
        "rows = before * BLOCK_M",
        f"{_SEGMENTS} query-only-rows'",
    ),
    "rotation-of-halves": (
        "rotation.py",
        "tl.split(tl.reshape(x, [BLOCK_M, BLOCK_N // 2, 2]))",
        "tl.split(tl.permute(tl.reshape(x, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))",
        f"{_ROTATION} 64'",
    ),
    "rotation-backwards": (
        "rotation.py",
        "tl.join(x0 * cos - x1 * sin, x1 * cos + x0 * sin)",
        "tl.join(x0 * cos + x1 * sin, x1 * cos - x0 * sin)",
        f"{_ROTATION} 64'",
    ),
    "rotation-axes-swapped": (
        "rotation.py",
        "first[:, None], second[:, None]",
        "second[:, None], first[:, None]",
        f"{_ROTATION} 72'",
    ),
    "rotation-axis-of-every-second-head": (
        "rotation.py",
        "columns % HEAD_DIM < AXIS",
        "columns % (2 * HEAD_DIM) < AXIS",
        f"{_ROTATION} 72'",
    ),
    "rotation-of-values": ("rotation.py", "turns = columns < N // 3 * 2", "turns = columns < N", f"{_ROTATION} 80'"),
    "rotation-of-queries-only": (
        "rotation.py",
        "turns = columns < N // 3 * 2",
        "turns = columns < N // 3",
        f"{_ROTATION} 80'",
    ),
    "merged-moments-of-the-first-row": (
        "moments.py",
        "moments_ptr, rows * MERGED + part, exists",
        "moments_ptr, rows * MERGED, exists",
        _MERGED,
    ),
    "merged-moments-of-another-row": (
        "moments.py",
        "mean, m2 = _merged_blocks(moments_ptr, rows * MERGED, exists",
        "mean, m2 = _merged_blocks(moments_ptr, rows, exists",
        _MERGED,
    ),
    "merged-means-alike": ("moments.py", " + delta * delta * (PART * part / (part + 1))", "", _MERGED),
    "erf-of-another-argument": (
        "gemm.py",
        "tl.erf(x * 0.7071067811865476)",
        "tl.erf(x * 0.7978845608)",
        f"{_NORMED} bf16 and other_gelus and erf'",
    ),
    "quick-gelu-of-another-slope": (
        "gemm.py",
        "-2.4554669595930156",
        "-2.3022081981443250",
        f"{_NORMED} bf16 and other_gelus and quick'",
    ),
    "quick-gelu-of-half-the-precision": (
        "gemm.py",
        "-2.4554669595930156",
        "-2.455",
        f"{_NORMED} fp32 and other_gelus and quick'",
    ),
    "layernorm-rows-ignored": (
        "layernorm.py",
        "source = tl.load(rows_ptr + rows, mask=exists, other=0).to(tl.int64)",
        "source = rows",
        "tests/kernels/test_layernorm.py -k 'triton and bf16 and test_rows and some'",
    ),
    "layernorm-moments-of-other-rows": (
        "layernorm.py",
        "read_moments(moments_ptr, source,",
        "read_moments(moments_ptr, rows,",
        "tests/kernels/test_layernorm.py -k 'triton and bf16 and test_rows and some'",
    ),
    "patch-rows-ignored": (
        "patch_rows.py",
        "source = row if rows_ptr is None else",
        "source = row if True else",
        f"{_ROWS} few-of-many'",
    ),
    "patch-rows-taps-weigh-one": ("patch_rows.py", "if weight_ptr is not None:", "if False:", f"{_ROWS} few-of-many'"),
    "patch-rows-one-tap": ("patch_rows.py", "in range(TAPS):", "in range(1):", f"{_ROWS} few-of-many'"),
    "patch-rows-positions-of-the-rows": (
        "patch_rows.py",
        "tl.load(index_ptr + row * TAPS + tap)",
        "tl.load(index_ptr + row * TAPS)",
        f"{_ROWS} few-of-many'",
    ),
    "pool-of-queries": (
        "attention_pool.py",
        "tl.load(table_ptr + 3 * batch + 2)",
        "tl.load(table_ptr + 3 * batch + 1)",
        f"{_POOL_SEGMENTS} uneven'",
    ),
    "pool-of-the-first-rows": (
        "attention_pool.py",
        "first = tl.load(table_ptr + 3 * batch).to(tl.int64)",
        "first = tl.cast(0, tl.int64)",
        f"{_POOL_SEGMENTS} uneven'",
    ),
    "pool-maximum-of-no-keys": (
        "attention_pool.py",
        "head_max = tl.where(split * BLOCK_N < N, head_max, 0.0)",
        "head_max = head_max",
        f"{_POOL_SEGMENTS} uneven'",
    ),
    "pool-mean-of-no-keys": (
        "attention_pool.py",
        "head_sum = tl.maximum(head_sum, 1.0)",
        "head_sum = head_sum",
        f"{_POOL_SEGMENTS} uneven'",
    ),
}

# Towers that take pixels and grids: file in siglip_fast/, old, new, tests in tests/models/.
_GRIDDED = {
    "frames-joined": ("models/gridded.py", "if self.joins_frames", "if True", "paddleocr_vl.py -k see_each_other"),
    "axes-swapped": (
        "models/gridded.py",
        "on_device = upload.add(place) if",
        "on_device = upload.add(place[:, ::-1]) if",
        "paddleocr_vl.py -k 'odd_grids and fp32'",
    ),
    "last-state-untied": (
        "models/gridded.py",
        "if self.ties_hidden_states and",
        "if False and",
        "gridded.py -k 'forms_of_the_output and kimi'",
    ),
    "dtypes-mixed": ("models/gridded.py", "if not self.casts and", "if False and", "kimi_k25.py -k not_cast"),
    "paddle-projects-rasters": (
        "running/grids.py",
        "source.T.reshape(-1) for",
        "np.sort(source, 0).T.reshape(-1) for",
        "projectors.py -k 'accuracy and float32'",
    ),
    "paddle-projects-frames-as-one": (
        "running/grids.py",
        "source.T.reshape(-1) for",
        "source.reshape(-1) for",
        "projectors.py -k 'accuracy and float32'",
    ),
    "paddle-projects-under-hooks": (
        "models/projectors.py",
        "next(filter(None, map(interception, self.children())), None)",
        "None",
        "projectors.py -k hook",
    ),
    "naflex-autocast-left-on": (
        "models/weights.py",
        "self._forward_packed = forward_packed if dtype is None else forward_packed_in_autocast",
        "self._forward_packed = forward_packed",
        "autocast.py -k own_dtypes",
    ),
    "naflex-positions-in-autocast": (
        "models/siglip2.py",
        "position=Position(table, index()),",
        "position=Position(table.to(derived.weights.patch.weight.dtype), index()),",
        "autocast.py -k NaFlex",
    ),
    "paddle-corners": (
        "models/paddleocr_vl.py",
        "math.isqrt(len(learned)), align_corners,",
        "math.isqrt(len(learned)), not align_corners,",
        "paddleocr_vl.py -k 'odd_grids and fp32'",
    ),
    "kimi-frames-apart": (
        "models/kimi_k25.py",
        "joins_frames = True",
        "joins_frames = False",
        "kimi_k25.py -k see_each_other",
    ),
    "kimi-width-first": (
        "models/kimi_k25.py",
        ".flip(3)",
        "",
        "gridded.py -k 'accuracy and fp32-videos and kimi and torch'",
    ),
    "kimi-rows-of-one-image": (
        "models/kimi_k25.py",
        "ranges(offsets, np.prod(grids, axis=1))",
        "ranges(offsets * 0, np.prod(grids, axis=1))",
        "gridded.py -k 'accuracy and fp32-images and kimi and torch'",
    ),
    "kimi-first-frame-only": (
        "running/grids.py",
        "h * w * np.arange(t)",
        "0 * np.arange(t)",
        "gridded.py -k 'accuracy and fp32-videos and kimi and torch'",
    ),
    "video-llama-corner-of-the-square": (
        "models/video_llama_3.py",
        "middle - 1 : middle + 1, middle - 1 : middle + 1",
        "0:2, 0:2",
        "video_llama_3.py -k 'merge_sizes and fp32'",
    ),
    "video-llama-raster": (
        "models/video_llama_3.py",
        "return [merge for *_, merge in grids]",
        "return [1 for *_, merge in grids]",
        "video_llama_3.py -k 'merge_sizes and fp32'",
    ),
    "cosmos-frames-behind-each-other": (
        "models/gridded.py",
        "np.repeat(offsets, [t for t, _, _ in grids])",
        "np.resize(offsets, sum(t for t, _, _ in grids))",
        "gridded.py -k 'accuracy and fp32-videos and cosmos3 and torch'",
    ),
    "cosmos-merge-size-of-before": (
        "models/cosmos3_edge.py",
        "sizes = [(h, w, self._side) for",
        "sizes = [(h, w, 2) for",
        "cosmos3_edge.py -k merge_size_of_the_config",
    ),
    "squares-as-rasters": (
        "models/gridded.py",
        "        return self._side\n\n    def _grids_reason",
        "        return 1\n\n    def _grids_reason",
        "gridded.py -k 'accuracy and fp32-images and qwen2_vl and torch'",
    ),
    "no-positions-are-ones": (
        "models/gridded.py",
        "new_zeros(1, len(weight))",
        "new_ones(1, len(weight))",
        "gridded.py -k 'accuracy and fp32-images and qwen2_vl and torch'",
    ),
    "no-bias-is-one": (
        "models/weights.py",
        "new_zeros(len(projection.weight))",
        "new_ones(len(projection.weight))",
        "gridded.py -k 'accuracy and fp32-images and qwen2_vl and torch'",
    ),
    "qwen2-vl-exact-gelu": (
        "models/qwen2_vl.py",
        'activation="quick"',
        'activation="erf"',
        "gridded.py -k 'accuracy and fp32-images and qwen2_vl and torch'",
    ),
    "ernie-without-its-last-norm": (
        "models/ernie4_5_vl.py",
        "post_layernorm=tower.ln",
        "post_layernorm=None",
        "gridded.py -k 'accuracy and fp32-images and ernie and torch'",
    ),
    "ernie-last-state-untied": (
        "models/ernie4_5_vl.py",
        "ties_hidden_states = True",
        "ties_hidden_states = False",
        "gridded.py -k 'forms_of_the_output and ernie'",
    ),
    "ernie-logits-of-routers": (
        "models/ernie4_5_vl.py",
        'if asked_for("output_router_logits", self.config, kwargs):',
        "if False:",
        "ernie4_5_vl.py -k routers",
    ),
    "hunyuan-first-position-too": (
        "models/hunyuan_vl.py",
        "position_embedding.weight[1:]",
        "position_embedding.weight[:-1]",
        "hunyuan_vl.py -k 'odd_grids and fp32 and hunyuan'",
    ),
    "hunyuan-scales-unrounded": (
        "running/grids.py",
        "axis=0).astype(np.float32)  # [M, 2]\n    return _taps",
        "axis=0)  # [M, 2]\n    return _taps",
        "hunyuan_vl.py -k as_torch_does",
    ),
    "hunyuan-images-on-their-side": (
        "models/hunyuan_vl.py",
        "size=(h, w))",
        "size=(w, h))",
        "hunyuan_vl.py -k 'odd_grids and fp32'",
    ),
    "hunyuan-videos": (
        "models/hunyuan_vl.py",
        "takes_videos: ClassVar[bool] = False",
        "takes_videos: ClassVar[bool] = True",
        "hunyuan_vl.py -k what_the_merger_does_not_take",
    ),
    "hunyuan-one-row-of-patches": (
        "models/hunyuan_vl.py",
        "return max(2, ",
        "return max(1, ",
        "hunyuan_vl.py -k other_squares",
    ),
    "hunyuan-any-interpolation": (
        "models/hunyuan_vl.py",
        '.interpolate_mode) != "bilinear"',
        '.interpolate_mode) == "nearest"',
        "hunyuan_vl.py -k another_interpolation",
    ),
    "hunyuan-without-the-leading-dimension": (
        "models/hunyuan_vl.py",
        "None if t is None else t[None] for",
        "None if t is None else t for",
        "gridded.py -k 'forms_of_the_output and hunyuan'",
    ),
}

_GRAPHS = "tests/running/test_packed_graphs.py -k"
_CAPTURED = {
    "of-a-larger-call-before": ("own[len(given) :].zero_()", "own[len(given) :]", "naflex_calls"),
    "rows-in-their-order": ("y.index_select(0, call.out_rows)", "y[: len(call.out_rows)].clone()", "naflex_calls"),
    "positions-of-the-last-call": ("if self.has_own_positions else None", "if False else None", "naflex_calls"),
    "a-table-that-moved": ("rotation.table is not graph", "rotation.table is graph", "longer_image"),
}

MUTANTS = {
    "stream-rounded-around-its-mean": Mutant(
        "kernels/layernorm_linear.py",
        "centred = moments is not None and x.dtype",
        "centred = moments is not None and weight.dtype",
        f"{_STREAM} layernorm_linear and 37 and plain'",
    ),
    "stream-mean-taken-out-twice": Mutant(
        "kernels/layernorm_linear.py",
        "None if centred else colsum",
        "colsum",
        f"{_STREAM} layernorm_linear and 37 and plain'",
    ),
    "stream-rounded-after-the-residual": Mutant(
        "kernels/linear_residual.py",
        "dtype = x.dtype if residual is None else residual.dtype",
        "dtype = x.dtype",
        f"{_STREAM} linear_residual and 37'",
    ),
    "stream-rounded-by-the-epilogue": Mutant(
        "kernels/residual_epilogue.py",
        "stored = out.to(out_ptr.dtype.element_ty)",
        "stored = out.to(bias_ptr.dtype.element_ty).to(out_ptr.dtype.element_ty)",
        f"{_STREAM_SPLIT}'",
    ),
    "stream-rounded-before-the-epilogue": Mutant(
        "kernels/linear_residual.py",
        "sums = empty((splits, M, N), torch.float32,",
        "sums = empty((splits, M, N), x.dtype,",
        f"{_STREAM_SPLIT}'",
    ),
    "stream-begins-rounded": Mutant(
        "kernels/patch_embed.py",
        "out = empty((B, N, D), position.dtype",
        "out = empty((B, N, D), weight.dtype",
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
    "attention-tail-skipped": Mutant("kernels/attention.py", "if TAIL_N > 0:", "if False:", f"{_ATTENTION} d-32'"),
    "attention-tail-too-narrow": Mutant(
        "kernels/attention.py",
        "max(16, triton.next_power_of_2(N % BLOCK_N))",
        "max(16, triton.next_power_of_2(N % BLOCK_N) // 2)",
        f"{_ATTENTION} so400m-384-and-one'",
    ),
    "attention-tail-once-more-in-the-loop": Mutant(
        "kernels/attention.py", "range(0, full, BLOCK_N)", "range(0, N, BLOCK_N)", f"{_ATTENTION} d-32'"
    ),
    "attention-maximum-without-scale": Mutant(
        "kernels/attention.py", "scale * tl.max(scores, axis=1)", "tl.max(scores, axis=1)", f"{_ATTENTION} d-32'"
    ),
    "attention-scores-without-scale": Mutant(
        "kernels/attention.py", "tl.exp2(scores * scale - new_max", "tl.exp2(scores - new_max", f"{_ATTENTION} d-32'"
    ),
    "attention-softmax-in-the-wrong-base": Mutant(
        "kernels/attention.py", "d**-0.5 * 1.4426950408889634", "d**-0.5", f"{_ATTENTION} d-32'"
    ),
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
        "for step in range(0, PART, BLOCK_K):",
        "for step in range(0, K // BLOCK_K * BLOCK_K, BLOCK_K):",
        f"{_RESIDUAL} bf16 and N-and-K'",
    ),
    "gemm-k-tail-not-masked": Mutant(
        "kernels/gemm.py", "elif K % (BLOCK_K * SPLIT_K) == 0:", "elif K > 0:", f"{_RESIDUAL} bf16 and N-and-K'"
    ),
    "gemm-rows-not-clamped": Mutant(
        "kernels/gemm.py",
        "K tail's.\n        rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)",
        "K tail's.\n        rows = row + tl.arange(0, BLOCK_M)",
        f"{_RESIDUAL} bf16 and N-and-K'",
    ),
    "gemm-columns-not-clamped": Mutant(
        "kernels/gemm.py",
        "columns = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1)\n        offs_k = tl.arange",
        "columns = column + tl.arange(0, BLOCK_N)\n        offs_k = tl.arange",
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
        "kernels/gemm.py", " - 0.1029432395800235 * (x * x)", "", f"{_NORMED} bf16 and gelu and K-no'"
    ),
    "gelu-of-another-cube": Mutant(
        "kernels/gemm.py", "0.1029432395800235", "0.1019432395800235", f"{_NORMED} fp32 and gelu and K-no'"
    ),
    "gelu-in-the-wrong-base": Mutant(
        "kernels/gemm.py", "1.0 + tl.exp2(v)", "1.0 + tl.exp(v)", f"{_NORMED} bf16 and gelu and K-no'"
    ),
    "gelu-of-a-square-root": Mutant(
        "kernels/gemm.py", "return x * r * r", "return x * r", f"{_NORMED} bf16 and gelu and K-no'"
    ),
    "halves-of-every-second-column": Mutant(
        "kernels/gemm.py",
        "tl.permute(tl.reshape(x, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])",
        "tl.reshape(x, [BLOCK_M, BLOCK_N // 2, 2])",
        f"{_NORMED} bf16 and plain and M-3'",
    ),
    "layernorm-right-half-over-the-left": Mutant(
        "kernels/layernorm_linear.py", "column + HALF", "column", f"{_NORMED} bf16 and plain and M-3'"
    ),
    "residual-right-half-over-the-left": Mutant(
        "kernels/linear_residual.py", "column + HALF", "column", f"{_RESIDUAL} bf16 and gfx11'"
    ),
    "split-k-parts-one-block-short": Mutant(
        "kernels/gemm.py",
        "for step in range(0, PART, BLOCK_K):",
        "for step in range(0, PART - BLOCK_K, BLOCK_K):",
        f"{_SPLIT} parts-of'",
    ),
    "split-k-parts-overlap": Mutant(
        "kernels/gemm.py", "range(0, PART, BLOCK_K)", "range(0, K, BLOCK_K)", f"{_SPLIT} parts-of'"
    ),
    "split-k-parts-beyond-k-not-masked": Mutant(
        "kernels/gemm.py", "elif K % (BLOCK_K * SPLIT_K) == 0:", "elif K % BLOCK_K == 0:", f"{_SPLIT} parts-of'"
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
        "K.\n            x = x_ptr.load([row.to(tl.int32), k])",
        "K.\n            x = x_ptr.load([0, k])",
        f"{_RESIDUAL} fp16 and descriptors and whole'",
        interpreted=True,
    ),
    "tensor-descriptor-at-the-first-column": Mutant(
        "kernels/gemm.py",
        "            w = w_ptr.load([column, k]).T",
        "            w = w_ptr.load([0, k]).T",
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
        "            acc -= mean[:, None] * colsum[None, :]\n",
        "",
        f"{_NORMED} bf16 and plain and M-3'",
    ),
    "layernorm-eps-of-its-own": Mutant(
        "kernels/layernorm_linear.py",
        "# [BLOCK_M]\n        mean, rstd = _mean_and_rstd(moments_ptr, row, M, K, eps,",
        "# [BLOCK_M]\n        mean, rstd = _mean_and_rstd(moments_ptr, row, M, K, 1e-6,",
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
        "\n        mask = (rows[:, None] < M) & (columns[None, :] < N)",
        "\n        mask = (rows[:, None] < M) & (columns[None, :] >= 0)",
        f"{_RESIDUAL} bf16 and N-and-K'",
    ),
    "split-k-column-tail-not-masked": Mutant(
        "kernels/linear_residual.py",
        "\n            mask = (rows[:, None] < M) & (columns[None, :] < N)",
        "\n            mask = (rows[:, None] < M) & (columns[None, :] >= 0)",
        f"{_SPLIT} parts-of'",
    ),
    "split-k-row-tail-not-masked": Mutant(
        "kernels/linear_residual.py",
        "\n            mask = (rows[:, None] < M) & (columns[None, :] < N)",
        "\n            mask = (rows[:, None] >= 0) & (columns[None, :] < N)",
        f"{_SPLIT} parts-of'",
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
        "m2 = tl.sum(x * x, axis=2) - mean * mean * MOMENT_BLOCK",
        "tests/kernels/test_linear_residual.py -k large_mean",
    ),
    "moments-of-whole-blocks-not-divided": Mutant(
        "kernels/moments.py",
        "mean = tl.sum(x, axis=2) * (1.0 / MOMENT_BLOCK)",
        "mean = tl.sum(x, axis=2)",
        f"{_RESIDUAL} bf16 and M-3'",
    ),
    "moments-of-ragged-blocks-as-of-whole-ones": Mutant(
        "kernels/moments.py", "if ROW_BLOCKS * MOMENT_BLOCK == D:", "if D > 0:", f"{_RESIDUAL} bf16 and N-and-K'"
    ),
    "moments-merged-without-the-spread-of-the-means": Mutant(
        "kernels/moments.py",
        "tl.sum(m2, axis=1) + tl.sum(delta * delta * count[None, :], axis=1)",
        "tl.sum(m2, axis=1)",
        "tests/kernels/test_layernorm.py -k 'triton and bf16 and 3-72'",
    ),
    "moments-without-eps": Mutant(
        "kernels/moments.py",
        "tl.rsqrt(m2 / D + eps)",
        "tl.rsqrt(m2 / D)",
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
    "persistent-layernorm_linear-sums-not-begun-anew": Mutant(
        "kernels/layernorm_linear.py", "tl.where(block == BLOCKS - 1, 0.0, acc)", "acc", f"{_PERSISTENT_NORMED} five'"
    ),
    "persistent-layernorm_linear-sums-not-begun-anew-on-blackwell": Mutant(
        "kernels/layernorm_linear.py",
        "\n                    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)\n",
        "\n                    pass\n",
        f"{_PERSISTENT_NORMED} five'",
    ),
    "persistent-linear_residual-sums-not-begun-anew": Mutant(
        "kernels/linear_residual.py",
        "\n                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)\n",
        "\n",
        f"{_TILES} test_persistent_linear_residual and five'",
    ),
    "persistent-moments-of-the-first-rows": Mutant(
        "kernels/layernorm_linear.py",
        "                mean, rstd = _mean_and_rstd(moments_ptr, row,",
        "                mean, rstd = _mean_and_rstd(moments_ptr, 0,",
        f"{_PERSISTENT_NORMED} five'",
    ),
    "persistent-eps-of-its-own": Mutant(
        "kernels/layernorm_linear.py",
        "                mean, rstd = _mean_and_rstd(moments_ptr, row, M, K, eps,",
        "                mean, rstd = _mean_and_rstd(moments_ptr, row, M, K, 1e-6,",
        f"{_PERSISTENT_NORMED} five'",
    ),
    "persistent-rows-not-clamped": Mutant(
        "kernels/gemm.py",
        "else:\n        rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)",
        "else:\n        rows = row + tl.arange(0, BLOCK_M)",
        f"{_PERSISTENT_NORMED} one-tile'",
    ),
    "persistent-columns-not-clamped": Mutant(
        "kernels/gemm.py",
        "columns = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1)\n        offs_k = k",
        "columns = column + tl.arange(0, BLOCK_N)\n        offs_k = k",
        f"{_PERSISTENT_NORMED} one-tile'",
    ),
    "persistent-k-tail-of-x-not-masked": Mutant(
        "kernels/gemm.py", ", mask=offs_k[None, :] < K, other=0.0)", ")", f"{_PERSISTENT_NORMED} one-tile'"
    ),
    "persistent-k-tail-of-w-not-masked": Mutant(
        "kernels/gemm.py", ", mask=offs_k[:, None] < K, other=0.0)", ")", f"{_PERSISTENT_NORMED} one-tile'"
    ),
    "persistent-descriptor-at-the-first-row": Mutant(
        "kernels/gemm.py",
        "if TMA:\n        x = x_ptr.load([row.to(tl.int32), k])",
        "if TMA:\n        x = x_ptr.load([0, k])",
        f"{_DESCRIPTORS} five'",
        interpreted=True,
    ),
    "persistent-descriptor-at-the-first-column": Mutant(
        "kernels/gemm.py",
        "\n        w = w_ptr.load([column, k]).T",
        "\n        w = w_ptr.load([0, k]).T",
        f"{_DESCRIPTORS} five'",
        interpreted=True,
    ),
    "tail-a-tile-late": Mutant(
        "kernels/linear_residual.py",
        "(slice(rows, None), tail)",
        '(slice(rows + config["BLOCK_M"], None), tail)',
        f"{_TILES} test_tail and 97 and short'",
    ),
    "tail-lost": Mutant(
        "kernels/linear_residual.py", ", (slice(rows, None), tail)):", ",):", f"{_TILES} test_tail and 97 and short'"
    ),
    "tail-moments-among-the-first": Mutant(
        "kernels/linear_residual.py",
        "moments[part], tile)",
        "moments[: len(of_x)], tile)",
        f"{_TILES} test_tail and 97 and short'",
    ),
    "tail-after-all-whole-tiles": Mutant(
        "kernels/tiles.py",
        "* across // sms * sms // across",
        "* across // across",
        f"{_TILES} test_tail and 97 and short'",
    ),
    "tail-after-a-ragged-tile": Mutant(
        "kernels/tiles.py",
        'M // tile["BLOCK_M"] * across //',
        'triton.cdiv(M, tile["BLOCK_M"]) * across //',
        f"{_TILES} test_tail and 97 and short'",
    ),
    "ahead-without-split-k": Mutant(
        "siglip_fast/backends/ahead.py",
        "tma=True, split=True)",
        "tma=True)",
        f"{_AHEAD} compiles_all",
        interpreted=True,
    ),
    "ahead-compiles-for-one-number-of-rows": Mutant(
        "kernels/linear_residual.py",
        '@triton.jit(do_not_specialize=["M"])',
        "@triton.jit",
        f"{_AHEAD} compiles_all",
        interpreted=True,
    ),
    "ahead-each-time": Mutant(
        "siglip_fast/backends/ahead.py",
        "            self._loaded.add(key)\n",
        "",
        f"{_AHEAD} test_once",
        interpreted=True,
    ),
    "ahead-during-a-capture": Mutant(
        "siglip_fast/backends/ahead.py", " or is_capturing(tensor)", "", f"{_AHEAD} capture", interpreted=True
    ),
    "ahead-up-to-the-first-that-does-not-run": Mutant(
        "siglip_fast/backends/ahead.py",
        "except Exception as error",
        "except NotImplementedError as error",
        f"{_AHEAD} stops_nothing",
        interpreted=True,
    ),
    "invariant-splits-k": Mutant(
        "siglip_fast/backends/invariant.py",
        "gemm_default(dtype, arch, ROWS, *dims[:2])",
        "gemm_default(dtype, arch, 196, *dims[:2], split=True)",
        f"{_INVARIANT} 'one_configuration and fp16 and base'",
        interpreted=True,
    ),
    "invariant-pixels-as-they-lie": Mutant(
        "siglip_fast/backends/triton.py",
        "pixel_values = _laid_out(pixel_values)",
        "pass",
        f"{_INVARIANT} laid_out",
        interpreted=True,
    ),
    "invariant-loads-what-it-never-runs": Mutant(
        "siglip_fast/backends/triton.py",
        "return [selection.choice(name, dims, dtype)]",
        "return [DEFAULT, selection.choice(name, dims, dtype)]",
        f"{_INVARIANT} 'machine_code and sm_90-ahead'",
        interpreted=True,
    ),
    "invariant-two-images-at-once": Mutant(
        "siglip_fast/ops.py",
        "            return 1\n",
        "            return 2\n",
        "tests/models/test_batch_invariance.py -k library",
        interpreted=True,
    ),
    **{
        f"plan-{name}": Mutant(f"siglip_fast/{file}", old, new, f"{_PLANS} {tests}", interpreted=True)
        for name, (file, old, new, tests) in _PLANNED.items()
    },
    **{
        f"packed-plan-{name}": Mutant(
            "siglip_fast/running/packed_plans.py", old, new, f"{_PACKED_PLANS} {tests}", interpreted=True
        )
        for name, (old, new, tests) in _PACKED_PLANNED.items()
    },
    **{f"packed-{name}": Mutant(f"kernels/{file}", *edit) for name, (file, *edit) in _PACKED.items()},
    "invariant-equal-images-their-own-way": Mutant(
        "siglip_fast/ops.py",
        "return None if self.batch_invariant else segments.length",
        "return segments.length",
        "tests/kernels/test_attention_segments.py -k 'fp16 and test_bits'",
        interpreted=True,
    ),
    **{
        f"graph-{name}": Mutant(
            "siglip_fast/running/packed_graphs.py", old, new, f"{_GRAPHS} {tests}", interpreted=True
        )
        for name, (old, new, tests) in _CAPTURED.items()
    },
    **{
        f"gridded-{name}": Mutant(f"siglip_fast/{file}", old, new, f"tests/models/test_{tests}", interpreted=True)
        for name, (file, old, new, tests) in _GRIDDED.items()
    },
    # The mode is asked for, and configurations depend on the number of rows all the same.
    **{
        f"invariant-by-the-rows-{name}": Mutant(
            "siglip_fast/backends/triton.py",
            "self._selection_on = Invariant if batch_invariant else selection_on",
            "self._selection_on = selection_on",
            f"{_INVARIANT} 'test_rows and fp16-sm_90 and {name}'",
            interpreted=True,
        )
        for name in ("attention", "fc2", "pool")
    },
    **{
        f"persistent-{kernel}-{name}": Mutant(file, *edit, f"{_TILES} test_persistent_{kernel} and five'")
        for kernel in ("layernorm_linear", "linear_residual")
        for file, edits in (("kernels/gemm.py", _STEPS), (f"kernels/{kernel}.py", _LOOP))
        for name, edit in edits.items()
    },
}
