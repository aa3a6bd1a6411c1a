"""Derived weights: the tower's parameters, merged and folded as the operations want them.

`Derived` is built from a stock vision tower and knows whether it still mirrors it. It never enters the state dict;
biases, position embedding, output projection and fc2 are the parameters' own memory, the merged QKV and fc1 are copies.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.siglip import modeling_siglip as stock

from .ops import DTYPES, Linear, Norm, NormedLinear, PatchEmbedding, Pool


class LayerWeights(NamedTuple):
    qkv: NormedLinear
    out_proj: Linear
    fc1: NormedLinear
    fc2: Linear


class HeadWeights(NamedTuple):
    pool: Pool
    out_proj: Linear
    fc1: NormedLinear
    fc2: Linear


class TowerWeights(NamedTuple):
    patch: PatchEmbedding
    layers: list[LayerWeights]
    post_layernorm: Norm
    head: HeadWeights | None
    num_heads: int


class Unsupported(Exception):
    """The tower is not one that the operations compute; the message says why."""


class Derived:
    """The derived weights of a tower, or the reason why there are none, and what both were read from."""

    def __init__(self, tower: nn.Module):
        self._modules = [(m, dict(m._modules), _scalars(m)) for m in tower.modules()]
        # The aliases keep the old memory alive, so that a parameter moved elsewhere has another address.
        self._tensors = [
            (tensors, name, t, t.detach(), t.data_ptr(), None if t.is_inference() else t._version)
            for m in tower.modules()
            for tensors in (m._parameters, m._buffers)
            for name, t in tensors.items()
            if t is not None and type(t.data) is Tensor and t.device.type != "meta"
        ]
        self.parameters = list(tower.parameters())
        self.weights: TowerWeights | None = None
        self.reason: str | None = None
        try:
            _check_tower(tower)
            # Also under inference_mode the copies have to be ordinary tensors: they outlive it.
            with torch.inference_mode(False), torch.no_grad():
                self.weights = _tower_weights(tower)
        except Unsupported as unsupported:
            self.reason = str(unsupported)

    def mirrors_source(self) -> bool:
        """Whether modules and tensors are still the very ones, in place and unedited, that this was made from.

        Blind to one thing: in-place edits through `.data`, which torch does not count.
        """
        for module, children, scalars in self._modules:
            if module._modules != children or _scalars(module) != scalars:
                return False
        for tensors, name, tensor, _, address, version in self._tensors:
            if tensors.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        return True

    def intercepted(self, owner: nn.Module) -> str | None:
        """The reason if a module's forward is hooked or replaced (`owner`'s own aside: it is running)."""
        if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
            return "global module hooks are registered"
        for module, _, _ in self._modules:
            state = module.__dict__
            if module is owner:
                continue
            if any(
                map(_is_active, (*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values()))
            ):
                return f"a {type(module).__name__} has forward hooks"
            replaced = state.get("forward")
            # transformers 4.57 leaves the bound original there after it captured outputs
            if replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward:
                return f"the forward of a {type(module).__name__} is replaced"
        return None


def _scalars(module: nn.Module) -> tuple:
    return tuple(map(module.__dict__.get, ("eps", "scale", "stride")))


def _is_active(hook) -> bool:
    # transformers ≥ 5.2 leaves its output recorders in place; they record only what a forward was asked to
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


_GELU_TANH = type(ACT2FN["gelu_pytorch_tanh"])
_MLP = {
    ".mlp": stock.SiglipMLP,
    ".mlp.activation_fn": _GELU_TANH,
    ".mlp.fc1": nn.Linear,
    ".mlp.fc2": nn.Linear,
}
_LAYER = {
    "": stock.SiglipEncoderLayer,
    ".layer_norm1": nn.LayerNorm,
    ".self_attn": stock.SiglipAttention,
    ".self_attn.q_proj": nn.Linear,
    ".self_attn.k_proj": nn.Linear,
    ".self_attn.v_proj": nn.Linear,
    ".self_attn.out_proj": nn.Linear,
    ".layer_norm2": nn.LayerNorm,
    **_MLP,
}
_HEAD = {
    "": stock.SiglipMultiheadAttentionPoolingHead,
    ".attention": nn.MultiheadAttention,
    ".attention.out_proj": nn.modules.linear.NonDynamicallyQuantizableLinear,
    ".layernorm": nn.LayerNorm,
    **_MLP,
}
_EMBEDDINGS = {
    "": stock.SiglipVisionEmbeddings,
    ".patch_embedding": nn.Conv2d,
    ".position_embedding": nn.Embedding,
}


def _check_tower(tower: nn.Module) -> None:
    """Raise Unsupported unless every module computes what stock's does, on plain tensors of one dtype."""
    expected = {"encoder": stock.SiglipEncoder, "post_layernorm": nn.LayerNorm}
    prefixes = {"embeddings": _EMBEDDINGS} | ({"head": _HEAD} if tower.use_head else {})
    prefixes |= {f"encoder.layers.{i}": _LAYER for i in range(len(tower.encoder.layers))}
    expected |= {prefix + name: kind for prefix, kinds in prefixes.items() for name, kind in kinds.items()}
    modules = dict(tower.named_modules())
    for name, kind in expected.items():
        module = modules.get(name)
        if type(module) is not kind:
            raise Unsupported(f"{name} is a {type(module).__name__}, not a {kind.__name__}")
        if kind in (nn.Linear, nn.Conv2d, nn.LayerNorm) and None in module._parameters.values():
            raise Unsupported(f"{name} lacks a weight or a bias")
    for layer in tower.encoder.layers:
        if layer.self_attn.scale != layer.self_attn.head_dim**-0.5:
            raise Unsupported("an attention layer's scale is not 1 / √head_dim")
    _check_embeddings(tower.embeddings)
    _check_tensors(tower)


