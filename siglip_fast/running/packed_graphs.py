"""CUDA graphs of the packed forward: one for each budget of rows, which serves every call of no more rows."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..forward import PackedOutputs, Packing
from ..ops import Segments
from . import graphs

Forward = Callable[[Tensor, Packing], PackedOutputs]


class Call(NamedTuple):
    """A call as graphs take it: `pixel_rows [M, K]` are its packed rows, and `packing.rows` and `packing.out_rows` are None.

    `out_rows`, int32 `[R]`, are the rows that last_hidden_state is to have, None: all. `has_own_positions` if
    `packing.position.table` has this call's positions, and not those of any.
    """

    pixel_rows: Tensor
    packing: Packing
    out_rows: Tensor | None = None
    has_own_positions: bool = False

    def tensors(self) -> list[Tensor]:
        """Those of the packing, but for attention's schedule, that are others in each call."""
        segments, position, _, rotation, _, images, _ = self.packing
        found = [position.index, position.weight, rotation and rotation.place, images and images.table]
        return [t for t in [*found, position.table if self.has_own_positions else None] if t is not None]


class PackedGraphs:
    """The forwards of some budgets of rows, for at most so many images, recorded once.

    A call is copied into a graph's own inputs, and what it asks for is copied out of the outputs, so nothing that a later
    replay overwrites leaves this class. All graphs share one memory pool. The rows and images that a call leaves of
    its budget hold what calls before it left there; no row or image of a call reads them.
    """

    def __init__(self, forward: Forward, budgets: Iterable[int], max_images: int, call: Call):
        """`call` is one such as will come."""
        self._lock = threading.Lock()
        self._max_images = max_images
        # Outputs that inference mode made could not be written to outside of it.
        with graphs.RECORDING, torch.inference_mode(False), torch.no_grad():
            self._recorder = graphs.Recorder(call.pixel_rows.device)
            self._graphs = {
                rows: PackedGraph(self._recorder, forward, room_for(call, rows, max_images), rows)
                for rows in sorted(budgets, reverse=True)
            }

    def budget_for(self, rows: int, images: int) -> int | None:
        """The smallest captured one that holds so many, or None."""
        if images > self._max_images:
            return None
        return min((budget for budget in self._graphs if budget >= rows), default=None)

    def replay(self, budget: int, call: Call) -> PackedOutputs | None:
        """None where the rotation's table was made anew, for a longer image, since the graphs were recorded."""
        graph = self._graphs[budget]
        if (rotation := call.packing.rotation) and rotation.table is not graph.call.packing.rotation.table:
            return None
        with self._lock, self._recorder.in_order():
            return graph(call)


class PackedGraph:
    """The forward of `call`, whose tensors it reads at each replay; it has so many rows."""

    def __init__(self, recorder: graphs.Recorder, forward: Forward, call: Call, rows: int):
        self.call, self._rows = call, rows
        self._schedules = _Asked(call.packing.segments.schedule)
        segments = call.packing.segments._replace(schedule=self._schedules)
        packing = call.packing._replace(segments=segments)

        def run() -> PackedOutputs:
            self._schedules.asked.clear()  # by what is done once only
            return forward(call.pixel_rows, packing)

        self._run = run  # holds what the graph reads: it knows addresses only
        self._replay, self._outputs = recorder.record(run)

    def __call__(self, call: Call) -> PackedOutputs:
        M = len(call.pixel_rows)
        self.call.pixel_rows[:M].copy_(call.pixel_rows)
        for own, given in zip(self.call.tensors(), call.tensors(), strict=True):
            own[: len(given)].copy_(given)
        for tile_rows in self._schedules.asked:
            own, given = self._schedules[tile_rows], call.packing.segments.schedule[tile_rows]
            own[: len(given)].copy_(given)
            own[len(given) :].zero_()  # such entries do nothing
        self._replay()
        y, pooled, features = self._outputs
        images = call.packing.images
        merged = [t if t is None else t[: M * len(t) // self._rows].clone() for t in features]
        if pooled is not None:
            pooled = pooled[: len(images.keys) if images else M * len(pooled) // self._rows].clone()
        y = y[:M].clone() if call.out_rows is None else y.index_select(0, call.out_rows)
        return PackedOutputs(y, pooled, merged)


class _Asked(Mapping):
    """Of some tensors by number of rows those that are asked for."""

    def __init__(self, schedules: Mapping[int, Tensor]):
        self._schedules, self.asked = schedules, set()

    def __getitem__(self, tile_rows: int) -> Tensor:
        self.asked.add(tile_rows)
        return self._schedules[tile_rows]

    def __iter__(self):
        return iter(self._schedules)

    def __len__(self) -> int:
        return len(self._schedules)


def room_for(call: Call, rows: int, images: int) -> Call:
    """A call like `call`, with room for so many rows of so many images: one image of all rows."""
    pixel_rows, (segments, position, _, rotation, _, heads, _), _, has_own_positions = call

    def zeros(like: Tensor | None, length: int) -> Tensor | None:
        return None if like is None else like.new_zeros(length, *like.shape[1:])

    def segments_of(given: Segments, count: int) -> Segments:
        # An image begins a tile of its own, so it may leave one that is not full.
        schedule = {tile: zeros(entries, rows // tile + images) for tile, entries in given.schedule.items()}
        return Segments((0,) * count, (rows,) * count, (rows,) * count, zeros(given.table, count), schedule)

    return Call(
        pixel_rows=zeros(pixel_rows, rows),
        packing=Packing(
            segments=segments_of(segments, 1),
            position=position._replace(
                table=zeros(position.table, rows) if has_own_positions else position.table,
                index=zeros(position.index, rows),
                weight=zeros(position.weight, rows),
            ),
            rotation=rotation and rotation._replace(place=zeros(rotation.place, rows)),
            images=heads and segments_of(heads, images),
        ),
        has_own_positions=has_own_positions,
    )
