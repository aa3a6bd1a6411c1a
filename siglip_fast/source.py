"""The stock vision tower that derived weights are made from: is it stock's in every detail, and still unchanged?"""

import functools

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.siglip import modeling_siglip as stock

from .ops import DTYPES

# Beyond it the attention kernel's tile outgrows the shared memory of sm_86, sm_89 and sm_120.
MAX_HEAD_DIM = 128


class Unsupported(Exception):
    """The tower is not one that the operations compute; the message says why."""


class Source:
    """What a tower was made of when this was: its modules, their settings, its parameters and buffers."""

    def __init__(self, tower: nn.Module):
        self.tower = tower
        self._modules = [
            (m, type(m).forward, dict(m._modules), list(_settings(m).items()), len(vars(m)))
            for m in tower.modules()
            if m is not tower
        ]
        self._root = [(name, vars(tower).get(name)) for name in ("use_head", "config")]
        self._tensors = [
            (tensors, name, tensor, *_trace(tensor))
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
        for module, forward, children, settings, size in self._modules:
            state = module.__dict__
            if len(state) != size or type(module).forward is not forward or module._modules != children:
                return False
            if any(state.get(name) is not value for name, value in settings):
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
            if "forward" in state and not _is_own_method(module, "forward"):
                return f"the forward of a {type(module).__name__} is replaced"
        return None

    def check(self) -> None:
        """Raise Unsupported unless every module computes what stock's does, on plain tensors of one dtype.

        The measure is a fresh module of the tower's own config.
        """
        tower, config = self.tower, self.tower.config
        with torch.device("meta"):
            _compare("embeddings", tower.embeddings, stock.SiglipVisionEmbeddings(config))
            layer = stock.SiglipEncoderLayer(config)
            if type(layer.mlp.activation_fn) is not type(ACT2FN["gelu_pytorch_tanh"]):
                raise Unsupported(f"hidden_act is {config.hidden_act!r}, not 'gelu_pytorch_tanh'")
            if layer.self_attn.head_dim > MAX_HEAD_DIM:
                raise Unsupported(f"head_dim is above {MAX_HEAD_DIM}")
            for i, own in enumerate(tower.encoder.layers):
                _compare(f"encoder.layers.{i}", own, layer)
            _compare("post_layernorm", tower.post_layernorm, nn.LayerNorm(config.hidden_size))
            if tower.use_head:
                _compare("head", tower.head, stock.SiglipMultiheadAttentionPoolingHead(config))
        _compare_class("encoder", tower.encoder, stock.SiglipEncoder)
        if hasattr(stock, "SiglipVisionTransformer"):  # nested until transformers 5.6
            _compare_class("vision_model", tower, stock.SiglipVisionTransformer)
        _check_tensors(tower)


def _settings(module: nn.Module) -> dict[str, object]:
    """The plain public attributes, such as eps, scale, stride; not the mode."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}


def _trace(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """(alias, address, version) of a tensor whose edits show, else (None, 0, 0).

    The alias keeps the memory alive, so that a tensor moved elsewhere has another address.
    """
    if not _is_plain(tensor) or tensor.is_inference() or tensor.device.type == "meta":
        return None, 0, 0
    return tensor.detach(), tensor.data_ptr(), tensor._version


def _is_plain(tensor: Tensor | None) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and type(tensor.data) is Tensor


def _is_active(hook) -> bool:
    # transformers ≥ 5.2 leaves its output recorders in place; they record only what a forward was asked to
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def _is_own_method(module: nn.Module, name: str) -> bool:
    # transformers 4.57 leaves the bound original in the instance after it captured outputs
    method = vars(module)[name]
    own = getattr(type(module), name, None)
    return getattr(method, "__self__", None) is module and getattr(method, "__func__", None) is own


def _compare(name: str, module: nn.Module | None, fresh: nn.Module) -> None:
    """Raise Unsupported where `module` or one below it differs from `fresh` in class, settings or shapes."""
    _compare_class(name, module, type(fresh))
    for key, expected in _settings(fresh).items():
        own = vars(module).get(key)
        # eps is read when the weights are derived; of the config only what the modules made of it is compared
        if key not in ("eps", "config") and not _is_same(own, expected):
            raise Unsupported(f"{name}.{key} is {own!r}, by the config {expected!r}")
    for key, value in vars(module).items():
        if key not in vars(fresh) and callable(value) and not _is_own_method(module, key):
            raise Unsupported(f"{name}.{key} is replaced")
    for own, expected in ((module._parameters, fresh._parameters), (module._buffers, fresh._buffers)):
        for key, tensor in expected.items():
            shapes = [None if t is None else tuple(t.shape) for t in (own.get(key), tensor)]
            if shapes[0] != shapes[1]:
                raise Unsupported(f"{name}.{key} has shape {shapes[0]}, by the config {shapes[1]}")
    for key, child in fresh._modules.items():
        _compare(f"{name}.{key}", module._modules.get(key), child)


def _compare_class(name: str, module: nn.Module | None, expected: type) -> None:
    if type(module) is not expected:
        raise Unsupported(f"{name} is a {type(module).__name__}, not a {expected.__name__}")
    home = expected.__module__
    if not home.startswith(("torch.nn.modules.", "transformers.")) or expected.forward.__module__ != home:
        raise Unsupported(f"the forward of {expected.__name__} is patched")


def _is_same(own: object, expected: object) -> bool:
    if isinstance(own, functools.partial) and isinstance(expected, functools.partial):
        return (own.func, own.args, own.keywords) == (expected.func, expected.args, expected.keywords)
    return type(own) is type(expected) and own == expected


def _check_tensors(tower: nn.Module) -> None:
    reference = tower.embeddings.patch_embedding.weight
    parameters = dict(tower.named_parameters())
    for name, tensor in (parameters | dict(tower.named_buffers())).items():
        # A parameter that is none was put there for the time of a call (torch.func.functional_call, FSDP).
        if not _is_plain(tensor) or (name in parameters and type(tensor) is not nn.Parameter):
            raise Unsupported(f"{name} is a {type(tensor).__name__}, not a plain tensor")
        if tensor.is_inference():
            raise Unsupported(
                "the parameters were made under torch.inference_mode, which hides in-place edits: "
                "build the model outside of it"
            )
        if tensor.device != reference.device:
            raise Unsupported("the parameters are on several devices")
        if name in parameters and (tensor.dtype not in DTYPES or tensor.dtype != reference.dtype):
            raise Unsupported(f"{name} is {tensor.dtype}; expected all of one of {DTYPES}")
    if reference.device.type == "meta":
        raise Unsupported("the parameters are on the meta device")
    position_ids = tower.embeddings.position_ids
    if not torch.equal(position_ids, torch.arange(position_ids.shape[1], device=position_ids.device)[None]):
        raise Unsupported("position_ids are not 0, 1, 2, …")
