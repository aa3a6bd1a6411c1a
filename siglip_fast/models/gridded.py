"""Towers that take the rows of pixels of all images and videos, one behind another, and the grid of patches of each.

A family's file says what is its own: the arguments of the forward, where things lie in the tower, what positions the rows
have, which rows attend to each other, what becomes of the last hidden state. Classes are made when asked
for (`siglip_fast.models.on_demand`).
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..forward import PackedOutputs, Packing
from ..ops import Position, Rotation
from ..running.grids import Grid, bilinear, frames, places, read
from ..running.packed_graphs import Call
from ..running.packing import Upload, add_segments, ranges
from ..running.traced import gridded_forward
from .anatomy import descendant
from .base import Built
from .captured_packed import CapturedPacked
from .outputs import in_asked_form
from .packed import joined, together, with_own_positions
from .resized import ResizedPositions
from .rotary import RotaryTable
from .traced import Traced
from .weights import Derived, finish


class Gridded(Built, Traced, CapturedPacked):
    """What makes such a tower fast: mixed into the stock class, before it, by way of a family's class.

    That has a `forward` of stock's signature, which calls `_forward`, and answers what is asked below.
    """

    # Of stock's forward by their names: pixels and grids, and the tensors beside them that it cannot do without
    pixels_name: ClassVar[str] = "pixel_values"
    grids_name: ClassVar[str] = "grid_thw"
    beside: ClassVar[tuple[str, ...]] = ()
    arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "grid_thw")  # all that may be given by their place
    leading: ClassVar[tuple[int, ...]] = ()  # dimensions before the rows of pixels
    is_flat: ClassVar[bool] = True  # whether a row is [K], else as the convolution has it
    casts: ClassVar[bool] = True  # pixels of another dtype than the weights'

    rotary_at: ClassVar[tuple[str, ...] | None] = None  # the names that lead to the rotary embedding, from the tower on
    has_own_positions: ClassVar[bool] = False  # whether `_position`'s table depends on the call
    joins_frames: ClassVar[bool] = False  # whether the frames of a video attend to each other
    ties_hidden_states: ClassVar[bool] = False  # whether the last of hidden_states is last_hidden_state
    output_class: ClassVar[type[ModelOutput] | None] = BaseModelOutputWithPooling

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        """What gives the position of each row once `upload` was sent; `place [M, 2]` is where it lies in its image."""
        raise NotImplementedError

    def _merges(self, grids: Sequence[Grid]) -> int | tuple[int, ...]:
        """The side of the squares of patches whose rows are neighbours; of all images, or of each."""
        return 1

    def _grids_reason(self, grids: Sequence[Grid]) -> str | None:
        """Why grids, all of which are positive, are left to stock's code."""
        return None

    def _finished(self, outputs: PackedOutputs, grids: list[Grid]) -> PackedOutputs:
        """What stock makes of the last hidden state within the tower, where no operation does."""
        return outputs

    def _made(self, outputs: PackedOutputs) -> Any:
        """Stock's output, without hidden_states."""
        return self.output_class(last_hidden_state=outputs.last_hidden_state, pooler_output=outputs.pooler_output)

    def traced_outputs(self) -> list[tuple[int, int]]:
        """The first tensors of the output where torch.compile traces: of how many rows of pixels each has one row, 0 if
        that depends on the grids, and how wide such a row is."""
        return [(1, len(self._patch_weight()))]

    def _of_traced(self, tensors: list[Tensor]) -> PackedOutputs:
        """The outputs of which these are the tensors, each `[rows, width]`."""
        return PackedOutputs(tensors[0], None, [])

    def _forward(self, pixel_values: Tensor, grid_thw: Tensor, **kwargs) -> Any:
        if torch.compiler.is_exporting():  # an exported program should not need this package
            return super().forward(pixel_values, **{self.grids_name: grid_thw}, **kwargs)
        if torch.compiler.is_compiling():
            _, reason = self._route(pixel_values, grid_thw, **kwargs)
            if reason is None:
                tensors = gridded_forward(self, pixel_values, grid_thw, [kwargs[name] for name in self.beside])
                return self._output(self._of_traced(tensors), (), kwargs)
        else:
            derived, reason, grids = self._route_sizes(pixel_values, grid_thw, **kwargs)
            if reason is None:
                return self._output(*self._run(derived, pixel_values, grids, kwargs), kwargs)
        self._delegate(reason)
        return super().forward(pixel_values, **{self.grids_name: grid_thw}, **kwargs)

    def _own_forward(self, pixel_values: Tensor, grid_thw: Tensor, *beside: Tensor, **kwargs) -> Any:
        """The forward without what a subclass or a hook puts around it."""
        return Gridded._forward(self, pixel_values, grid_thw, **dict(zip(self.beside, beside, strict=True)), **kwargs)

    def why_not(self, *args, **kwargs) -> str | None:
        """As of all towers, of the forward's arguments; also what the grids speak against, which are read for it."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        pixel_values, grid_thw = (given.pop(name, None) for name in (self.pixels_name, self.grids_name))
        return super().why_not(pixel_values, grid_thw, **given)

    def _request_reasons(self, grid_thw: Any, **kwargs) -> Iterator[str]:
        yield from self._setting_reasons(kwargs, known=self.beside)
        for name, value in ((self.grids_name, grid_thw), *((name, kwargs.get(name)) for name in self.beside)):
            if type(value) is not Tensor:
                yield f"{name} is no tensor"
            elif value.dtype not in (torch.int64, torch.int32):
                yield f"{name} is {value.dtype}"

    def _read(self, pixel_values: Tensor, grid_thw: Tensor, **kwargs) -> list[Grid] | str:
        # What is wrong with these stock's code is to say.
        weight, shape = self._patch_weight(), list(pixel_values.shape)
        row = [weight[0].numel()] if self.is_flat else [*weight.shape[1:]]
        at = len(self.leading)
        if [*shape[:at], *shape[at + 1 :]] != [*self.leading, *row] or not pixel_values.is_floating_point():
            expected = ", ".join(map(str, [*self.leading, "rows", *row]))
            return f"{self.pixels_name} are {pixel_values.dtype}, {shape}, not [{expected}]"
        if not self.casts and pixel_values.dtype != weight.dtype:
            return f"{self.pixels_name} are {pixel_values.dtype}, the weights {weight.dtype}"
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or not len(grid_thw):
            return f"{self.grids_name} is no tensor [images, 3]"
        grids = self._grids(grid_thw, **{name: kwargs[name] for name in self.beside})
        if isinstance(grids, str):
            return grids
        if min(map(min, grids)) < 1:
            return f"{self.grids_name} is not positive"
        if (rows := sum(rows_of(grids))) != shape[at]:
            return f"{self.pixels_name} have {shape[at]} rows, by {self.grids_name} {rows}"
        return self._grids_reason(grids) or grids

    def _grids(self, grid_thw: Tensor) -> list[Grid] | str:
        """What is in the grids and the tensors beside them, or what is wrong with it."""
        return read(grid_thw)

    def _output(self, outputs: PackedOutputs, states: tuple[Tensor | None, ...], kwargs: dict[str, Any]) -> Any:
        output = self._made(outputs)
        if states:
            if self.ties_hidden_states and states[-1] is not None:
                states = (*states[:-1], outputs.last_hidden_state)
            output["hidden_states"] = states  # as stock adds them: behind all others in the tuple form
        return output if self.output_class is None else in_asked_form(output, self.config, kwargs)

    def _run(
        self, derived: Derived, pixel_values: Tensor, grids: list[Grid], kwargs: dict[str, Any]
    ) -> tuple[PackedOutputs, tuple[Tensor | None, ...]]:
        """The outputs, and the hidden states, if they were asked for."""
        pixel_rows, lengths = self._rows(pixel_values), rows_of(grids)
        parts, states, begin = [], [], 0
        for images in together(lengths, derived.ops.images_at_once(pixel_rows.device, tokens=1)):
            end, some = begin + sum(lengths[images]), grids[images]
            kept, rows = self._hidden_states(kwargs, len(derived.weights.layers)), pixel_rows[begin:end]
            outputs = None if kept else self._replayed(derived, rows, some)
            if outputs is None:
                sizes = *some, self._merges(some)  # which a config may say, that nobody watches
                pack = functools.partial(self._pack, derived, some)
                outputs = derived.run_sizes(rows, sizes, pack, kept and kept.collect)
            parts.append(self._finished(outputs, some))
            states.append(tuple(kept.kept) if kept else ())
            begin = end
        return joined(parts), joined(states)

    def _rows(self, pixel_values: Tensor) -> Tensor:
        """`[M, K]`."""
        return pixel_values.reshape(-1, self._patch_weight()[0].numel())

    def _example(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        weight, side = self._patch_weight(), self.example_side
        row = weight.shape[1:].numel() if self.is_flat else weight.shape[1:]
        shape = (*self.leading, side**2, *([row] if self.is_flat else row))
        return (weight.new_zeros(shape), torch.tensor([[1, side, side]])), {}

    example_side = 2  # of an image that any such tower takes, in patches

    def _counts(self, grids: list[Grid]) -> tuple[int, int]:
        return sum(rows_of(grids)), len(self._segment_lengths(grids))

    def _call(self, derived: Derived, pixel_values: Tensor, grids: list[Grid]) -> Call:
        packing = self._pack(derived, grids)
        if self.has_own_positions:
            packing = with_own_positions(packing)
        return Call(self._rows(pixel_values), packing, has_own_positions=self.has_own_positions)

    def _segment_lengths(self, grids: Sequence[Grid]) -> np.ndarray:
        return np.array(rows_of(grids)) if self.joins_frames else frames(grids)

    def _pack(self, derived: Derived, grids: list[Grid]) -> Packing:
        place, upload = places(grids, self._merges(grids)), Upload()
        position, lengths = self._position(derived, grids, place, upload), self._segment_lengths(grids)
        segments = add_segments(upload, np.cumsum(lengths) - lengths, lengths, lengths, self._tile_rows(derived))
        on_device = upload.add(place) if self.rotary_at else None
        upload.send(self._patch_weight().device)
        rotation = None
        if on_device is not None:
            table = derived.kept(RotaryTable, descendant(self, *self.rotary_at))
            rotation = Rotation(table.of(int(place.max()) + 1), on_device())
        return Packing(segments(), position(), rotation=rotation)


class InSquares(Gridded):
    """Those whose images are of whole squares of patches, the rows of each of which are neighbours."""

    @property
    def _side(self) -> int:
        return self.spatial_merge_size

    def _merges(self, grids: Sequence[Grid]) -> int:
        return self._side

    def _grids_reason(self, grids: Sequence[Grid]) -> str | None:
        return None if whole_squares(grids, self._side) else f"the sides of grid_thw are no multiples of {self._side}"

    @property
    def example_side(self) -> int:
        return self._side


def rows_of(grids: Sequence[Grid]) -> list[int]:
    return [t * h * w for t, h, w, *_ in grids]


def resized_bilinearly(
    learned: Tensor, side: int, align_corners: bool, grids: Sequence[Grid], place: np.ndarray, upload: Upload
) -> Callable[[], Position]:
    """As `Gridded._position`, of a square table `[side², D]` that is resized to each grid."""
    return weighted(learned, bilinear(place, grids, side, align_corners), upload)


def weighted(learned: Tensor, taps: tuple[np.ndarray, np.ndarray], upload: Upload) -> Callable[[], Position]:
    """As `Gridded._position`, of the taps' indices into `learned [P, D]` and their weights."""
    index, weight = map(upload.add, taps)
    table = learned.detach().resolve_neg().contiguous()
    return lambda: Position(table, index(), weight())


