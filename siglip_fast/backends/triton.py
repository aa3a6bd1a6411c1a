"""The operations on the fused Triton kernels, or by the vendor's route where that was measured to be the faster one.

Contracts are in `siglip_fast.ops`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from siglip_fast.kernels.attention import attention
from siglip_fast.kernels.attention_pool import attention_pool, attention_pool_segments
from siglip_fast.kernels.attention_segments import attention_segments
from siglip_fast.kernels.gemm import gpu_arch, input_precision
from siglip_fast.kernels.launch import call, recording
from siglip_fast.kernels.layernorm import layernorm
from siglip_fast.kernels.layernorm_linear import layernorm_linear, linear
from siglip_fast.kernels.linear_residual import linear_residual
from siglip_fast.kernels.patch_embed import patch_embed
from siglip_fast.kernels.patch_rows import patch_rows

from . import vendor
from .ahead import DEFAULTS, Loader
from .choice import DEFAULT, Choice
from .invariant import Invariant
from .select import is_for_graph
from .torch import ACTIVATIONS, cast, pack

LOADER = Loader()  # of the whole process, as Triton's kernels are


class Backend:
    """The operations, each as `selection_on` its tensors' device says for its shape; without one, by default; batch
    invariant, by one configuration for all numbers of rows."""

    pack = staticmethod(pack)

    def __init__(self, selection_on: Callable[[torch.device], Any] | None = None, batch_invariant: bool = False):
        self._selection_on = Invariant if batch_invariant else selection_on
        self._batch_invariant = batch_invariant
        self._selections: dict[torch.device, Any] = {}  # loaded when a device is first met

    @classmethod
    def fixed(cls, choice: Choice) -> "Backend":
        """The operations by this choice whatever their shape, as tuning measures them."""
        backend = cls()
        backend._run = lambda name, dims, tensors, rows, few, args: RUN[name](choice, *args)
        return backend

    def patch_embed(self, pixel_values, patch, position):
        if self._batch_invariant:
            pixel_values = _laid_out(pixel_values)
        dims = (*patch.weight.shape, patch.patch_size, len(position))
        rows, few = len(pixel_values) * len(position), lambda: (pixel_values[:1], patch, position)
        tensors = (patch.weight, pixel_values, position)
        return self._run("patch_embed", dims, tensors, rows, few, (pixel_values, patch, position))

    def patch_embed_rows(self, pixel_rows, patch, position, rows):
        if self._batch_invariant:
            pixel_rows = _laid_out(pixel_rows)
        table, index, weight = position
        dims, tensors = (*patch.weight.shape, index.shape[1]), (patch.weight, pixel_rows, table)
        few = lambda: (pixel_rows, patch, rows, table, index[:1], None if weight is None else weight[:1])  # noqa: E731
        return self._run(
            "patch_embed_rows", dims, tensors, len(index), few, (pixel_rows, patch, rows, table, index, weight)
        )

    def layernorm_linear(self, hidden_states, moments, linear, activation, rotation):
        K = linear.weight.shape[1]
        args = (hidden_states, moments, linear, activation, rotation)
        rows, dims = hidden_states.numel() // K, (*linear.weight.shape, ACTIVATIONS.index(activation))
        merged = len(moments) // max(1, rows)
        if activation not in (None, "tanh") or rotation is not None or merged > 1:
            dims = (*dims, merged, 0 if rotation is None else 4 * rotation.table.shape[1])
        few = lambda: (  # noqa: E731
            hidden_states.view(-1, K)[:1], moments[:merged], linear, activation,
            rotation and rotation._replace(place=rotation.place[:1]),
        )  # fmt: skip
        return self._run("layernorm_linear", dims, (hidden_states, linear.weight), rows, few, args)

    def linear(self, x, linear, activation):
        dims, K = (*linear.weight.shape, ACTIVATIONS.index(activation)), linear.weight.shape[1]
        few = lambda: (x.view(-1, K)[:1], linear, activation)  # noqa: E731
        return self._run("linear", dims, (x,), x.numel() // K, few, (x, linear, activation))

    def attention(self, qkv):
        B, *dims = qkv.shape[:2] + qkv.shape[3:]
        return self._run("attention", tuple(dims), (qkv,), B, lambda: (qkv[:1],), (qkv,))

    def attention_segments(self, qkv, segments):
        tiles = segments.schedule.items()
        few = lambda: (qkv, segments._replace(schedule={rows: entries[:1] for rows, entries in tiles}))  # noqa: E731
        return self._run("attention_segments", tuple(qkv.shape[2:]), (qkv,), len(qkv), few, (qkv, segments))

    def linear_residual(self, x, linear, residual):
        N, K = linear.weight.shape
        dims = (N, K, residual is not None)
        few = lambda: (x.view(-1, K)[:1], linear, None if residual is None else residual.view(-1, N)[:1])  # noqa: E731
        tensors = (x,) if residual is None else (x, residual)
        return self._run("linear_residual", dims, tensors, x.numel() // K, few, (x, linear, residual))

    def layernorm(self, hidden_states, moments, norm, rows):
        D = hidden_states.shape[-1]
        args = (hidden_states, moments, norm, rows)
        if rows is not None:
            few = lambda: (*args[:3], rows[:1])  # noqa: E731
            return self._run("layernorm", (D, True), (hidden_states,), len(rows), few, args)
        count, few = hidden_states.numel() // D, lambda: (hidden_states.view(-1, D)[:1], moments[:1], norm, None)
        return self._run("layernorm", (D,), (hidden_states,), count, few, args)

    def cast(self, x, dtype):
        return x if x.dtype == dtype else call(cast, x, dtype)

    def attention_pool(self, hidden_states, pool):
        B, N, D = hidden_states.shape
        few = lambda: (hidden_states[:1], pool)  # noqa: E731
        dims = (N, D, len(pool.scores))
        return self._run("attention_pool", dims, (hidden_states,), B, few, (hidden_states, pool))

    def attention_pool_segments(self, hidden_states, pool, segments):
        few = lambda: (hidden_states, pool, type(segments)(*(p[:1] for p in segments[:4]), {}))  # noqa: E731
        dims, args = (hidden_states.shape[-1], len(pool.scores)), (hidden_states, pool, segments)
        return self._run("attention_pool_segments", dims, (hidden_states,), len(segments.keys), few, args)

    def _run(self, name: str, dims: tuple[int, ...], tensors: tuple, rows: int, few: Callable, args: tuple):
        """By the choice for so many rows; before the first time, `few()` by every one that there is for any number.

        `tensors`: those whose dtypes make a difference.
        """
        tensor, dtype, run = tensors[0], _dtype_of(tensors), RUN[name]
        selection = self.selection(tensor.device)
        key = (name, dims, tensor.device, selection and selection.digest, *_specialised(args))
        with recording(None):  # of the forward that is running
            LOADER.load(key, tensor, lambda: _choices(name, dims, tensors, selection), lambda each: run(each, *few()))
            if selection is not None:
                selection.settle(name, dims, dtype, rows, run, args)
        launch = "graph" if is_for_graph() else "eager"
        choice = selection.choice(name, dims, dtype, rows, launch) if selection else DEFAULT
        return run(choice, *args) if choice.route == "triton" else call(run, choice, *args)

    def selection(self, device: torch.device) -> Any:
        """What chooses there, None where everything runs by default."""
        if self._selection_on is None:
            return None
        selection = self._selections.get(device)
        if selection is None:
            # One for all threads, or one's races would not hold for another's forward.
            selection = self._selections.setdefault(device, self._selection_on(device))
        return selection


def _laid_out(pixel_values: torch.Tensor) -> torch.Tensor:
    """Contiguous and aligned: Triton compiles a kernel of its own for other strides and addresses, as slices of a batch
    have them."""
    if not pixel_values.is_contiguous() or pixel_values.data_ptr() % 16:
        pixel_values = call(_copied, pixel_values)
    return pixel_values.view(-1).view(pixel_values.shape)  # a batch of one may have had any stride


def _copied(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values.clone(memory_format=torch.contiguous_format)


def _specialised(args: tuple) -> Iterator:
    """What beside their shapes Triton tells kernels apart by: dtypes, TF32, and the layout of pixels."""
    for arg in args:
        tensor = getattr(arg, "weight", arg)
        if isinstance(tensor, torch.Tensor):
            yield tensor.dtype
            if tensor.dtype == torch.float32:
                yield input_precision(tensor.dtype)
            if tensor.ndim == 4:
                yield tensor.stride()[1:]


def _dtype_of(tensors: tuple[torch.Tensor, ...]) -> torch.dtype | str:
    """That of all, or the names of several: an operation on these is another one, with choices of its own."""
    dtypes = {tensor.dtype: None for tensor in tensors}
    if len(dtypes) == 1:
        return tensors[0].dtype
    return "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _choices(name: str, dims: tuple[int, ...], tensors: tuple, selection: Any) -> list[Choice]:
    """All that an operation may run by, whatever the number of rows."""
    dtype = _dtype_of(tensors)
    if isinstance(selection, Invariant):
        return [selection.choice(name, dims, dtype)]
    measured = selection.choices(name, dims, dtype) if selection else []
    defaults = DEFAULTS[name](dims, tensors[0].dtype, gpu_arch())
    return [DEFAULT, *measured, *(Choice("triton", config) for config in defaults)]


def _run_patch_embed(choice, pixel_values, patch, position):
    weight, bias, patch_size, scale, _ = patch
    if choice.route != "triton" and pixel_values.dtype != torch.uint8:  # bytes only our kernel reads
        return vendor.patch_embed(pixel_values, patch, position)
    return patch_embed(pixel_values, weight, bias, position, patch_size, scale, choice.config)


def _run_patch_embed_rows(choice, pixel_rows, patch, rows, table, index, weight):
    if choice.route != "triton":
        return vendor.patch_embed_rows(pixel_rows, patch, rows, table, index, weight)
    return patch_rows(pixel_rows, patch.weight, patch.bias, rows, table, index, weight, choice.config)


def _run_layernorm_linear(choice, hidden_states, moments, linear, activation, rotation):
    weight, colsum, bias, eps, _ = linear
    if choice.route != "triton":
        return vendor.layernorm_linear(hidden_states, moments, linear, activation, rotation)
    config = _fitting(choice.config, hidden_states, weight)
    return layernorm_linear(hidden_states, moments, weight, colsum, bias, eps, activation, rotation, config)


def _run_linear(choice, x, of, activation):
    if choice.route != "triton":
        return vendor.linear(x, of, activation)
    return linear(x, of.weight, of.bias, activation, _fitting(choice.config, x, of.weight))


def _run_attention(choice, qkv):
    return attention(qkv, choice.config) if choice.route == "triton" else vendor.attention(qkv, choice.route)


def _run_attention_segments(choice, qkv, segments):
    return attention_segments(qkv, max(segments.queries), segments.schedule, choice.config)


def _run_linear_residual(choice, x, linear, residual):
    weight, bias, _ = linear
    if choice.route != "triton":
        return vendor.linear_residual(x, linear, residual)
    return linear_residual(x, weight, bias, residual, _fitting(choice.config, x, weight))


def _run_layernorm(choice, hidden_states, moments, norm, rows):
    if choice.route != "triton":
        return vendor.layernorm(hidden_states, moments, norm, rows)
    return layernorm(hidden_states, moments, *norm, rows, choice.config)


def _run_attention_pool(choice, hidden_states, pool):
    if choice.route != "triton":
        return vendor.attention_pool(hidden_states, pool)
    return attention_pool(hidden_states, pool.scores, pool.value.weight, pool.value.bias, choice.config)


def _run_attention_pool_segments(choice, hidden_states, pool, segments):
    scores, (weight, bias, _) = pool
    return attention_pool_segments(
        hidden_states, segments.table, max(segments.keys), scores, weight, bias, choice.config
    )


RUN = {
    "patch_embed": _run_patch_embed,
    "patch_embed_rows": _run_patch_embed_rows,
    "layernorm_linear": _run_layernorm_linear,
    "linear": _run_linear,
    "attention": _run_attention,
    "attention_segments": _run_attention_segments,
    "linear_residual": _run_linear_residual,
    "layernorm": _run_layernorm,
    "attention_pool": _run_attention_pool,
    "attention_pool_segments": _run_attention_pool_segments,
}


def _fitting(config: dict | None, *operands: torch.Tensor) -> dict | None:
    """None, the default, instead of tensor descriptors where a parameter lies at an address that they cannot take."""
    if config and config.get("TMA") and any(tensor.data_ptr() % 16 for tensor in operands):
        return None
    return config
