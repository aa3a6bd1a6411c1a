"""Fast classes that are made when asked for: each is of another module of transformers, not all of which every version has."""

import importlib
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Make = Callable[[types.ModuleType, type[nn.Module]], type[nn.Module]]


def on_demand(
    namespace: dict[str, Any], modules: Mapping[str, str], make: Make
) -> tuple[Callable[[str], type[nn.Module]], Callable[[], list[type[nn.Module]]]]:
    """Of a module here, whose globals are `namespace`, `__getattr__` and what lists the classes that there are.

    `modules` has for the name of each class the part of transformers that stock's of that name is in; `make` is called with that
    module and stock's class.
    """

    def get(name: str) -> type[nn.Module]:
        home = _home(modules[name]) if name in modules else None
        if home is None:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")
        return namespace.setdefault(name, make(home, getattr(home, name)))

    def installed() -> list[type[nn.Module]]:
        return [namespace.get(name) or get(name) for name, part in modules.items() if _home(part) is not None]

    return get, installed


def _home(part: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(f"transformers.models.{part}.modeling_{part}")
    except ImportError:  # the installed transformers has none
        return None


def fast_class(tower: type[nn.Module], stock: type[nn.Module], **members: Any) -> type[nn.Module]:
    """`stock` made fast by a family's `tower`, mixed into it; in the module `home` of its members, or that of the tower."""
    about = {
        "__module__": members.pop("home", tower.__module__),
        "__doc__": f"transformers' {stock.__name__}, made fast; see `siglip_fast.apply_to`.",
    }
    return type(stock.__name__, (tower, stock), about | members)