def resized_as_stock(
    positions: ResizedPositions, sizes: list[tuple[int, ...]], grids: Sequence[Grid], upload: Upload
) -> Callable[[], Position]:
    """As `Gridded._position`, of positions of each size, which all frames of a video have. They are the call's own."""
    table, offsets = positions.of(sizes)
    of_frames = np.repeat(offsets, [t for t, _, _ in grids])
    index = upload.add(ranges(of_frames, frames(grids))[:, None])
    return lambda: Position(table, index())


def without_positions(derived: Derived, weight: Tensor, rows: int, upload: Upload) -> Callable[[], Position]:
    """As `Gridded._position`, of a tower that adds none; `weight` is that of its projection of patches."""
    table, index = derived.kept(_no_position, weight), upload.add(np.zeros((rows, 1), np.int32))
    return lambda: Position(table, index())


def _no_position(weight: Tensor) -> Tensor:
    """`[1, D]`: zeros."""
    with torch.inference_mode(False):
        table = weight.detach().new_zeros(1, len(weight))
    finish(table)
    return table


def whole_squares(grids: Sequence[Grid], side: int) -> bool:
    """Whether every image is of whole squares of `side` by `side` patches."""
    return all(h % side == 0 and w % side == 0 for _, h, w, *_ in grids)


def output_of(stock: type[nn.Module]) -> tuple[type[ModelOutput], bool]:
    """The class of what stock's forward returns, and whether it has a pooler_output. Which it is is written in the
    forward alone: neither its annotations nor an attribute of the class follow it from version to version."""
    code = inspect.unwrap(stock.forward).__code__
    keywords = {name for constant in code.co_consts if isinstance(constant, tuple) for name in constant}
    pools = BaseModelOutputWithPooling.__name__ in code.co_names
    return BaseModelOutputWithPooling if pools else BaseModelOutput, "pooler_output" in keywords
