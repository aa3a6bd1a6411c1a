"""The forward pass of SigLIP's vision tower and of its descendants, on the operations, and the weights that it takes.

`forward` is for images of one size, `forward_packed` for images of any size, packed. Both read about like the models.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import Linear, Norm, NormedLinear, Ops, PatchEmbedding, Pool, Position, Rotation, Segments


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


class MergerWeights(NamedTuple):
    """Of four neighbouring rows, side by side after `norm`, or normalised together within `fc1`."""

    norm: Norm | None
    fc1: Linear | NormedLinear
    fc2: Linear


class TowerWeights(NamedTuple):
    patch: PatchEmbedding
    layers: list[LayerWeights]
    post_layernorm: Norm | None  # None: what the last layer gives is the last hidden state
    head: HeadWeights | None
    num_heads: int
    activation: str = "tanh"  # GELU's form
    merger: MergerWeights | None = None
    # A layer among the others whose fc1 takes some neighbouring rows, which become one
    shrink: LayerWeights | None = None
    taps: Mapping[int, MergerWeights] = MappingProxyType({})  # by the number of layers before it


class Shrink(NamedTuple):
    """Where rows become fewer: behind so many layers, after attention within windows of the rows that become one."""

    after: int
    windows: Segments
    segments: Segments  # of the rows that are left


class Packing(NamedTuple):
    """What a call on images of any size says beside pixels and weights: M rows, and which belong together how."""

    segments: Segments
    position: Position
    rows: Tensor | None = None  # int32 [M]: which of the rows of pixels they are; None: all, in their order
    rotation: Rotation | None = None
    out_rows: Tensor | None = None  # int32 [R]: which rows last_hidden_state is to have; None: all
    images: Segments | None = None  # of the rows of last_hidden_state, for the pooling head
    shrink: Shrink | None = None


Outputs = tuple[Tensor, Tensor | None]  # last_hidden_state [B, N, D], pooler_output [B, D]
Stream = tuple[Tensor, Tensor | None]  # hidden_states and their moments
Layer = Callable[[Tensor, Tensor | None, LayerWeights], Stream]


def _unplanned(layer: Layer) -> Layer:
    return layer


class PackedOutputs(NamedTuple):
    """`last_hidden_state [M or R, D]`; `pooler_output [B, D]` of a head, `[M / 4, out]` of a merger; `features`
    `[M / 4, out]`, one a tap."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    features: list[Tensor]


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
    after = collect and (lambda layers, x, m: collect(x))
    embed = lambda: ops.patch_embed(pixel_values, weights.patch, position)  # noqa: E731
    x, m = _stream(ops, weights, embed, None, after, _unplanned)
    y = x if weights.post_layernorm is None else ops.layernorm(x, m, weights.post_layernorm)
    return y, _pooled(ops, weights, y)


@torch.no_grad()
def forward_packed(
    ops: Ops,
    weights: TowerWeights,
    pixel_rows: Tensor,
    packing: Packing,
    collect: Callable[[Tensor], None] | None = None,
    planned: Callable[[Layer], Layer] = _unplanned,
) -> PackedOutputs:
    """`pixel_rows [R, K]` → outputs. `collect` is called with the residual stream `[M, D]` before the first layer and
    after each; `planned`, of the function that runs a layer, gives what runs in its place: of those before a shrink, and of
    those behind it."""
    features = []

    def after(layers: int, x: Tensor, m: Tensor | None) -> None:
        if collect is not None:
            collect(x)
        if layers in weights.taps:
            features.append(_merged(ops, weights.taps[layers], x, m))

    embed = lambda: ops.patch_embed_rows(pixel_rows, weights.patch, packing.position, packing.rows)  # noqa: E731
    x, m = _stream(ops, weights, embed, packing, after, planned)
    y = x if weights.post_layernorm is None else ops.layernorm(x, m, weights.post_layernorm, packing.out_rows)
    p = _pooled(ops, weights, y, packing.images) if weights.merger is None else _merged(ops, weights.merger, x, m)
    return PackedOutputs(y, p, features)


