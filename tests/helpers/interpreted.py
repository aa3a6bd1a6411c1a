"""Launch plans without a GPU: Triton's interpreter in the place of compiled kernels.

A plan gives a compiled kernel plain addresses. Here the interpreter reads and writes what lies at them, so a wrong
address is a wrong result, or a crash.
"""

import contextlib
import ctypes
import gc
import inspect
import threading
import weakref
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from device import ON_GPU
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_fast.backends.choice import DEFAULT, Choice
from siglip_fast.models.base import Fused
from siglip_fast.running import plans

_interpreting = threading.Lock()  # Triton's interpreter serves one thread at a time


class Compiled:
    """As Triton's CompiledKernel where a plan looks at it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel: InterpretedFunction, arguments: dict):
        self._kernel, self._recorded = kernel, arguments

    def run(self, gx, gy, gz, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        assert (function, metadata) == ("function", "metadata")
        assert launch_metadata is enter_hook is exit_hook is None
        parameters = inspect.signature(self._kernel.fn).parameters.values()
        recorded = (self._recorded.get(parameter.name, parameter.default) for parameter in parameters)
        arguments = [_at(then, now) for then, now in zip(recorded, arguments, strict=True)]
        Compiled.launched += 1
        with _interpreting:
            self._kernel.run(*arguments, grid=(gx, gy, gz), warmup=False)

    launched = 0  # by plans


def _at(then, now):
    """`now` as the interpreter takes it, where at recording there was `then`."""
    if isinstance(then, TensorDescriptor):
        base = _at(then.base, now.base.data_ptr())
        return TensorDescriptor(base, now.shape, now.strides, now.block_shape)
    if not isinstance(then, Tensor):
        assert now is then or now == then
        return now
    assert type(now) is int and now % 16 == then.data_ptr() % 16, "kernels are compiled for an alignment"
    extent = 1 + sum((size - 1) * stride for size, stride in zip(then.shape, then.stride(), strict=True))
    memory = (ctypes.c_char * (extent * then.element_size())).from_address(now)
    return torch.frombuffer(memory, dtype=then.dtype).as_strided(then.shape, then.stride())


def _launcher(kernel: InterpretedFunction, grid: tuple):
    def run(*args, **constants):
        with _interpreting:
            kernel.run(*args, grid=grid, warmup=False, **constants)
        return Compiled(kernel, dict(zip(kernel.arg_names, args, strict=False)) | constants)

    return run


@contextlib.contextmanager
def planned() -> Iterator[None]:
    """Forwards on CPU tensors are planned as those on a GPU are; memory that nobody wrote is NaN, a plan's too."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor

    driver = mock.Mock(get_current_stream=lambda device: 0, get_current_device=lambda: 0)
    with (
        mock.patch.object(InterpretedFunction, "__getitem__", _launcher),
        mock.patch.object(plans, "applies", lambda tensor: True),
        mock.patch.object(plans, "driver", mock.Mock(active=driver)),
        mock.patch.object(torch, "empty", poisoned),
    ):
        Compiled.launched = 0
        yield


def in_place_of_a_gpu(needs_one: bool) -> contextlib.AbstractContextManager:
    """`planned()` where there is no GPU; on one those tests alone run that need it."""
    if ON_GPU and not needs_one:
        pytest.skip("the interpreter stands for compiled kernels here")
    return contextlib.nullcontext() if ON_GPU else planned()


def assert_freed_at_once(model: Fused) -> None:
    """What was derived from its weights, when it is dropped."""
    derived = weakref.ref(model._current())
    gc.disable()
    try:
        model.forget_derived()
        assert derived() is None, "freed by the garbage collector only"
    finally:
        gc.enable()


class Chosen:
    """In the place of a tuned selection: some operations by these choices, the others by default."""

    digest = "chosen"

    def __init__(self, **choices: Choice):
        self._choices = choices

    def choice(self, name: str, *_) -> Choice:
        return self._choices.get(name, DEFAULT)

    def choices(self, *_) -> list[Choice]:
        return []

    def settle(self, *_) -> None:
        pass


def vendors(*names: str) -> Chosen:
    """The vendor's route for some operations."""
    return Chosen(**{name: Choice("sdpa" if name == "attention" else "vendor") for name in names})
