"""Which backend runs on a device, and whether what it launches is for a CUDA graph.

auto     triton on CUDA and ROCm devices, cpu on CPUs
triton   the fused kernels; on CPU tensors only where Triton itself can run them (its interpreter)
cpu      oneDNN's kernels on packed weights, where there is oneDNN and AVX-512, or in fp32 AVX2; else as torch
torch    plain torch: the reference and fallback, any device
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

NAMES = ("auto", "triton", "cpu", "torch")


def backend_for(name: str, device: torch.device) -> tuple[str | None, str | None]:
    """The backend that `name` stands for on `device`, or None and the reason why there is none.

    Raises RuntimeError where `triton` was asked for by name and cannot run on `device`.
    """
    if name == "auto":
        if device.type not in ("cuda", "cpu"):
            return None, f"no backend for device type {device.type}"
        name = "triton" if device.type == "cuda" else "cpu"
        reason = _triton_unavailable(device) if name == "triton" else None
        return (None, reason) if reason else (name, None)
    if name == "triton" and (reason := _triton_unavailable(device)):
        raise RuntimeError(f"backend='triton' cannot run on {device}: {reason}")
    return name, None


def load(name: str, selection_on: Callable | None = None, batch_invariant: bool = False) -> Any:
    """What implements the operations for a backend's name: a module, or an object with the same functions."""
    module = importlib.import_module(f"siglip_fast.backends.{name}")
    return module.Backend(selection_on, batch_invariant) if name == "triton" else module


_launching = threading.local()


@contextlib.contextmanager
def for_graph() -> Iterator[None]:
    """What this thread launches in the block is for a CUDA graph: while it warms up, and while it is captured."""
    before = is_for_graph()
    _launching.for_graph = True
    try:
        yield
    finally:
        _launching.for_graph = before


def is_for_graph() -> bool:
    return getattr(_launching, "for_graph", False)


def is_capturing(tensor: torch.Tensor) -> bool:
    """Whether what is launched now on the tensor's device goes into a CUDA graph."""
    if torch.compiler.is_compiling() or not (tensor.is_cuda and torch.cuda.is_initialized()):
        return False
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _triton_unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "the device's compute capability is below 8.0"
        return _no_c_compiler()
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"Triton has no {device.type} target (on CPU tensors it runs only with TRITON_INTERPRET=1)"


def _no_c_compiler() -> str | None:
    """The reason if Triton, which compiles what launches its kernels with a C compiler, would find none."""
    import triton

    # The places in which Triton looks (triton.runtime.build); on Windows its port brings a compiler of its own.
    if (
        os.name != "posix"
        or triton.knobs.build.impl
        or "CC" in os.environ
        or shutil.which("gcc")
        or shutil.which("clang")
    ):
        return None
    return "Triton needs a C compiler, and neither gcc nor clang is on PATH (another one: set CC)"
