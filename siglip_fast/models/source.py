"""The stock vision tower that derived weights are made from: is it still unchanged, and is any of it hooked?

Every forward asks, and there are hundreds of modules and tensors. So each question is put to all of them at once, by
functions that loop in C: with loops in Python the answers took as long as thirty kernel launches.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn

_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks")
_version = attrgetter("_version")


class Source:
    """What a tower was made of when this was: its modules, their settings, its parameters and buffers."""

    def __init__(self, tower: nn.Module, watched: Iterable[str], parameters: tuple[type, ...]):
        """`watched` are the attributes of the tower itself that matter; of the modules below it all do.

        `parameters` are the classes of parameters that are plain memory.
        """
        self.tower = tower
        self.tensors = [*tower.parameters(), *tower.buffers()]
        self._root = [(name, vars(tower).get(name)) for name in watched]
        self._modules = modules = [m for m in tower.modules() if m is not tower]
        self._classes = [type(m) for m in modules]
        self._forwards = [(cls, cls.forward) for cls in set(self._classes)]
        self._states = [vars(m) for m in modules]
        self._sizes = [len(state) for state in self._states]
        self._settings = _Entries((vars(m), settings(m)) for m in modules)
        self._children = [m._modules for m in (tower, *modules)]
        self._children_were = [dict(children) for children in self._children]
        self._tensors = _Entries((d, d) for m in (tower, *modules) for d in (m._parameters, m._buffers))
        traced = [t for t in self._tensors.values if _is_traced(t, parameters)]
        self._traced = traced
        # They keep the memory alive, so that a tensor moved elsewhere has another address.
        self._aliases = [t.detach() for t in traced]
        self._addresses = [t.data_ptr() for t in traced]
        self._versions = [t._version for t in traced]
        self._replaced = [m for m in (tower, *modules) if "forward" in vars(m) and not is_own_method(m, "forward")]

    def is_unchanged(self) -> bool:
        """Whether modules, settings and tensors are still those, unedited, that this was made from.

        Blind to what torch does not count: edits through `.data`, NumPy or DLPack.
        """
        root = vars(self.tower)
        try:
            return (
                all(root.get(name) is value for name, value in self._root)
                and self._children == self._children_were
                and [*map(type, self._modules)] == self._classes
                and all(cls.forward is forward for cls, forward in self._forwards)
                and [*map(len, self._states)] == self._sizes
                and self._settings.are_equal()
                and self._tensors.are_the_same()
                and [*map(_version, self._traced)] == self._versions
                and [*map(Tensor.data_ptr, self._traced)] == self._addresses
            )
        except Exception:  # an entry is gone, or a new one cannot be compared
            return False

    def intercepted(self, owner: nn.Module) -> str | None:
        """The reason if a module's forward is hooked or replaced (`owner`'s own aside: it is running), of a source that
        is unchanged."""
        if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
            return "global module hooks are registered"
        states = self._states if self.tower is owner else [*self._states, vars(self.tower)]
        if any(chain.from_iterable(map(_hooks, states))):
            for module in (self.tower, *self._modules):
                hooks = chain.from_iterable(hooks.values() for hooks in _hooks(vars(module)))
                if module is not owner and any(map(_is_active, hooks)):
                    return f"a {type(module).__name__} has forward hooks"
        for module in self._replaced:
            if module is not owner:
                return f"the forward of a {type(module).__name__} is replaced"
        return None


class _Entries:
    """Some entries of many dictionaries, and the values that they had when this was made."""

    def __init__(self, entries: Iterable[tuple[dict[str, Any], Iterable[str]]]):
        """Of dictionaries and names in them."""
        by_names: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for dictionary, names in entries:
            by_names.setdefault(tuple(names), []).append(dictionary)
        # itemgetter of one name gives its value, of more a tuple
        self._of_one = [(itemgetter(*names), group) for names, group in by_names.items() if len(names) == 1]
        self._of_more = [(itemgetter(*names), group) for names, group in by_names.items() if len(names) > 1]
        self._before = self._now()
        self.values = [*self._flat()]

    def _now(self) -> list[list]:
        return [[*map(get, group)] for get, group in chain(self._of_one, self._of_more)]

    def _flat(self) -> Iterator[Any]:
        each = [map(get, group) for get, group in self._of_one]
        each += [chain.from_iterable(map(get, group)) for get, group in self._of_more]
        return chain.from_iterable(each)

    def are_equal(self) -> bool:
        """Raises KeyError where an entry is gone, and what a comparison raises."""
        return self._now() == self._before

    def are_the_same(self) -> bool:
        """Raises KeyError where an entry is gone."""
        return all(map(is_, self._flat(), self.values))


def settings(module: nn.Module) -> dict[str, object]:
    """The plain public attributes, such as eps, scale, stride; not the mode."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}


def _is_traced(tensor: Tensor | None, parameters: tuple[type, ...]) -> bool:
    """Whether the tensor's edits show."""
    return is_plain(tensor, parameters) and not tensor.is_inference() and tensor.device.type != "meta"


def is_plain(tensor: Tensor | None, parameters: tuple[type, ...]) -> bool:
    return type(tensor) in (Tensor, nn.Buffer, *parameters) and type(tensor.data) is Tensor


def _is_active(hook) -> bool:
    # transformers ≥ 5.2 leaves its output recorders in place; they record only what a forward was asked to
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def is_own_method(module: nn.Module, name: str) -> bool:
    # transformers 4.57 leaves the bound original in the instance after it captured outputs
    method = vars(module)[name]
    own = getattr(type(module), name, None)
    return getattr(method, "__self__", None) is module and getattr(method, "__func__", None) is own
