"""`siglip-fast info`: versions, device, the backend that would run here and why, and what its weights cost in memory."""

import platform
from argparse import Namespace
from importlib import metadata

from .loading import load_model, pick_device, route


def run(args: Namespace) -> int:
    import torch

    device = pick_device(args.device)
    for line in (*versions(), *machine(device)):
        print(line)
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


def versions() -> list[str]:
    def version(name: str) -> str:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            return f"{name} not installed"

    packages = ("siglip-fast", "torch", "triton", "transformers")
    return [", ".join([f"Python {platform.python_version()}", *map(version, packages)])]


def machine(device) -> list[str]:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return [f"{device}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"]
    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    return [
        f"{device}: {platform.machine()}, {torch.get_num_threads()} threads, {onednn}, {torch.backends.cpu.get_cpu_capability()}"
    ]
