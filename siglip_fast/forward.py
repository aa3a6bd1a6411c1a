"""The forward pass of the SigLIP vision tower, on the six operations."""

from collections.abc import Callable

from torch import Tensor

from .ops import Ops
from .weights import TowerWeights


def forward(
    ops: Ops,
    weights: TowerWeights,
    pixel_values: Tensor,
    position: Tensor,
    collect: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`pixel_values [B, C, H, W]`, `position [N, D]` → `last_hidden_state [B, N, D]`, `pooler_output [B, D]`.

    `collect` is called with the residual stream `[B, N, D]` before the first layer and after each.
    """
    collect = collect or _ignore
    x, m = ops.patch_embed(pixel_values, weights.patch, position)
    collect(x)
    for layer in weights.layers:
        qkv = ops.layernorm_linear(x, m, layer.qkv)
        o = ops.attention(qkv.unflatten(-1, (3, weights.num_heads, -1)))
        x, m = ops.linear_residual(o.flatten(2), layer.out_proj, x)
        h = ops.layernorm_linear(x, m, layer.fc1, gelu=True)
        x, m = ops.linear_residual(h, layer.fc2, x)
        collect(x)
    y = x if weights.post_layernorm is None else ops.layernorm(x, m, weights.post_layernorm)
    if weights.head is None:
        return y, None
    head = weights.head
    x, m = ops.linear_residual(ops.attention_pool(y, head.pool), head.out_proj, None)
    h = ops.layernorm_linear(x, m, head.fc1, gelu=True)
    p, _ = ops.linear_residual(h, head.fc2, x)
    return y, p


def _ignore(hidden_states: Tensor) -> None:
    pass
