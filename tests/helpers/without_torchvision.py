"""timm and open_clip import torchvision, for image transforms and data sets that no test here uses.

Where it is missing, or does not fit the torch that is installed, they are imported with empty modules in its place.
"""

import contextlib
import sys
import types
from collections.abc import Iterator

import transformers  # noqa: F401  it asks for torchvision once, when imported, and should get the true answer
from torch import nn

_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class _Member(type):
    def __getattr__(cls, name: str) -> str:  # InterpolationMode.BICUBIC
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or _Member(name, (nn.Module,), {})


@contextlib.contextmanager
def torchvision_or_empty_modules() -> Iterator[None]:
    """torchvision can be imported in here; the empty modules are gone afterwards."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # of operators that its library did not bring
        modules = {name: _Module(name) for name in _MODULES}
        sys.modules.update(modules)
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    else:
        yield