def _stream(
    ops: Ops,
    weights: TowerWeights,
    embed: Callable[[], Stream],
    packing: Packing | None,
    after: Callable[[int, Tensor, Tensor | None], None] | None,
    planned: Callable[[Layer], Layer],
) -> Stream:
    """The residual stream behind the last layer. `after` is called with it after 0, 1, … layers."""
    segments, rotation = (packing.segments, packing.rotation) if packing else (None, None)
    shrink = packing.shrink if packing else None
    run = planned(functools.partial(_layer, ops, weights, segments, rotation))
    x, m = embed()  # here, so that nobody holds it longer than it is needed
    if after is not None:
        after(0, x, m)
    for i, layer in enumerate(weights.layers, 1):
        x, m = run(x, m, layer)
        if after is not None:
            after(i, x, m)
        if shrink is not None and i == shrink.after:
            x, m = _shrunk(ops, weights, x, m, shrink.windows)
            run = planned(functools.partial(_layer, ops, weights, shrink.segments, rotation))
    return x, m


def _layer(
    ops: Ops,
    weights: TowerWeights,
    segments: Segments | None,
    rotation: Rotation | None,
    x: Tensor,
    m: Tensor | None,
    layer: LayerWeights,
) -> Stream:
    qkv = ops.layernorm_linear(x, m, layer.qkv, rotation=rotation)
    o = ops.attention(qkv.unflatten(-1, (3, weights.num_heads, -1)), segments)
    x, m = ops.linear_residual(o.flatten(-2), layer.out_proj, x)
    h = ops.layernorm_linear(x, m, layer.fc1, weights.activation)
    return ops.linear_residual(h, layer.fc2, x)


def _shrunk(ops: Ops, weights: TowerWeights, x: Tensor, m: Tensor | None, windows: Segments) -> Stream:
    """`[M, D]` → `[M / r, D]`: r rows side by side are one's fc1's, and their mean is its residual."""
    layer, D = weights.shrink, x.shape[1]
    qkv = ops.layernorm_linear(x, m, layer.qkv)
    o = ops.attention(qkv.unflatten(-1, (3, weights.num_heads, -1)), windows)
    x, m = ops.linear_residual(o.flatten(-2), layer.out_proj, x)
    together = x.view(-1, layer.fc1.weight.shape[1])
    h = ops.layernorm_linear(together, m, layer.fc1, weights.activation)
    return ops.linear_residual(h, layer.fc2, together.unflatten(1, (-1, D)).mean(1))


def _pooled(ops: Ops, weights: TowerWeights, y: Tensor, images: Segments | None = None) -> Tensor | None:
    head = weights.head
    if head is None:
        return None
    pooled = ops.attention_pool(y, head.pool, images)
    x, m = ops.linear_residual(pooled, head.out_proj, None)
    h = ops.layernorm_linear(x, m, head.fc1, weights.activation)
    return ops.linear_residual(h, head.fc2, x)[0]


def _merged(ops: Ops, merger: MergerWeights, x: Tensor, m: Tensor | None) -> Tensor:
    """`[M, D]` → `[M / 4, out]`."""
    if merger.norm is None:
        h = ops.layernorm_linear(x.view(-1, merger.fc1.weight.shape[1]), m, merger.fc1, "erf")
    else:
        normed = ops.layernorm(x, m, merger.norm)
        h = ops.linear(normed.view(-1, merger.fc1.weight.shape[1]), merger.fc1, "erf")
    return ops.linear(h, merger.fc2)


def _in_autocast(forward: Callable) -> Callable:
    """`forward` inside torch.autocast, on weights of its dtype. As there the residual stream, which takes the dtype of the
    positions, and last_hidden_state are float32; what linears compute behind them has autocast's dtype."""

    @functools.wraps(forward)
    def run(ops: Ops, weights: TowerWeights, pixels: Tensor, *args, **kwargs):
        with torch.autocast(pixels.device.type, enabled=False):  # the operations choose their own dtypes
            return forward(ops, weights, pixels, *args, **kwargs)

    return run


forward_in_autocast, forward_packed_in_autocast = _in_autocast(forward), _in_autocast(forward_packed)


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
