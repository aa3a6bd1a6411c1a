"""What a forward does on a GPU, noted while it runs, and where its buffers can lie in one piece of memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 256  # of buffers, in bytes; kernels are compiled for addresses at multiples of 16


@dataclass(frozen=True)
class View:
    """A tensor that lies `offset` bytes behind the beginning of a buffer; for a kernel that is all of it."""

    buffer: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Description(NamedTuple):
    """A tensor descriptor of a matrix."""

    matrix: View
    block_shape: list[int]


class Launch(NamedTuple):
    """Of a compiled kernel. A View or Description stands for what lies elsewhere in each forward."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple


class Call(NamedTuple):
    """Of a function that is none of our kernels. A View stands for what lies elsewhere in each forward."""

    function: Callable[..., Any]
    args: tuple
    results: tuple[int, ...]  # the buffers that it returns


class Buffer:
    """Memory that a forward uses from one of its steps to another; `own` if it is to be part of the one piece."""

    def __init__(self, tensor: Tensor, step: int, own: bool):
        self.size = tensor.untyped_storage().nbytes()
        self.begins = tensor.storage_offset() * tensor.element_size()  # in its storage
        self.first, self.last, self.own = step, step, own
        # While there is a reference, be it weak, no other storage gets the same number.
        self._storage = StorageWeakRef(tensor.untyped_storage())


class Recorder:
    """Notes a forward (`siglip_fast.kernels.launch.Recorder`) that reads `inputs`, and `constants`, which stay where they are.

    Whatever else a step reads has to be what a step before has written. `reason` says what keeps all this from being
    done again, if anything does.
    """

    def __init__(self, inputs: Iterable[Tensor], constants: Any):
        self.steps: list[Launch | Call] = []
        self.buffers: list[Buffer] = []
        self.reason: str | None = None
        self.constants = constants
        self._constant = {_storage(t) for t in tree_leaves(constants) if isinstance(t, Tensor)}
        self._buffer_of: dict[int, int] = {}  # by storage
        self.inputs = [self._add(tensor, own=False) for tensor in inputs]

    def allocated(self, tensor: Tensor) -> None:
        self._add(tensor, own=True)

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        if compiled is None:
            self.reason = "Triton interprets"
        self.steps.append(Launch(compiled, grid, tuple(map(self._argument, arguments.values()))))

    def called(self, function: Callable[..., Any], args: tuple, result: Any) -> None:
        args = tree_map_only(Tensor, self._locate, args)
        made = tuple(self._add(t, own=False) for t in tree_leaves(result) if isinstance(t, Tensor))
        self.steps.append(Call(function, args, made))

    def output(self, tensor: Tensor | None) -> View | None:
        """Where a result of the forward is; it is not to be part of the one piece."""
        if tensor is None:
            return None
        view = self._locate(tensor)
        if not isinstance(view, View) or view.buffer in self.inputs or not _is_whole(view, self.buffers[view.buffer]):
            self.reason = f"an output of shape {list(tensor.shape)} is not a buffer of its own"
            return None
        self.buffers[view.buffer].own = False
        return view

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = self._locate(value)
            return place if isinstance(place, View) else value.data_ptr()
        if isinstance(value, TensorDescriptor):
            matrix = self._locate(value.base)
            return Description(matrix, value.block_shape) if isinstance(matrix, View) else value
        return value

    def _locate(self, tensor: Tensor) -> View | Tensor:
        """Where it is, or the tensor itself if it is a constant."""
        storage = _storage(tensor)
        if storage in self._constant:
            return tensor
        index = self._buffer_of.get(storage)
        if index is None:
            self.reason = f"a tensor of shape {list(tensor.shape)} comes from no operation"
            return tensor
        buffer = self.buffers[index]
        buffer.last = len(self.steps)
        offset = tensor.storage_offset() * tensor.element_size() - buffer.begins
        return View(index, offset, tensor.shape, tensor.stride(), tensor.dtype)

    def _add(self, tensor: Tensor, own: bool) -> int:
        storage = _storage(tensor)
        if storage in self._constant or storage in self._buffer_of:
            self.reason = f"a tensor of shape {list(tensor.shape)} shares memory with another"
        self._buffer_of[storage] = index = len(self.buffers)
        self.buffers.append(Buffer(tensor, len(self.steps), own))
        return index


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_whole(view: View, buffer: Buffer) -> bool:
    contiguous = torch.empty(view.shape, device="meta").stride() == view.stride
    return contiguous and view.offset == 0 and view.shape.numel() * view.dtype.itemsize == buffer.size


def arrange(buffers: list[Buffer]) -> tuple[dict[int, int], int]:
    """Offsets of the own buffers in one piece of memory, and its size: the largest first, each at the lowest offset that
    no other takes while both are in use."""
    offsets: dict[int, int] = {}
    for index in sorted(range(len(buffers)), key=lambda i: -buffers[i].size):
        buffer, offset = buffers[index], 0
        if not buffer.own:
            continue
        for other, begins in sorted(offsets.items(), key=lambda item: item[1]):
            taken = buffers[other]
            at_once = taken.first <= buffer.last and buffer.first <= taken.last
            if at_once and begins < offset + buffer.size and offset < begins + taken.size:
                offset = begins + _aligned(taken.size)
        offsets[index] = offset
    return offsets, max((offset + _aligned(buffers[i].size) for i, offset in offsets.items()), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
