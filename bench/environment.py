"""Where and on what a measurement was made: the GPU and its clocks, versions, revision. No path, no host name."""

import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import siglip_fast
from siglip_fast.tuning import cache
from siglip_fast.tuning.cache import version_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMITATED = bool(os.environ.get("SIGLIP_FAST_IMITATED_GPU"))  # as bench/run.py sets it for a rehearsal
_PACKAGES = ("torch", "triton", "transformers", "timm", "flash_attn", "onnxruntime", "openvino")


@functools.cache
def about() -> dict[str, Any]:
    """Of the whole session."""
    versions = {name: version for name in _PACKAGES if (version := version_of(name))}
    versions |= {"python": platform.python_version(), "siglip_fast": siglip_fast.__version__}
    on_gpu = DEVICE == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if on_gpu else None,
        "gpu_measured": on_gpu and not IMITATED,
        "imitated": IMITATED,
        "threads": torch.get_num_threads(),
        "driver": _ask("nvmlSystemGetDriverVersion"),
        "versions": versions,
        "revision": _revision(),
        "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tuned": _tuned(),
    }


def clocks() -> dict[str, float] | None:
    """What the GPU says of itself now; None where it, or nvidia-ml-py, is not there."""
    if not (found := _nvml()):
        return None
    nvml, gpu = found
    said = {
        "sm_mhz": _ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_SM),
        "memory_mhz": _ask("nvmlDeviceGetClockInfo", gpu, nvml.NVML_CLOCK_MEM),
        "watts": _ask("nvmlDeviceGetPowerUsage", gpu, scale=1e-3),
        "celsius": _ask("nvmlDeviceGetTemperature", gpu, nvml.NVML_TEMPERATURE_GPU),
    }
    return {name: value for name, value in said.items() if value is not None}


@functools.cache
def _nvml() -> tuple[Any, Any] | None:
    """nvidia-ml-py and its handle of the GPU: once, since a start of nvidia-smi for each case took 0.3 s."""
    if DEVICE != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        # its index there is not ours under CUDA_VISIBLE_DEVICES
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    except Exception:  # not installed; no driver; a part of a GPU (MIG), which has no clocks of its own
        return None


def _ask(function: str, *arguments: Any, scale: float | None = None) -> Any:
    """What NVML answers, times `scale`; None where there is no answer."""
    if not (found := _nvml()):
        return None
    nvml, _ = found
    try:
        answer = getattr(nvml, function)(*arguments)
    except nvml.NVMLError:
        return None
    return answer if scale is None else scale * answer


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _revision() -> str | None:
    """SIGLIP_FAST_REVISION, for a copy without .git, or what git says."""
    if given := os.environ.get("SIGLIP_FAST_REVISION"):
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _tuned() -> list[str]:
    """The file of tuned configurations, if there is one for this GPU."""
    path = cache.Key.of(torch.device(DEVICE)).path() if DEVICE == "cuda" else None
    return [path.name] if path and path.exists() else []
