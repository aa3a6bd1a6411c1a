"""The stock vision tower that derived weights are made from: is it still unchanged, and is any of it hooked?"""

from collections.abc import Iterable

from torch import Tensor, nn


class Source:
    """What a tower was made of when this was: its modules, their settings, its parameters and buffers."""

    def __init__(self, tower: nn.Module, watched: Iterable[str], parameters: tuple[type, ...]):
        """`watched` are the attributes of the tower itself that matter; of the modules below it all do.

        `parameters` are the classes of parameters that are plain memory.
        """
        self.tower = tower
        self._modules = [
            (m, type(m).forward, dict(m._modules), list(settings(m).items()), len(vars(m)))
            for m in tower.modules()
            if m is not tower
        ]
        self._root = [(name, vars(tower).get(name)) for name in watched]
        self._children = dict(tower._modules)
        self._tensors = [
            (tensors, name, tensor, *_trace(tensor, parameters))
            for m in tower.modules()
            for tensors in (m._parameters, m._buffers)
            for name, tensor in tensors.items()
        ]

    def is_unchanged(self) -> bool:
        """Whether modules, settings and tensors are still the very ones, unedited, that this was made from.

        Blind to what torch does not count: edits through `.data`, NumPy or DLPack.
        """
        if any(vars(self.tower).get(name) is not value for name, value in self._root):
            return False
        if self.tower._modules != self._children:
            return False
        for module, forward, children, values, size in self._modules:
            state = module.__dict__
            if len(state) != size or type(module).forward is not forward or module._modules != children:
                return False
            if any(state.get(name) is not value for name, value in values):
                return False
        for tensors, name, tensor, alias, address, version in self._tensors:
            if tensors.get(name) is not tensor:
                return False
            if alias is not None and (tensor.data_ptr() != address or tensor._version != version):
                return False
        return True

    def intercepted(self, owner: nn.Module) -> str | None:
        """The reason if a module's forward is hooked or replaced (`owner`'s own aside: it is running)."""
        if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
            return "global module hooks are registered"
        for module in (self.tower, *(m for m, *_ in self._modules)):
            state = module.__dict__
            if module is owner:
                continue
            hooks = (*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values())
            if hooks and any(map(_is_active, hooks)):
                return f"a {type(module).__name__} has forward hooks"
            if "forward" in state and not is_own_method(module, "forward"):
                return f"the forward of a {type(module).__name__} is replaced"
        return None


def settings(module: nn.Module) -> dict[str, object]:
    """The plain public attributes, such as eps, scale, stride; not the mode."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}


def _trace(tensor: Tensor | None, parameters: tuple[type, ...]) -> tuple[Tensor | None, int, int]:
    """(alias, address, version) of a tensor whose edits show, else (None, 0, 0).

    The alias keeps the memory alive, so that a tensor moved elsewhere has another address.
    """
    if not is_plain(tensor, parameters) or tensor.is_inference() or tensor.device.type == "meta":
        return None, 0, 0
    return tensor.detach(), tensor.data_ptr(), tensor._version


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
