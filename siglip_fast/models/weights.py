"""Derived weights: the tower's parameters, merged and folded as the operations want them.

They never enter the state dict. The merged QKV and fc1, into which LayerNorm is folded, are copies; the others are the
parameters' own memory, unless the backend packs weights, or autocast's dtype is another, which makes a copy of each.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends.select import is_capturing, is_for_graph
from ..forward import (
    HeadWeights,
    LayerWeights,
    MergerWeights,
    Outputs,
    PackedOutputs,
    Packing,
    TowerWeights,
    forward,
    forward_in_autocast,
    forward_packed,
    forward_packed_in_autocast,
)
from ..ops import Linear, Norm, NormedLinear, Ops, PatchEmbedding, Pool
from ..running.graphs import Graphs
from ..running.packed_graphs import PackedGraphs
from ..running.uint8 import Normalization
from ..tuning.cache import Selection
from .anatomy import Anatomy, Unsupported, has_head
from .outputs import HiddenStates
from .source import Source


class Derived:
    """The derived weights of a tower for one backend, made when first asked for, or the reason why there are none.

    `dtype` is what they compute in, by default the parameters'; another one is autocast's.
    """

    def __init__(
        self,
        tower: nn.Module,
        anatomy: Anatomy,
        backend: str,
        batch_invariant: bool = False,
        dtype: torch.dtype | None = None,
    ):
        self.source = Source(tower, anatomy.watched, anatomy.parameters)
        self._dtype = dtype
        self._anatomy = anatomy
        self.ops = Ops(backend, _selection_on, batch_invariant)
        self.forward = forward if dtype is None else forward_in_autocast
        self._forward_packed = forward_packed if dtype is None else forward_packed_in_autocast
        self.weights: TowerWeights | None = None
        self.graphs: Graphs | PackedGraphs | None = None  # CUDA graphs that read them
        self._uint8: dict[Normalization, TowerWeights] = {}
        self._kept: dict[Callable, Any] = {}  # what else is derived from the tower, and goes with its weights
        self._reason: str | None = None
        self.is_new = True  # no forward has run on them
        self.is_trusted = False  # the last call that looked found no reason against them

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

    def run(
        self,
        pixel_values: Tensor,
        position: Tensor,
        states: HiddenStates | None = None,
        normalization: Normalization | None = None,
        head: bool = True,
    ) -> Outputs:
        """`siglip_fast.forward.forward` on these weights, without pooling if `head` is False; by a plan where there can be one.

        `states` collects the residual stream. With `normalization` pixel_values are uint8 images that it is to be applied
        to (`folds`).
        """
        weights = self._weights(normalization, head)
        if not (plans := self._planning(pixel_values)):
            return self.forward(self.ops, weights, pixel_values, position, states and states.collect)

        def run(pixel_values: Tensor, position: Tensor) -> tuple[Tensor | None, ...]:
            collected = states and HiddenStates(states.indices)
            outputs = self.forward(self.ops, weights, pixel_values, position, collected and collected.collect)
            return *outputs, *(collected.kept if collected else ())

        asked, inputs = states and (states.indices,), (pixel_values, position)
        key = normalization, head, asked, *map(plans.kind, inputs), plans.mode(weights.patch.weight.dtype)
        planned = self.kept(plans.Plans)
        plan = planned.find(key)
        y, pooled, *collected = plan(*inputs) if plan else planned.make(key, run, inputs, weights)
        for state in collected:
            states.collect(state)
        return y, pooled

    def run_packed(
        self, pixel_rows: Tensor, packing: Packing, collect: Callable[[Tensor], None] | None = None
    ) -> PackedOutputs:
        """`siglip_fast.forward.forward_packed` on these weights; its layers by a plan where there can be one."""
        if planned := self._packed_plans(pixel_rows):
            return planned.once(pixel_rows, packing, collect)
        return self._forward_packed(self.ops, self.weights, pixel_rows, packing, collect)

    def run_sizes(
        self,
        pixel_rows: Tensor,
        sizes: Hashable,
        pack: Callable[[], Packing],
        collect: Callable[[Tensor], None] | None = None,
    ) -> PackedOutputs:
        """`run_packed(pixel_rows, pack(), collect)`, where that packing depends on `sizes` alone; all of it by a plan for
        sizes that came before."""
        if collect is None and (planned := self._packed_plans(pixel_rows)):
            return planned(pixel_rows, sizes, pack)
        return self.run_packed(pixel_rows, pack(), collect)

    def _planning(self, tensor: Tensor) -> Any:
        """`siglip_fast.running.plans`, where forwards on the tensor's device are planned."""
        if self.ops.backend != "triton":
            return None
        from ..running import plans  # it imports Triton, which not every machine has

        return plans if plans.applies(tensor) else None

    def _packed_plans(self, pixel_rows: Tensor) -> Any:
        if is_for_graph() or not self._planning(pixel_rows):
            return None
        from ..running.packed_plans import PackedPlans

        return self.kept(PackedPlans, functools.partial(self._forward_packed, self.ops, self.weights), self.weights)

    def kept(self, make: Callable[..., Any], *args: Any) -> Any:
        """`make(*args)`, made once for these weights."""
        if make not in self._kept:
            self._kept[make] = make(*args)
        return self._kept[make]

    def _weights(self, normalization: Normalization | None, head: bool) -> TowerWeights:
        weights = self.for_uint8(normalization) if normalization else self.weights
        return weights if head else weights._replace(head=None)

    def folds(self, normalization: Normalization) -> bool:
        """Whether `for_uint8` is to be used; else images are normalised first. So do torch and oneDNN, which round their
        products to 16 bits before a bias could be added in float32."""
        weight = self.weights.patch.weight
        if not self.ops.reads_uint8 or not normalization.folds(weight.dtype):
            return False
        return normalization in self._uint8 or not is_capturing(weight)  # nothing is folded inside a capture

    def for_uint8(self, normalization: Normalization) -> TowerWeights:
        """The weights, the patch embedding among them taking uint8 images that `normalization` is to be applied to."""
        if normalization not in self._uint8:
            with torch.inference_mode(False), torch.no_grad():
                self._uint8[normalization] = self.weights._replace(patch=normalization.fold(self.weights.patch))
            finish(self.weights.patch.weight)
        return self._uint8[normalization]

    def memory(self) -> int:
        """Bytes of the derived weights that are not the parameters' own memory."""
        own = {p.untyped_storage().data_ptr() for p in self.source.tower.parameters()}
        leaves = tree_leaves([self.weights, *self._uint8.values()])
        tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values()
        copies = [t for t in tensors if t.is_mkldnn or t.untyped_storage().data_ptr() not in own]
        return sum(t.numel() * t.element_size() for t in copies)

    def _derive(self) -> None:
        device = self._anatomy.patch_embedding(self.source.tower).weight.device.type if self._dtype else "cpu"
        # Also under inference_mode the copies have to be ordinary tensors: they outlive it. Autocast would cast for `cat`.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            self._anatomy.check(self.source.tower)
            weights = tower_weights(self._anatomy.view(self.source.tower), self.ops, self._dtype)
        finish(weights.patch.weight)
        self.weights = weights


