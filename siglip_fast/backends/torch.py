"""The operations in plain torch: reference and fallback. Their contracts are in `siglip_fast.ops`.

LayerNorm reads the rows themselves here, so no moments are carried (they are None).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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


def layernorm_linear(hidden_states, moments, linear, gelu):
    dtype = linear.weight.dtype
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=linear.eps).to(dtype)
    out = F.linear(normed, linear.weight, linear.bias.to(dtype))
    return F.gelu(out, approximate="tanh") if gelu else out


def attention(qkv):
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def linear_residual(x, linear, residual):
    out = F.linear(x, linear.weight, linear.bias)
    return out if residual is None else out + residual, None


def layernorm(hidden_states, moments, norm):
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], norm.weight, norm.bias, norm.eps)


def attention_pool(hidden_states, pool):
    scores: Tensor = hidden_states.to(pool.scores.dtype) @ pool.scores.T
    p = torch.softmax(scores, dim=1).to(hidden_states.dtype)
    # [B, H, D] → [H, B, D] · [H, D, d] → [B, H·d]
    pooled = (p.transpose(1, 2) @ hidden_states).transpose(0, 1)
    weight = pool.value.weight.unflatten(0, (pooled.shape[0], -1))
    return (pooled @ weight.transpose(1, 2)).transpose(0, 1).flatten(1) + pool.value.bias