def _check_embeddings(embeddings: nn.Module) -> None:
    conv, p = embeddings.patch_embedding, embeddings.patch_size
    if not conv.stride == conv.kernel_size == (p, p) or conv.padding not in ("valid", (0, 0)):
        raise Unsupported("embeddings.patch_embedding is not a convolution over disjoint patches")
    if conv.dilation != (1, 1) or conv.groups != 1:
        raise Unsupported("embeddings.patch_embedding is dilated or grouped")


def _check_tensors(tower: nn.Module) -> None:
    reference = tower.embeddings.patch_embedding.weight
    for name, parameter in tower.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            raise Unsupported(f"{name} is a {type(parameter.data).__name__}, not a plain tensor")
        if parameter.is_inference():
            raise Unsupported(
                "the parameters were made under torch.inference_mode, which hides in-place edits: "
                "build the model outside of it"
            )
        if parameter.dtype not in DTYPES:
            raise Unsupported(f"{parameter.dtype} parameters")
        if (parameter.dtype, parameter.device) != (reference.dtype, reference.device):
            raise Unsupported("the parameters differ in dtype or device")
    if reference.device.type == "meta":
        raise Unsupported("the parameters are on the meta device")
    position_ids = tower.embeddings.position_ids
    if not torch.equal(position_ids[0], torch.arange(position_ids.shape[1], device=position_ids.device)):
        raise Unsupported("position_ids are not 0, 1, 2, …")


def _tower_weights(tower: nn.Module) -> TowerWeights:
    conv = tower.embeddings.patch_embedding
    return TowerWeights(
        patch=PatchEmbedding(_plain(conv.weight).flatten(1), _plain(conv.bias), tower.embeddings.patch_size),
        layers=[_layer_weights(layer) for layer in tower.encoder.layers],
        post_layernorm=_norm(tower.post_layernorm),
        head=_head_weights(tower.head) if tower.use_head else None,
        num_heads=tower.config.num_attention_heads,
    )


def _layer_weights(layer: nn.Module) -> LayerWeights:
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([p.weight for p in projections])
    bias = torch.cat([p.bias for p in projections])
    return LayerWeights(
        qkv=_fold(layer.layer_norm1, weight, bias),
        out_proj=_linear(attention.out_proj),
        fc1=_fold(layer.layer_norm2, layer.mlp.fc1.weight, layer.mlp.fc1.bias),
        fc2=_linear(layer.mlp.fc2),
    )


def _head_weights(head: nn.Module) -> HeadWeights:
    attention, H = head.attention, head.attention.num_heads
    query_weight, key_weight, value_weight = _plain(attention.in_proj_weight).chunk(3)
    query_bias, _, value_bias = _plain(attention.in_proj_bias).chunk(3)
    # Elementwise sums, because a matmul could be TF32; this happens once.
    query = (query_weight.float() * head.probe[0].float()).sum(1) + query_bias.float()
    query = query.unflatten(0, (H, -1)) * (query.numel() // H) ** -0.5
    scores = (query[:, :, None] * key_weight.float().unflatten(0, (H, -1))).sum(1)
    return HeadWeights(
        pool=Pool(scores, Linear(value_weight, value_bias)),
        out_proj=_linear(attention.out_proj),
        fc1=_fold(head.layernorm, head.mlp.fc1.weight, head.mlp.fc1.bias),
        fc2=_linear(head.mlp.fc2),
    )


def _plain(parameter: Tensor) -> Tensor:
    """The parameter's own memory where it is contiguous, else a copy; either way as the kernels index it."""
    return parameter.detach().contiguous()


def _linear(linear: nn.Linear) -> Linear:
    return Linear(_plain(linear.weight), _plain(linear.bias))


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(_plain(norm.weight), _plain(norm.bias), norm.eps)


def _fold(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> NormedLinear:
    """LN(x)·Wᵀ + b as a GEMM on x: see `siglip_fast.kernels.layernorm_linear`."""
    product = _plain(weight).float() * norm.weight.float()
    folded = product.to(weight.dtype)
    if weight.dtype == torch.float16 and (folded.isinf() & product.isfinite()).any():
        raise Unsupported("a LayerNorm's weight times the projection behind it overflows float16")
    return NormedLinear(
        weight=folded,
        # From the rounded weights: what the GEMM multiplies the mean by.
        colsum=folded.float().sum(1),
        bias=(weight.float() * norm.bias.float()).sum(1) + bias.float(),
        eps=norm.eps,
    )