def _selection_on(device: torch.device) -> Selection:
    from ..tuning.race import selection_on  # it imports Triton, which not every machine has

    return selection_on(device)


def finish(derived: Tensor) -> None:
    """Waits for what was just derived, `derived` and before: the next forward may come on another stream, which would not."""
    if derived.is_cuda and torch.cuda.is_initialized():
        torch.cuda.current_stream(derived.device).synchronize()


def tower_weights(tower: Any, ops: Ops, dtype: torch.dtype | None = None) -> TowerWeights:
    """Those of a tower, or a view of one, that has the names of transformers' SigLIP; in its parameters' dtype or `dtype`."""
    conv, rotates = tower.embeddings.patch_embedding, getattr(tower, "rotates", False)
    dtype = dtype or conv.weight.dtype
    # Rows of patches are of images of any size: nothing is packed for one number of tokens.
    tokens = 1 if isinstance(conv, nn.Linear) else tower.embeddings.num_patches
    make, make_pooled = (Maker(ops, dtype, tokens) for tokens in (tokens, 1))
    patch = PatchEmbedding(make.plain(conv.weight).flatten(1), make.plain(bias_of(conv)), tower.embeddings.patch_size)
    return TowerWeights(
        patch=make.pack(patch),
        layers=[make.layer(layer, rotates) for layer in tower.encoder.layers],
        post_layernorm=tower.post_layernorm and make.norm(tower.post_layernorm),
        head=make_pooled.head(tower.head) if has_head(tower) else None,
        num_heads=tower.encoder.layers[0].self_attn.num_heads,
        activation=getattr(tower, "activation", "tanh"),
        merger=make.merger(tower.merger) if hasattr(tower, "merger") else None,
        shrink=make.layer(tower.shrink, rotates=False) if hasattr(tower, "shrink") else None,
        taps={layers: make.merger(merger) for layers, merger in getattr(tower, "taps", {}).items()},
    )


