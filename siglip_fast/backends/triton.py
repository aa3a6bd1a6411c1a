"""The operations on the fused Triton kernels. Their contracts are in `siglip_fast.ops`."""

from siglip_fast.kernels.attention import attention as attention
from siglip_fast.kernels.attention_pool import attention_pool as _attention_pool
from siglip_fast.kernels.layernorm import layernorm as _layernorm
from siglip_fast.kernels.layernorm_linear import layernorm_linear as _layernorm_linear
from siglip_fast.kernels.linear_residual import linear_residual as _linear_residual
from siglip_fast.kernels.patch_embed import patch_embed as _patch_embed

from .torch import pack_weight as pack_weight


def patch_embed(pixel_values, patch, position):
    return _patch_embed(pixel_values, patch.weight, patch.bias, position, patch.patch_size, patch.scale)


def layernorm_linear(hidden_states, moments, linear, gelu):
    return _layernorm_linear(
        hidden_states, moments, linear.weight, linear.colsum, linear.bias, linear.eps, gelu
    )


def linear_residual(x, linear, residual):
    return _linear_residual(x, linear.weight, linear.bias, residual)


def layernorm(hidden_states, moments, norm):
    return _layernorm(hidden_states, moments, norm.weight, norm.bias, norm.eps)


def attention_pool(hidden_states, pool):
    return _attention_pool(hidden_states, pool.scores, pool.value.weight, pool.value.bias)
