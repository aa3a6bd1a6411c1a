"""The fastest SigLIP vision encoder that is also exactly the one people already use."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "SiglipVisionModel": "models.siglip",
    "apply_to": "models.swap",
    "restore": "models.swap",
    "towers": "models.swap",
    "register": "models.swap",
    "unregister": "models.swap",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    # On first use, so that the bare import (the command line's --help, a plugin scan) loads neither torch nor Triton.
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