class Maker:
    """Makes weights of one dtype, packed for images of so many tokens, from modules named as transformers' SigLIP's."""

    def __init__(self, ops: Ops, dtype: torch.dtype, tokens: int):
        self._dtype = dtype
        self.pack = functools.partial(ops.pack, tokens=tokens)

    def layer(self, layer: nn.Module, rotates: bool) -> LayerWeights:
        attention = layer.self_attn
        projections = [(p.weight, bias_of(p)) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        if rotates:
            projections[:2] = [[in_pairs(t, attention.num_heads) for t in own] for own in projections[:2]]
        weight, bias = map(torch.cat, zip(*projections, strict=True))
        return LayerWeights(
            qkv=self.fold(layer.layer_norm1, weight, bias),
            out_proj=self.linear(attention.out_proj),
            fc1=self.fold(layer.layer_norm2, layer.mlp.fc1.weight, bias_of(layer.mlp.fc1)),
            fc2=self.linear(layer.mlp.fc2),
        )

    def head(self, head: nn.Module) -> HeadWeights:
        attention, H = head.attention, head.attention.num_heads
        query_weight, key_weight, value_weight = attention.in_proj_weight.detach().chunk(3)
        query_bias, _, value_bias = attention.in_proj_bias.detach().chunk(3)
        # Elementwise sums, because a matmul could be TF32; this happens once.
        query = (query_weight.float() * head.probe[0].float()).sum(1) + query_bias.float()
        query = query.unflatten(0, (H, -1)) * (query.numel() // H) ** -0.5
        scores = (query[:, :, None] * key_weight.float().unflatten(0, (H, -1))).sum(1)
        return HeadWeights(
            pool=Pool(scores, Linear(self.plain(value_weight), self.plain(value_bias))),
            out_proj=self.linear(attention.out_proj),
            fc1=self.fold(head.layernorm, head.mlp.fc1.weight, head.mlp.fc1.bias),
            fc2=self.linear(head.mlp.fc2),
        )

    def merger(self, merger: Any) -> MergerWeights:
        norm, fc1, fc2 = merger.norm, merger.fc1, self.linear(merger.fc2)
        if norm.weight.shape[0] == fc1.weight.shape[1]:  # of the rows together
            return MergerWeights(None, self.fold(norm, fc1.weight, fc1.bias), fc2)
        return MergerWeights(self.norm(norm), self.linear(fc1), fc2)

    def linear(self, linear: nn.Linear) -> Linear:
        return self.pack(Linear(self.plain(linear.weight), self.plain(bias_of(linear))))

    def norm(self, norm: nn.LayerNorm) -> Norm:
        # not in autocast's dtype: this one's input and output are the residual stream's
        weight, bias = (p.detach().resolve_neg().contiguous() for p in (norm.weight, norm.bias))
        return Norm(weight, bias, norm.eps)

    def fold(self, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> NormedLinear:
        return self.pack(fold(norm, weight, bias, self._dtype))

    def plain(self, parameter: Tensor) -> Tensor:
        """The parameter's own memory where it is as the kernels index it, else a copy."""
        return parameter.detach().resolve_neg().to(self._dtype).contiguous()


def bias_of(projection: Any) -> Tensor:
    """Of a projection without bias zeros: what an operation without one would save is next to nothing."""
    return projection.weight.new_zeros(len(projection.weight)) if projection.bias is None else projection.bias


def in_pairs(projection: Tensor, num_heads: int) -> Tensor:
    """The rows of a projection's weight or bias such that channels i and i + d / 2 of a head, which a rotation turns
    together, are neighbours (`siglip_fast.ops.Ops.layernorm_linear`). Scores of Q and K do not depend on their order."""
    return projection.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def fold(norm: nn.LayerNorm, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> NormedLinear:
    """LN(x)·Wᵀ + b as a GEMM on x: see `siglip_fast.kernels.layernorm_linear`."""
    product = weight.detach().float() * norm.weight.float()
    folded = product.to(dtype).contiguous()
    if dtype == torch.float16:
        # Rounding normal numbers to fp16 costs 2e-4 of a row's norm; overflow and underflow cost more.
        lost = (folded.float() - product).norm(dim=1) > 5e-4 * product.norm(dim=1)
        if lost.any():
            raise Unsupported("a LayerNorm's weight times the projection behind it leaves float16's range")
    return NormedLinear(
        weight=folded,
        # From the rounded weights: what the GEMM multiplies the mean by.
        colsum=folded.float().sum(1),
        bias=(weight.float() * norm.bias.float()).sum(1) + bias.float(),
        eps=norm.eps,
    )
