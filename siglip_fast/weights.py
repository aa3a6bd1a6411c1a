"""Derived weights: the tower's parameters, merged and folded as the operations want them.

They never enter the state dict. The merged QKV and fc1, into which LayerNorm is folded, are copies; the others are the
parameters' own memory, unless the backend packs weights, which makes a copy of each matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .anatomy import Anatomy, Unsupported
from .ops import AnyLinear, Linear, Norm, NormedLinear, Ops, PatchEmbedding, Pool
from .source import Source
from .uint8 import Normalization


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
    post_layernorm: Norm | None  # None: what the last layer gives is the last hidden state
    head: HeadWeights | None
    num_heads: int
    exact_gelu: bool  # by erf, in the place of the tanh form


class Derived:
    """The derived weights of a tower for one backend, made when first asked for, or the reason why there are none."""

    def __init__(self, tower: nn.Module, anatomy: Anatomy, backend: str):
        self.source = Source(tower, anatomy.watched, anatomy.parameters)
        self._anatomy = anatomy
        self.ops = Ops(backend)
        self.weights: TowerWeights | None = None
        self._uint8: dict[Normalization, TowerWeights] = {}
        self._reason: str | None = None
        self.is_new = True  # no forward has run on them

    def reason(self, owner: nn.Module) -> str | None:
        """Why the tower cannot run on the operations, if it cannot. `owner` is the model whose forward is running."""
        # Hooks first: those of an offloading library would bring the weights that are read below.
        if intercepted := self.source.intercepted(owner):
            return intercepted
        if self.weights is None and self._reason is None:
            try:
                self._derive()
            except Unsupported as unsupported:
                self._reason = str(unsupported)
        return self._reason

    def has_uint8(self, normalization: Normalization) -> bool:
        return normalization in self._uint8

    def for_uint8(self, normalization: Normalization) -> TowerWeights:
        """The weights, the patch embedding among them taking uint8 images that `normalization` is to be applied to."""
        if not self.has_uint8(normalization):
            with torch.inference_mode(False), torch.no_grad():
                self._uint8[normalization] = self.weights._replace(
                    patch=normalization.fold(self.weights.patch)
                )
            _finish(self.weights)
        return self._uint8[normalization]

    def memory(self) -> int:
        """Bytes of the derived weights that are not the parameters' own memory."""
        own = {p.untyped_storage().data_ptr() for p in self.source.tower.parameters()}
        leaves = tree_leaves([self.weights, *self._uint8.values()])
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values()
        copies = [t for t in tensors if t.is_mkldnn or t.untyped_storage().data_ptr() not in own]
        return sum(t.numel() * t.element_size() for t in copies)

    def _derive(self) -> None:
        # Also under inference_mode the copies have to be ordinary tensors: they outlive it.
        with torch.inference_mode(False), torch.no_grad():
            self._anatomy.check(self.source.tower)
            weights = _tower_weights(self._anatomy.view(self.source.tower), self.ops)
        _finish(weights)
        self.weights = weights


def _finish(weights: TowerWeights) -> None:
    if weights.patch.weight.is_cuda and torch.cuda.is_initialized():
        # The next forward may come on another stream, which would not wait for this one.
        torch.cuda.current_stream(weights.patch.weight.device).synchronize()


Pack = Callable[[AnyLinear], AnyLinear]  # Ops.pack, for so many tokens


def _tower_weights(tower: Any, ops: Ops) -> TowerWeights:
    """Those of a tower, or a view of one, that has the names of transformers' SigLIP."""
    conv = tower.embeddings.patch_embedding
    patch = PatchEmbedding(_plain(conv.weight).flatten(1), _plain(conv.bias), tower.embeddings.patch_size)
    pack = functools.partial(ops.pack, tokens=tower.embeddings.num_patches)
    pack_pooled = functools.partial(ops.pack, tokens=1)
    return TowerWeights(
        patch=pack(patch),
        layers=[_layer_weights(layer, pack) for layer in tower.encoder.layers],
        post_layernorm=tower.post_layernorm and _norm(tower.post_layernorm),
        head=_head_weights(tower.head, pack_pooled) if getattr(tower, "use_head", False) else None,
        num_heads=tower.encoder.layers[0].self_attn.num_heads,
        exact_gelu=getattr(tower, "exact_gelu", False),
    )


def _layer_weights(layer: nn.Module, pack: Pack) -> LayerWeights:
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([p.weight for p in projections])
    bias = torch.cat([p.bias for p in projections])
    return LayerWeights(
        qkv=_fold(layer.layer_norm1, weight, bias, pack),
        out_proj=_linear(attention.out_proj, pack),
        fc1=_fold(layer.layer_norm2, layer.mlp.fc1.weight, layer.mlp.fc1.bias, pack),
        fc2=_linear(layer.mlp.fc2, pack),
    )


def _head_weights(head: nn.Module, pack: Pack) -> HeadWeights:
    attention, H = head.attention, head.attention.num_heads
    query_weight, key_weight, value_weight = _plain(attention.in_proj_weight).chunk(3)
    query_bias, _, value_bias = _plain(attention.in_proj_bias).chunk(3)
    # Elementwise sums, because a matmul could be TF32; this happens once.
    query = (query_weight.float() * head.probe[0].float()).sum(1) + query_bias.float()
    query = query.unflatten(0, (H, -1)) * (query.numel() // H) ** -0.5
    scores = (query[:, :, None] * key_weight.float().unflatten(0, (H, -1))).sum(1)
    return HeadWeights(
        pool=Pool(scores, Linear(value_weight, value_bias)),
        out_proj=_linear(attention.out_proj, pack),
        fc1=_fold(head.layernorm, head.mlp.fc1.weight, head.mlp.fc1.bias, pack),
        fc2=_linear(head.mlp.fc2, pack),
    )


def _plain(parameter: Tensor) -> Tensor:
    """The parameter's own memory where it is contiguous, else a copy; either way as the kernels index it."""
    return parameter.detach().resolve_neg().contiguous()


def _linear(linear: nn.Linear, pack: Pack) -> Linear:
    return pack(Linear(_plain(linear.weight), _plain(linear.bias)))


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(_plain(norm.weight), _plain(norm.bias), norm.eps)


def _fold(norm: nn.LayerNorm, weight: Tensor, bias: Tensor, pack: Pack) -> NormedLinear:
    """LN(x)·Wᵀ + b as a GEMM on x: see `siglip_fast.kernels.layernorm_linear`."""
    product = _plain(weight).float() * norm.weight.float()
    folded = product.to(weight.dtype)
    if weight.dtype == torch.float16:
        # Rounding normal numbers to fp16 costs 2e-4 of a row's norm; overflow and underflow cost more.
        lost = (folded.float() - product).norm(dim=1) > 5e-4 * product.norm(dim=1)
        if lost.any():
            raise Unsupported("a LayerNorm's weight times the projection behind it leaves float16's range")
    normed = NormedLinear(
        weight=folded,
        # From the rounded weights: what the GEMM multiplies the mean by.
        colsum=folded.float().sum(1),
        bias=(weight.float() * norm.bias.float()).sum(1) + bias.float(),
        eps=norm.eps,
    )
    return pack(normed)
