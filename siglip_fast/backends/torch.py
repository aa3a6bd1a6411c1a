"""The operations in plain torch: reference and fallback. Their contracts are in `siglip_fast.ops`.

LayerNorm reads the rows themselves here, so no moments are carried (they are None).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = (None, "tanh", "erf", "quick")  # GELU in the form of that name; the last is x·σ(1.702x)


def pack(linear, tokens):
    return linear


def patch_embed(pixel_values, patch, position):
    # One GEMM over flattened patches: unlike a convolution's, its result is contiguous along the channels.
    patches = flat_patches(pixel_values.to(patch.weight.dtype), patch.patch_size)
    return F.linear(patches, patch.weight, patch.bias) + position, None


def flat_patches(pixel_values: Tensor, p: int) -> Tensor:
    """`[B, C, H, W]` → `[B, N, C·p·p]`."""
    B, C, height, width = pixel_values.shape
    rows, columns = height // p, width // p
    patches = pixel_values[:, :, : rows * p, : columns * p].reshape(B, C, rows, p, columns, p)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, C * p * p)


def patch_embed_rows(pixel_rows, patch, position, rows):
    patches = pixel_rows if rows is None else pixel_rows.index_select(0, rows)
    return F.linear(patches.to(patch.weight.dtype), patch.weight, patch.bias) + gathered(position), None


def gathered(position):
    """`[M, D]`: sums in float32, rounded once."""
    table, index, weight = position
    if weight is None:
        return table[index[:, 0]]
    return F.embedding_bag(index, table.to(weight.dtype), per_sample_weights=weight, mode="sum").to(table.dtype)


def layernorm_linear(hidden_states, moments, linear, activation, rotation):
    dtype = linear.weight.dtype
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=linear.eps).to(dtype)
    out = activated(F.linear(normed, linear.weight, linear.bias.to(dtype)), activation)
    return out if rotation is None else rotated(out, rotation)


def linear(x, linear, activation):
    return activated(F.linear(x, linear.weight, linear.bias), activation)


def activated(x, activation):
    if activation == "quick":
        return x * torch.sigmoid(1.702 * x)
    return x if activation is None else F.gelu(x, approximate="none" if activation == "erf" else activation)


def rotated(qkv, rotation):
    """In place: the first two thirds, whose neighbours are pairs, as complex numbers in at least float32."""
    table, place = rotation
    # [M, 1, d / 2], the angles of both axes one behind the other
    angles = torch.view_as_complex(table)[place].flatten(1)[:, None]
    turned = qkv[..., : qkv.shape[-1] // 3 * 2].view(len(place), -1, angles.shape[-1], 2)
    wide = turned.to(torch.promote_types(qkv.dtype, table.dtype))  # the same, not a copy, where it is as wide
    torch.view_as_complex(wide).mul_(angles)
    if wide is not turned:
        turned.copy_(wide)
    return qkv


def attention(qkv, keys=None):
    """Of so many keys, the first ones; None: of all."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k[:, :, :keys], v[:, :, :keys]).transpose(1, 2).contiguous()


def attention_segments(qkv, segments, attention=attention):
    out = qkv.new_empty(len(qkv), *qkv.shape[2:])
    for first, count, queries, keys in runs(segments):
        rows = slice(first, first + count * queries)
        own = qkv[rows].unflatten(0, (count, queries))
        out[rows].unflatten(0, (count, queries)).copy_(attention(own, keys))
    return out


def runs(segments):
    """(first row, number of segments, queries, keys) of segments of equal length, one behind the other."""
    found = []
    for first, queries, keys in zip(segments.first, segments.queries, segments.keys, strict=True):
        if found and found[-1][2:] == (queries, keys) and found[-1][0] + found[-1][1] * queries == first:
            found[-1] = (found[-1][0], found[-1][1] + 1, queries, keys)
        elif queries:
            found.append((first, 1, queries, keys))
    return found


def linear_residual(x, linear, residual):
    out = F.linear(x, linear.weight, linear.bias)
    return out if residual is None else out + residual, None


def layernorm(hidden_states, moments, norm, rows):
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], norm.weight, norm.bias, norm.eps)
    return normed if rows is None else normed.index_select(0, rows)


def cast(x, dtype):
    return x.to(dtype)


def attention_pool(hidden_states, pool):
    scores: Tensor = hidden_states.to(pool.scores.dtype) @ pool.scores.T
    p = torch.softmax(scores, dim=1).to(hidden_states.dtype)
    # [B, H, D] → [H, B, D] · [H, D, d] → [B, H·d]
    pooled = (p.transpose(1, 2) @ hidden_states).transpose(0, 1)
    weight = pool.value.weight.unflatten(0, (pooled.shape[0], -1))
    return (pooled @ weight.transpose(1, 2)).transpose(0, 1).flatten(1) + pool.value.bias


def attention_pool_segments(hidden_states, pool, segments):
    tokens = (hidden_states[first : first + keys] for first, keys in zip(segments.first, segments.keys, strict=True))
    return torch.cat([attention_pool(own[None], pool) for own in tokens])
