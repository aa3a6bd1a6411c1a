"""What a tower has to be for the operations to compute it, and where its weights are.

The measure is a fresh module of the tower's own config: every class, setting, shape and callable has to equal its.
"""

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from ..ops import DTYPES
from .source import is_own_method, is_plain, settings

# Beyond it the attention kernel's tile outgrows the shared memory of sm_86, sm_89 and sm_120.
MAX_HEAD_DIM = 128


class Unsupported(Exception):
    """The tower is not one that the operations compute; the message says why."""


class Anatomy(NamedTuple):
    """How one kind of tower is built."""

    check: Callable[[nn.Module], None]  # raises Unsupported unless the operations compute what the tower does
    view: Callable[[nn.Module], Any]  # the tower under the names of transformers' SigLIP, without copies
    patch_embedding: Callable[[nn.Module], nn.Module | None]  # None where something else is in its place
    watched: tuple[str, ...]  # attributes of the tower itself that its results depend on
    parameters: tuple[type, ...] = (nn.Parameter,)  # the classes of parameters that are plain memory


def of_transformers(
    home: types.ModuleType, prefix: str, tower_class: type | None = None, activation: str = "gelu_pytorch_tanh"
) -> Anatomy:
    """That of the towers of `home`, transformers' modeling_siglip or a descendant, whose classes' names begin so.

    `tower_class` is the tower's own where it is a module inside of the fast model; `activation` is that of the layers.
    """
    embeddings, encoder, layer = (_part(home, prefix, name) for name in ("Embeddings", "Encoder", "EncoderLayer"))
    head = _part(home, prefix, "MultiheadAttentionPoolingHead")

    def check(tower: nn.Module) -> None:
        config = tower.config
        compare_class("encoder", tower.encoder, encoder)
        with torch.device("meta"):
            compare("embeddings", tower.embeddings, embeddings(config))
            expected = layer(config)
            check_layers("encoder.layers", tower.encoder.layers, expected, activation)
            check_head_dim(expected.self_attn.head_dim)
            compare("post_layernorm", tower.post_layernorm, nn.LayerNorm(config.hidden_size))
            if has_head(tower):
                compare("head", tower.head, head(config))
        if tower_class is not None:
            compare_class("vision_model", tower, tower_class)
        check_tensors(tower, tower.embeddings.patch_embedding.weight)
        check_position_ids(tower.embeddings._buffers.get("position_ids"))

    return Anatomy(
        check=check,
        view=lambda tower: tower,
        patch_embedding=lambda tower: descendant(tower, "embeddings", "patch_embedding"),
        watched=("use_head", "config"),
    )


def of_layers(
    stock: type[nn.Module],
    view: Callable[[nn.Module], Any],
    patch_at: tuple[str, ...],
    layers_at: tuple[str, ...] = ("encoder", "layers"),
    attention_name: str = "self_attn",
    rotates: bool = True,
    activation: str = "gelu_pytorch_tanh",
    watched: tuple[str, ...] = (),
    check: Callable[[nn.Module], None] = lambda tower: None,
) -> Anatomy:
    """That of the towers of a class whose constructor takes the config: measured by one of one layer. The names lead to the
    projection of patches and to the layers; `check` is what else there is to say of a tower that equals such."""

    def checked(tower: nn.Module) -> None:
        fresh = of_one_layer(stock, tower.config)
        layers, expected = _compare_around(tower, fresh, layers_at)
        if not len(layers):
            raise Unsupported("there are no layers")
        activations = [child for child in expected[0].mlp.children() if not isinstance(child, nn.Linear)]
        if [*map(type, activations)] != [type(ACT2FN[activation])]:
            raise Unsupported(f"hidden_act is {tower.config.hidden_act!r}, not {activation!r}")
        head_dim = getattr(expected[0], attention_name).head_dim
        check_head_dim(head_dim)
        if rotates and head_dim % 4:
            raise Unsupported("head_dim is no multiple of 4")
        for i, own in enumerate(layers):
            compare(f"{layers_at[-1]}.{i}", own, expected[0])
        check(tower)
        check_tensors(tower, descendant(tower, *patch_at).weight)

    return Anatomy(checked, view, lambda tower: descendant(tower, *patch_at), ("config", *watched))


