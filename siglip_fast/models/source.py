"""The stock vision tower that derived weights are made from: is it still unchanged, and is any of it hooked?

Every forward asks, and there are hundreds of modules and tensors. So each question is put to all of them at once, by
functions that loop in C: with loops in Python the answers took as long as thirty kernel launches.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn

_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks")
_children = itemgetter("_modules")
_version = attrgetter("_version")


class Source:
    """What a tower was made of when this was: its modules, their settings, its parameters and buffers."""

    def __init__(self, tower: nn.Module, watched: Iterable[str], parameters: tuple[type, ...]):
        """`watched` are the attributes of the tower itself that matter, lists by what is in them; of the modules below it
        all do.

        `parameters` are the classes of parameters that are plain memory.
        """
        self.tower = tower
        self.tensors = [*tower.parameters(), *tower.buffers()]
        self._root = [(name, _as_it_is(vars(tower).get(name))) for name in watched]
        self._modules = modules = [*tower.modules()]  # the tower first
        self._states = states = [vars(m) for m in modules]
        self._children = [dict(children) for children in map(_children, states)]
        # Of the modules below the tower: its own class and attributes change when it becomes stock's again.
        self._below, self._states_below = modules[1:], states[1:]
        self._classes = [type(m) for m in self._below]
        self._forwards = [(cls, cls.forward) for cls in set(self._classes)]
        self._sizes = [len(state) for state in self._states_below]
        self._settings = _Entries([(vars(m), settings(m)) for m in self._below])
        self._parameters = _Entries([(state, state["_parameters"]) for state in states], "_parameters")
        self._buffers = _Entries([(state, state["_buffers"]) for state in states], "_buffers")
        values = self._parameters.values + self._buffers.values
        self._traced = traced = [t for t in values if _is_traced(t, parameters)]
        # They keep the memory alive, so that a tensor moved elsewhere has another address.
        self._aliases = [t.detach() for t in traced]
        self._addresses = [t.data_ptr() for t in traced]
        self._versions = [t._version for t in traced]

    def is_unchanged(self) -> bool:
        """Whether modules, settings and tensors are still those, unedited, that this was made from.

        Blind to what torch does not count: edits through `.data`, NumPy or DLPack.
        """
        root = vars(self.tower)
        try:
            return (
                all(_is_still(root.get(name), value) for name, value in self._root)
                and all(map(is_, map(vars, self._modules), self._states))
                and [*map(_children, self._states)] == self._children
                and [*map(type, self._below)] == self._classes
                and all(cls.forward is forward for cls, forward in self._forwards)
                and [*map(len, self._states_below)] == self._sizes
                and self._settings.are_equal()
                and self._parameters.are_the_same()
                and self._buffers.are_the_same()
                and [*map(_version, self._traced)] == self._versions
                and self.is_in_place()
            )
        except Exception:  # an entry is gone, or a new one cannot be compared
            return False

    def is_in_place(self) -> bool:
        """Whether the tensors that this was made from have the memory that they had then."""
        return [*map(Tensor.data_ptr, self._traced)] == self._addresses

    def intercepted(self, owner: nn.Module) -> str | None:
        """The reason if a module's forward is hooked or replaced (`owner`'s own aside: it is running), of a source that
        is unchanged."""
        if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
            return "global module hooks are registered"
        states = self._states_below if self.tower is owner else self._states
        if any(chain.from_iterable(map(_hooks, states))) or any(map(dict.__contains__, states, repeat("forward"))):
            for module in self._modules:
                if module is not owner and (reason := interception(module)):
                    return reason
        return None


def interception(module: nn.Module) -> str | None:
    """The reason if the module's own forward is hooked or replaced."""
    hooks = chain.from_iterable(hooks.values() for hooks in _hooks(vars(module)))
    if any(map(_is_active, hooks)):
        return f"a {type(module).__name__} has forward hooks"
    if "forward" in vars(module) and not is_own_method(module, "forward"):
        return f"the forward of a {type(module).__name__} is replaced"
    return None


class _Entries:
    """Some entries of many modules' attributes, and the values that they had when this was made."""

    def __init__(self, entries: Iterable[tuple[dict[str, Any], Iterable[str]]], attribute: str | None = None):
        """Of modules' `__dict__`s and names in them, or in the dictionary that is their `attribute`."""
        by_names: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for state, names in entries:
            by_names.setdefault(tuple(names), []).append(state)
        self._inner = attribute and itemgetter(attribute)
        # itemgetter of one name gives its value, of more a tuple
        self._of_one = [(itemgetter(*names), group) for names, group in by_names.items() if len(names) == 1]
        self._of_more = [(itemgetter(*names), group) for names, group in by_names.items() if len(names) > 1]
        self._before = self._now()
        self.values = [*self._flat()]

    def _rows(self, groups: list[tuple[Callable, list]]) -> list[Iterator]:
        if self._inner is None:
            return [map(get, group) for get, group in groups]
        return [map(get, map(self._inner, group)) for get, group in groups]

    def _now(self) -> list[list]:
        return [[*row] for row in chain(self._rows(self._of_one), self._rows(self._of_more))]

    def _flat(self) -> Iterator[Any]:
        return chain.from_iterable([*self._rows(self._of_one), *map(chain.from_iterable, self._rows(self._of_more))])

    def are_equal(self) -> bool:
        """Raises KeyError where an entry is gone, and what a comparison raises."""
        return self._now() == self._before

    def are_the_same(self) -> bool:
        """Raises KeyError where an entry is gone."""
        return all(map(is_, self._flat(), self.values))


def settings(module: nn.Module) -> dict[str, object]:
    """The plain public attributes, such as eps, scale, stride; not the mode."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}


def _as_it_is(value: object) -> object:
    return [*value] if type(value) is list else value


def _is_still(now: object, value: object) -> bool:
    return now is value or (type(now) is type(value) is list and now == value)


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
