"""Where and on what a measurement was made: the GPU and its clocks, versions, revision. No path, no host name."""

import datetime
import platform
import subprocess
from pathlib import Path

import peers
import torch

import siglip_fast
from siglip_fast.tuning import cache
from siglip_fast.tuning.cache import version_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_CLOCKS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
_PACKAGES = ("torch", "triton", "transformers", "timm", "flash_attn", "onnxruntime", "openvino")


def about(cpu: str) -> dict:
    """Of the whole session; `cpu` is the processor's name."""
    device = torch.device(DEVICE)
    versions = {name: version for name in _PACKAGES if (version := version_of(name))}
    versions |= {"python": platform.python_version(), "siglip_fast": siglip_fast.__version__}
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else cpu,
        "gpu_measured": DEVICE == "cuda",
        "threads": torch.get_num_threads(),
        "driver": (_nvidia_smi("driver_version") or [None])[0],
        "versions": versions,
        "revision": _revision(),
        "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "tuned": [cache.Key.of(device).path().name] if peers.has_tuned(device) else [],
    }


def clocks() -> dict[str, float] | None:
    values = _nvidia_smi(",".join(_CLOCKS))
    try:
        return dict(zip(_CLOCKS.values(), map(float, values), strict=True)) if values else None
    except ValueError:  # "[N/A]"
        return None


def _nvidia_smi(fields: str) -> list[str] | None:
    """None where there is no NVIDIA GPU or no nvidia-smi."""
    if DEVICE != "cuda":
        return None
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"  # its index there is not ours under CUDA_VISIBLE_DEVICES
    return _output("nvidia-smi", "-i", gpu, f"--query-gpu={fields}", "--format=csv,noheader,nounits", separator=", ")


def _revision() -> str | None:
    found = _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12")
    return found[0] if found else None


def _output(*command: str, separator: str = "\n") -> list[str] | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split(separator)
