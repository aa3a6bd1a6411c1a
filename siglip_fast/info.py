"""`siglip-fast info`: versions, device, the backend that would run here and why, and what its weights cost in memory."""

import platform
from argparse import Namespace
from importlib import metadata
from typing import TYPE_CHECKING

from .loading import load_model, pick_device, route

if TYPE_CHECKING:  # --help does not need it
    import torch


def run(args: Namespace) -> int:
    import torch

    device = pick_device(args.device)
    print(versions())
    print(machine(device))
    model = load_model(args, device, getattr(torch, args.dtype))
    size = model.config.image_size
    pixels = torch.zeros(1, model.config.num_channels, size, size, dtype=model.dtype, device=device)
    with torch.inference_mode():
        print(f"runs on: {route(model, pixels)}")
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    print(
        f"parameters: {parameters / 1e6:.0f} MB; derived weights beside them: {model.derived_bytes() / 1e6:.0f} MB"
    )
    return 0


def versions() -> str:
    packages = ("siglip-fast", "torch", "triton", "transformers")
    found = [f"{name} {version_of(name) or 'not installed'}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device}: {platform.machine()}, {torch.get_num_threads()} threads, {onednn}, {capability}"
