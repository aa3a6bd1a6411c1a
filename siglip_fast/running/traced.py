"""The tower as one library operation, which is what torch.compile puts into its graph.

The operation runs the model's ordinary forward when the graph runs, so whatever that checks in eager mode (edited
weights, hooks) it checks then. A graph knows tensors only. So the operation takes a handle that tells the model, and
the weights as tensors of the graph: those are what it computes with, even where they are not the model's own memory.

Why handles are renewed: a graph that edits weights counts the edits when it begins, not where they happen. Derived
weights that were made inside such a graph could be out of date a moment later, and nothing would show it.
"""

import itertools
import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..ops import check_shape

# The models, of which this knows what `siglip_fast.models.traced.Traced` has
_models: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Handle:
    """What a model passes to the operation, an int64 on the CPU: the model's number · 2³² + how often it was renewed.

    A tensor, because torch.compile would compile anew for each value of an integer; without dimensions, because it
    takes equal sizes for the same, be it the batch's.
    """

    def __init__(self, model: nn.Module):
        self._number, self._renewed = next(_numbers), 0
        self._source: Any = None
        self._make_tensor()
        _models[self._number] = model

    def _make_tensor(self) -> None:
        self.tensor = torch.tensor((self._number << 32) + self._renewed, device="cpu")

    def renew(self, source: Any) -> None:
        """From the next graph on, derived weights may be kept if `source`, what they were made from, is still unchanged then."""
        self._source = source
        self._renewed += 1
        self._make_tensor()

    def forget(self) -> None:
        """Let go of the weights that `renew` was given."""
        self._source = None

    def vouches(self, renewed: int) -> bool:
        """Whether nothing was edited since before the graph began that was given the handle `renewed`."""
        return renewed == self._renewed and self._source is not None and self._source.is_unchanged()


def _tensors_of(model: Any) -> list[Tensor]:
    """What the operations below take as `tensors`."""
    return [model._patch_weight(), *model.parameters(), *model.buffers()]


