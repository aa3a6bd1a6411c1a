"""A Triton driver for a GPU that is not there: what is launched on it is compiled, never loaded, and does nothing.

For `triton.runtime.driver.set_active`: bench/static.py reads what was compiled, bench/host.py times what precedes a
launch, and bench/imitated_gpu.py lets a run on a GPU be rehearsed.
"""

from siglip_fast.kernels.tiles import GPUS
from triton.backends.compiler import GPUTarget


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        pass


class Driver:
    launcher_cls = Launcher

    def __init__(self, target: GPUTarget):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._target  # keys Triton's in-memory cache

    def get_current_stream(self, device=None):
        return 0

    @property
    def utils(self):
        return self

    def get_device_properties(self, device):
        gpu = GPUS.get(f"sm_{self._target.arch}")
        return {"multiprocessor_count": gpu.sms if gpu else 0, "max_shared_mem": 232448, "warpSize": 32}  # sm_90's

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module):
        pass
