"""The forward pass of the SigLIP vision tower, on the six operations, and the weights that it takes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import Linear, Norm, NormedLinear, Ops, PatchEmbedding, Pool


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


Outputs = tuple[Tensor, Tensor | None]  # last_hidden_state [B, N, D], pooler_output [B, D]


@torch.no_grad()
def forward(
    ops: Ops,
    weights: TowerWeights,
    pixel_values: Tensor,
    position: Tensor,
    collect: Callable[[Tensor], None] | None = None,
) -> Outputs:
    """`pixel_values [B, C, H, W]`, `position [N, D]` → `last_hidden_state [B, N, D]`, `pooler_output [B, D]`.

    `collect` is called with the residual stream `[B, N, D]` before the first layer and after each.
    """
    if parts := _parts(ops, pixel_values, len(position)):
        return _forward_in_parts(ops, weights, parts, position, collect)
    collect = collect or (lambda hidden_states: None)
    x, m = ops.patch_embed(pixel_values, weights.patch, position)
    collect(x)
    for layer in weights.layers:
        qkv = ops.layernorm_linear(x, m, layer.qkv)
        o = ops.attention(qkv.unflatten(-1, (3, weights.num_heads, -1)))
        x, m = ops.linear_residual(o.flatten(2), layer.out_proj, x)
        h = _fc1(ops, x, m, layer.fc1, weights.exact_gelu)
        x, m = ops.linear_residual(h, layer.fc2, x)
        collect(x)
    y = x if weights.post_layernorm is None else ops.layernorm(x, m, weights.post_layernorm)
    if weights.head is None:
        return y, None
    head = weights.head
    pooled = ops.attention_pool(y.to(head.pool.value.weight.dtype), head.pool)
    x, m = ops.linear_residual(pooled, head.out_proj, None)
    h = _fc1(ops, x, m, head.fc1, weights.exact_gelu)
    p, _ = ops.linear_residual(h, head.fc2, x)
    return y, p


def forward_in_autocast(ops: Ops, weights: TowerWeights, pixel_values: Tensor, *args, **kwargs) -> Outputs:
    """`forward` inside torch.autocast, on weights of its dtype. As there the residual stream, which takes the dtype of
    `position`, and last_hidden_state are float32; pooler_output, which linears compute, has autocast's dtype."""
    with torch.autocast(pixel_values.device.type, enabled=False):  # the operations choose their own dtypes
        return forward(ops, weights, pixel_values, *args, **kwargs)


def _parts(ops: Ops, pixel_values: Tensor, tokens: int) -> list[Tensor] | None:
    """The batch cut up, where it is not to run in one piece."""
    at_once = ops.images_at_once(pixel_values.device, tokens)
    count = -(-len(pixel_values) // at_once) if at_once else 1
    return pixel_values.tensor_split(count) if count > 1 else None


def _forward_in_parts(
    ops: Ops, weights: TowerWeights, parts: list[Tensor], position: Tensor, collect: Callable[[Tensor], None] | None
) -> Outputs:
    streams: list[list[Tensor]] = [[] for _ in parts]
    outputs = [
        forward(ops, weights, part, position, collect and stream.append)
        for part, stream in zip(parts, streams, strict=True)
    ]
    for states in zip(*streams, strict=True):
        collect(torch.cat(states))
    hidden, pooled = zip(*outputs, strict=True)
    return torch.cat(hidden), None if weights.head is None else torch.cat(pooled)


def _fc1(ops: Ops, x: Tensor, m: Tensor | None, linear: NormedLinear, exact_gelu: bool) -> Tensor:
    if exact_gelu:  # not SigLIP's, but many a timm model's; as there in a pass of its own
        return F.gelu(ops.layernorm_linear(x, m, linear))
    return ops.layernorm_linear(x, m, linear, gelu=True)