def forward(model: Any, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[Tensor, Tensor | None]:
    """The model's forward as torch.compile is to trace it."""
    head = model._tower.use_head
    last_hidden_state, pooler_output = vision_tower(
        pixel_values, _tensors_of(model), model._handle.tensor, bool(interpolate_pos_encoding), head
    )
    return last_hidden_state, pooler_output if head else None


def naflex_forward(
    model: Any, pixel_values: Tensor, mask: Tensor | None, spatial_shapes: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The same of a model whose images have any size."""
    head = model._tower.use_head
    last_hidden_state, pooler_output = naflex_tower(
        pixel_values, mask, spatial_shapes, _tensors_of(model), model._handle.tensor, head
    )
    return last_hidden_state, pooler_output if head else None


def gridded_forward(model: Any, pixel_values: Tensor, grid_thw: Tensor, beside: list[Tensor]) -> list[Tensor]:
    """The same of a model that takes packed pixels and grids: the first tensors of its output, `[rows, width]` each, as its
    `traced_outputs` says. `beside` are the other tensors that its forward takes."""
    per_row, widths = zip(*model.traced_outputs(), strict=True)
    tensors = _tensors_of(model)
    return gridded_tower(pixel_values, grid_thw, beside, tensors, model._handle.tensor, [*per_row], [*widths])


@torch.compiler.assume_constant_result
def tower_reason(handle: Tensor) -> str | None:
    """Why the model's tower would run as stock's, asked while its forward is traced.

    A graph does not depend on the answer for being right: the operation asks again at each run, and where stock's code
    was traced, torch.compile guards it as it guards stock.
    """
    if type(handle) is not Tensor:
        return "the model was made under a mode that fakes tensors"
    from torch._inductor import config

    if config.freezing:
        # The handle would become a constant, also of the graph that Inductor's cache hands to the next process.
        return "Inductor's freezing is on"
    model = _models[handle.item() >> 32]
    return model._current().reason(owner=model)


# Replayed from a CUDA graph they would not look for edited weights.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.library.custom_op("siglip_fast::vision_tower", mutates_args=(), tags=_TAGS)
def vision_tower(
    pixel_values: Tensor, tensors: list[Tensor], handle: Tensor, interpolate_pos_encoding: bool, head: bool
) -> tuple[Tensor, Tensor]:
    """`pixel_values [B, C, H, W]` → last_hidden_state `[B, N, D]` and pooler_output `[B, D]`, `[0]` without head.

    `tensors` are the weight of the patch embedding, whose shape, dtype and device the outputs follow, then all
    parameters and buffers.
    Raises RuntimeError where the model is gone, and whatever the model's forward raises.
    """
    return _outputs(handle, tensors, head, pixel_values, interpolate_pos_encoding)


@vision_tower.register_fake
def _(pixel_values, tensors, handle, interpolate_pos_encoding, head):
    weight = tensors[0]
    D, C, p, _ = weight.shape
    check_shape("pixel_values", pixel_values, (None, C, None, None))
    B, _, height, width = pixel_values.shape
    last_hidden_state = weight.new_empty(B, (height // p) * (width // p), D)
    return last_hidden_state, weight.new_empty((B, D) if head else (0,))


@torch.library.custom_op("siglip_fast::naflex_tower", mutates_args=(), tags=_TAGS)
def naflex_tower(
    pixel_values: Tensor, mask: Tensor | None, spatial_shapes: Tensor, tensors: list[Tensor], handle: Tensor, head: bool
) -> tuple[Tensor, Tensor]:
    """`pixel_values [B, N, K]`, `mask [B, N]`, `spatial_shapes [B, 2]` → as `vision_tower`, which has the rest."""
    return _outputs(handle, tensors, head, pixel_values, mask, spatial_shapes)


@naflex_tower.register_fake
def _(pixel_values, mask, spatial_shapes, tensors, handle, head):
    weight = tensors[0]
    D, K = weight.shape
    check_shape("pixel_values", pixel_values, (None, None, K))
    B, N, _ = pixel_values.shape
    return weight.new_empty(B, N, D), weight.new_empty((B, D) if head else (0,))


@torch.library.custom_op("siglip_fast::gridded_tower", mutates_args=(), tags=_TAGS)
def gridded_tower(
    pixel_values: Tensor,
    grid_thw: Tensor,
    beside: list[Tensor],
    tensors: list[Tensor],
    handle: Tensor,
    rows: list[int],
    widths: list[int],
) -> list[Tensor]:
    """Pixels of M rows, as the model takes them, and `grid_thw [B, 3]` → the first tensors of the model's output: for `rows[i]`
    rows of pixels each a row of `widths[i]`, or, where `rows[i]` is 0, however many there are; `vision_tower` has the rest."""
    output = _output(handle, tensors, pixel_values, grid_thw, *beside)
    leaves = tree_leaves([*output.values()] if isinstance(output, dict) else output)
    return [tensor.reshape(-1, width).contiguous() for tensor, width in zip(leaves, widths, strict=False)]


@gridded_tower.register_fake
def _(pixel_values, grid_thw, beside, tensors, handle, rows, widths):
    weight = tensors[0]
    M = pixel_values.reshape(-1, weight[0].numel()).shape[0]  # len() would make it a constant of the graph
    return [
        weight.new_empty(M // each if each else torch.library.get_ctx().new_dynamic_size(), width)
        for each, width in zip(rows, widths, strict=True)
    ]


def _outputs(handle: Tensor, tensors: list[Tensor], head: bool, *args) -> tuple[Tensor, Tensor]:
    """last_hidden_state and pooler_output, or an empty one, of the model's forward of `args`."""
    output = _output(handle, tensors, *args)
    pooled = output.pooler_output if head else tensors[0].new_empty(0)
    return output.last_hidden_state.contiguous(), pooled.contiguous()


def _output(handle: Tensor, tensors: list[Tensor], *args) -> Any:
    """What the model's forward of `args` returns."""
    number, renewed = divmod(handle.item(), 1 << 32)
    model = _models.get(number)
    if model is None:
        raise RuntimeError("siglip_fast::vision_tower: the model that was compiled does not exist any more")
    with torch.no_grad():
        return _run(model, renewed, tensors[1:], args)


def _run(model, renewed, given, args):
    """The same, computed with the tensors `given`."""
    if not _are_own(model, given):
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        replaced = {f"model.{name}": tensor for name, tensor in zip(named, given, strict=True)}
        return torch.func.functional_call(_Forward(model), replaced, args)
    before = model._derived
    output = _own_forward(model, *args)
    derived = model._derived.get(None)
    if derived is not None and derived is not before.get(None) and not model._handle.vouches(renewed):
        model._handle.renew(derived.source)
        model._derived = {}
    return output


def _are_own(model, given: list[Tensor]) -> bool:
    """Whether these are all parameters and buffers of the model, or the same memory."""
    derived = model._derived.get(None)
    if derived is not None and derived.source.is_unchanged():
        own = derived.source.tensors  # a walk over the modules takes ten times as long as the check
    else:
        own = []
    if len(own) != len(given):  # or the model has more than its tower
        own = [*model.parameters(), *model.buffers()]
    return all(map(is_, own, given)) or all(map(_is_same_memory, own, given))


def _own_forward(model, *args):
    # A subclass's, or hooks around it, are in the graph already, and not run again.
    return type(model)._own_forward(model, *args, return_dict=True)


class _Forward(nn.Module):
    """What functional_call can call without running hooks on the model again."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return _own_forward(self.model, *args)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