def of_one_layer(stock: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """A tower of this config, but of one layer, on the meta device."""
    config = copy.deepcopy(config)
    setattr(config, "depth" if hasattr(config, "depth") else "num_hidden_layers", 1)
    config._attn_implementation = "sdpa"  # whatever else was asked for need not be installed for this
    with torch.device("meta"):
        return stock(config)


def _compare_around(tower: nn.Module, fresh: nn.Module, layers_at: tuple[str, ...]) -> tuple[nn.Module, nn.Module]:
    """Compares all modules but the layers, and gives those of both. Of what holds them only the class counts: gradient
    checkpointing, which acts in training, leaves its mark there."""
    own: nn.Module | None = tower
    for name in layers_at:
        for other, expected in fresh.named_children():
            if other != name:
                compare(other, own._modules.get(other), expected)
        own, fresh = own._modules.get(name), fresh._modules[name]
        compare_class(name, own, type(fresh))
    return own, fresh


def _part(home: types.ModuleType, prefix: str, name: str) -> type[nn.Module] | None:
    return getattr(home, f"{prefix}Vision{name}", None) or getattr(home, f"{prefix}{name}", None)


def has_head(tower: Any) -> bool:
    """Whether stock's forward of the tower pools: by its setting, where it has one."""
    return getattr(tower, "use_head", hasattr(tower, "head"))


def descendant(module: nn.Module | None, *names: str) -> nn.Module | None:
    """The module below `module` by these names, or None where there is none."""
    for name in names:
        module = None if module is None else module._modules.get(name)
    return module


def check_layers(name: str, layers: nn.Module, expected: nn.Module, activation: str = "gelu_pytorch_tanh") -> None:
    """Raise Unsupported unless `layers` are some such as `expected`, with this activation."""
    compare_class(name, layers, nn.ModuleList)
    if not len(layers):
        raise Unsupported("there are no layers")
    if type(expected.mlp.activation_fn) is not type(ACT2FN[activation]):
        raise Unsupported(f"hidden_act is {expected.mlp.config.hidden_act!r}, not {activation!r}")
    for i, own in enumerate(layers):
        compare(f"{name}.{i}", own, expected)


def check_head_dim(head_dim: int) -> None:
    """Raise Unsupported unless the attention kernel has a tile for it."""
    if head_dim > MAX_HEAD_DIM:
        raise Unsupported(f"head_dim is above {MAX_HEAD_DIM}")


def layer_view(norms: Sequence[nn.Module], qkv: nn.Module, out_proj: nn.Module, num_heads: int, mlp: nn.Module) -> Any:
    """A layer whose Q, K and V are one matrix, under the names of transformers' SigLIP."""
    attention = types.SimpleNamespace(out_proj=out_proj, num_heads=num_heads)
    biases = [None] * 3 if qkv.bias is None else qkv.bias.chunk(3)
    attention.q_proj, attention.k_proj, attention.v_proj = (
        types.SimpleNamespace(weight=weight, bias=bias)
        for weight, bias in zip(qkv.weight.chunk(3), biases, strict=True)
    )
    return types.SimpleNamespace(self_attn=attention, mlp=mlp, layer_norm1=norms[0], layer_norm2=norms[1])


def packed_embeddings(projection: nn.Module, patch_size: int) -> Any:
    """Embeddings of a tower on packed rows, under the names of transformers' SigLIP: for no number of patches in particular."""
    return types.SimpleNamespace(patch_embedding=projection, patch_size=patch_size, num_patches=1)


def block_view(block: nn.Module, mlp: Any) -> Any:
    """A layer that has `norm1`, `attn` and `norm2`, under the names of transformers' SigLIP."""
    own = block.attn
    return layer_view((block.norm1, block.norm2), own.qkv, own.proj, own.num_heads, mlp)


def blocks_view(tower: nn.Module, layers: list[Any], **more: Any) -> Any:
    """A tower that has a `patch_embed` and layers such as `layers`, under the names of transformers' SigLIP; `more` is what
    else it has."""
    return types.SimpleNamespace(
        embeddings=packed_embeddings(tower.patch_embed.proj, tower.patch_embed.patch_size),
        encoder=types.SimpleNamespace(layers=layers),
        **{"post_layernorm": None} | more,
    )


def siglip_view(tower: nn.Module, rotates: bool = True) -> Any:
    """A tower on packed rows whose modules have the names of transformers' SigLIP."""
    embeddings = tower.embeddings
    return types.SimpleNamespace(
        embeddings=packed_embeddings(embeddings.patch_embedding, embeddings.patch_size),
        encoder=tower.encoder,
        post_layernorm=tower.post_layernorm,
        rotates=rotates,
    )


def compare(name: str, module: nn.Module | None, fresh: nn.Module) -> None:
    """Raise Unsupported where `module` or one below it differs from `fresh` in class, settings or shapes."""
    compare_class(name, module, type(fresh))
    for key, expected in settings(fresh).items():
        own = vars(module).get(key)
        # eps is read when the weights are derived; of the config only what the modules made of it is compared
        if key not in ("eps", "config") and not _is_same(own, expected):
            raise Unsupported(f"{name}.{key} is {own!r}, by the config {expected!r}")
    for key, value in vars(module).items():
        # gradient checkpointing leaves its function behind when it is disabled; it acts in training only
        is_known = key in vars(fresh) or key == "_gradient_checkpointing_func"
        if not is_known and callable(value) and not is_own_method(module, key):
            raise Unsupported(f"{name}.{key} is replaced")
    for own, expected in ((module._parameters, fresh._parameters), (module._buffers, fresh._buffers)):
        for key, tensor in expected.items():
            shapes = [None if t is None else tuple(t.shape) for t in (own.get(key), tensor)]
            if shapes[0] != shapes[1]:
                raise Unsupported(f"{name}.{key} has shape {shapes[0]}, by the config {shapes[1]}")
    for key, child in fresh._modules.items():
        compare(f"{name}.{key}", module._modules.get(key), child)


def compare_class(name: str, module: nn.Module | None, expected: type) -> None:
    if type(module) is not expected:
        classes = (type(module), expected)
        names = [cls.__name__ for cls in classes]
        if names[0] == names[1]:
            names = [f"{cls.__module__}.{cls.__name__}" for cls in classes]
        raise Unsupported(f"{name} is a {names[0]}, not a {names[1]}")
    home, forward = expected.__module__, expected.forward
    is_own = forward.__module__ == home or forward is nn.Module.forward  # the latter of a list, which is not called
    if not home.startswith(("torch.nn.modules.", "transformers.", "timm.")) or not is_own:
        raise Unsupported(f"the forward of {expected.__name__} is patched")


def _is_same(own: object, expected: object) -> bool:
    if isinstance(own, functools.partial) and isinstance(expected, functools.partial):
        return (own.func, own.args, own.keywords) == (expected.func, expected.args, expected.keywords)
    return type(own) is type(expected) and own == expected


def check_tensors(tower: nn.Module, reference: Tensor, classes: tuple[type, ...] = (nn.Parameter,)) -> None:
    """Raise Unsupported unless all tensors are plain, parameters of `classes`, with `reference`'s device and dtype."""
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in tower.modules()):
        # What a call sees was gathered for it, into the same parameters each time; torch does not count that as an edit.
        raise Unsupported("the parameters are FSDP's, gathered for the time of a call")
    parameters = dict(tower.named_parameters())
    for name, tensor in (parameters | dict(tower.named_buffers())).items():
        # A parameter that is none was put there for the time of a call (torch.func.functional_call, FSDP).
        if not is_plain(tensor, classes) or (name in parameters and type(tensor) not in classes):
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


def check_position_ids(position_ids: Tensor | None) -> None:
    """Raise Unsupported unless the patches have the positions 0, 1, 2, …"""
    if position_ids is None:  # of a kind that computes them
        return
    if not torch.equal(position_ids, torch.arange(position_ids.shape[1], device=position_ids.device)[None]):
        raise Unsupported("position_ids are not 0, 1, 2, …")
