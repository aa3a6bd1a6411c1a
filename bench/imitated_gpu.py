"""A GPU that is not there, for `bench/run_gpu.sh --rehearse`: every stage runs to its end, and nothing is computed.

Tensors "on cuda" are meta tensors: shapes and dtypes without values, so a model of any size takes milliseconds. Whatever
asks for a value gets 0, so every error is none: a rehearsal says nothing of results. Triton's launches go as far as a
driver object that loads and launches nothing; instead of each kernel an empty one is compiled (bench/static.py compiles
the real ones). Times are those of Python calling nothing. torch.compile compiles nothing, and tests are collected, not
executed. The device's name says all this wherever it goes.

Imported at the start of each process of a rehearsal (bench/run.py), before anything else asks for a GPU.
"""

import contextlib
import time
from types import SimpleNamespace

import torch
import triton
from pretended import Driver
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

NAME = "IMITATED H200 (a rehearsal: no GPU, times are nonsense)"
CUDA, META = torch.device("cuda", 0), torch.device("meta")
_real_device = torch._C.TensorBase.device.__get__
_capturing = False


def _is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class CudaIsMeta(TorchFunctionMode):
    """Sends to the meta device what is meant for the GPU."""

    # What would need values, and the answer instead
    ANSWERS = {"equal": True, "allclose": True, "item": 0.0, "__bool__": False, "__float__": 0.0, "__int__": 0}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        on_gpu = any(isinstance(arg, Tensor) and _real_device(arg) == META for arg in args)
        if on_gpu and name in self.ANSWERS:
            return self.ANSWERS[name]
        if on_gpu and name in ("cpu", "cuda"):
            return args[0]
        if name == "copy_" and _real_device(args[0]) != META and _real_device(args[1]) == META:
            return args[0]  # there is nothing to copy back
        if name == "cuda":
            return args[0].to(META)
        if name == "to" or "device" in kwargs:
            args = tuple(META if _is_cuda(arg) else arg for arg in args)
            if on_gpu and name == "to":  # there is no way back
                args = tuple(META if arg == torch.device("cpu") or arg == "cpu" else arg for arg in args)
            kwargs = {key: META if _is_cuda(value) else value for key, value in kwargs.items()}
        if kwargs.get("device") == META:
            kwargs.pop("generator", None)  # a CPU's
        return function(*args, **kwargs)


class Generator(torch.Generator):
    """A CPU's, of which nobody draws."""

    def __new__(cls, device=None):
        return super().__new__(cls)


class Event:
    def __init__(self, *args, **kwargs):
        self._at = 0.0

    def record(self, stream=None):
        self._at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end: "Event") -> float:
        return max(1e3 * (end._at - self._at), 1e-3)


class Stream:
    def __init__(self, *args, **kwargs):
        self.cuda_stream = 0

    def wait_stream(self, stream):
        pass

    wait_event = synchronize = record_event = lambda self, event=None: None


class Graph:
    def replay(self):
        pass


class Scope(contextlib.nullcontext):
    """torch.cuda.device and torch.cuda.stream"""

    def __init__(self, *args, **kwargs):
        super().__init__()


class Capture:
    """torch.cuda.graph"""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        global _capturing
        _capturing = True

    def __exit__(self, *_):
        global _capturing
        _capturing = False


PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=139 << 30, multi_processor_count=132, uuid="imitated",
    L2_cache_size=1,  # so that nothing is measured on copies that exceed it
)  # fmt: skip
_STREAM = Stream()
TORCH_CUDA = {
    "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
    "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda device: None,
    "get_device_name": lambda device=None: NAME, "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0), "synchronize": lambda device=None: None,
    "empty_cache": lambda: None, "mem_get_info": lambda device=None: (139 << 30, 139 << 30),
    "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 0,
    "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
    "current_stream": lambda device=None: _STREAM, "default_stream": lambda device=None: _STREAM,
    "graph_pool_handle": lambda: (0, 0), "is_current_stream_capturing": lambda: _capturing,
    "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": Capture, "device": Scope, "stream": Scope,
}  # fmt: skip


@triton.jit
def _empty_kernel():
    pass


class H200(Driver):
    def get_current_device(self):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return CUDA


def _compile_empty():
    """In place of triton.compile: kernels are the caller's by name, and an empty one by code."""
    real, made = triton.compiler.compile, []

    def compile(source, target=None, options=None, _env_vars=None):
        if not made:
            made.append(real(ASTSource(_empty_kernel, {}, {}), target=target))
        return CompiledKernel(source, made[0].metadata_group, made[0].hash)

    return compile


def install() -> None:
    for name, imitation in TORCH_CUDA.items():
        setattr(torch.cuda, name, imitation)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_getCurrentRawStream"):
        setattr(torch._C, name, lambda *args: 0)
    mode = CudaIsMeta()

    def device(self: Tensor) -> torch.device:
        real = _real_device(self)
        # In other threads, and while the mode is at work, nobody would send the pretended one to the meta device.
        return CUDA if real == META and mode in _get_current_function_mode_stack() else real

    Tensor.device = property(device)
    Tensor.is_cuda = property(lambda self: _real_device(self) == META)
    Tensor.is_meta = property(lambda self: False)
    torch.Generator = Generator
    torch.compile = lambda model=None, **options: model
    mode.__enter__()
    driver.set_active(H200(GPUTarget("cuda", 90, 32)))
    triton.compiler.compile = _compile_empty()


def pytest_pyfunc_call(pyfuncitem) -> bool:
    """As a plugin of pytest: a test is found, set up, and not executed."""
    return True


install()
