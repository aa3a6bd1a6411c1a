"""How the kernels here are launched and their outputs allocated: as usual, and while a recorder notes it.

A recorder (`siglip_fast.running.recorder.Recorder`) notes what one thread does, so that it can be done again without Triton's
launch path, which costs more than many a kernel.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    def allocated(self, tensor: torch.Tensor) -> None:
        """`tensor` is new memory, not written to yet."""

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Triton's compiled kernel was launched with all of its arguments, in their order."""

    def called(self, function: Callable[..., Any], args: tuple, result: Any) -> None:
        """`function(*args)`, which is none of our kernels, gave `result`."""


class _Local(threading.local):
    recorder: Recorder | None = None


_local = _Local()


@contextlib.contextmanager
def recording(recorder: Recorder | None) -> Iterator[None]:
    """`recorder` notes what this thread does in the block; nobody does if it is None."""
    before, _local.recorder = _local.recorder, recorder
    try:
        yield
    finally:
        _local.recorder = before


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if _local.recorder is not None:
        _local.recorder.allocated(tensor)
    return tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`."""
    compiled = kernel[grid](*args, **constants)
    if _local.recorder is not None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | constants
        arguments = {name: given.get(name, default) for name, default in _parameters(kernel.fn).items()}
        _local.recorder.launched(compiled, grid, arguments)


@functools.cache
def _parameters(function: Callable) -> dict[str, Any]:
    """Their defaults by their names, in their order."""
    return {parameter.name: parameter.default for parameter in inspect.signature(function).parameters.values()}


def call(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, noted as one thing whatever it does."""
    recorder = _local.recorder
    if recorder is None:
        return function(*args)
    with recording(None):
        result = function(*args)
    recorder.called(function, args, result)
    return result
