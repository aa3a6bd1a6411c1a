"""The fastest SigLIP vision encoder that is also exactly the one people already use."""

__all__ = ["SiglipVisionModel"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # On first use, so that the bare import (the command line's --help, a plugin scan) loads neither torch nor Triton.
    if name == "SiglipVisionModel":
        from .model import SiglipVisionModel

        return SiglipVisionModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
