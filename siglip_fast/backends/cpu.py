"""The operations on x86 CPUs through oneDNN. Their contracts are in `siglip_fast.ops`.

Weights are reordered once into the blocked layout that oneDNN's GEMM reads; bias, GELU-tanh and the residual are part
of the GEMM. Weights that were not reordered (`pack_weight` says when), and all the rest, run as in plain torch.
"""

import platform

import torch
from torch.nn import functional as F

from . import torch as plain
from .torch import attention as attention
from .torch import attention_pool as attention_pool
from .torch import layernorm as layernorm

_mkldnn = torch.ops.mkldnn


def pack_weight(weight):
    if weight.device.type != "cpu" or not _has_gemm(weight.dtype):
        return weight
    return _mkldnn._reorder_linear_weight(weight)


def _has_gemm(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):  # elsewhere these operators are untried
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False  # with AVX2 alone torch's own GEMM is the faster one
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _mkldnn._is_mkldnn_bf16_supported())


def patch_embed(pixel_values, patch, position):
    if not patch.weight.is_mkldnn:
        return plain.patch_embed(pixel_values, patch, position)
    patches = plain.flat_patches(pixel_values.to(patch.weight.dtype), patch.patch_size)
    return _linear(patches, patch.weight, patch.bias).add_(position), None


def layernorm_linear(hidden_states, moments, linear, gelu):
    if not linear.weight.is_mkldnn:
        return plain.layernorm_linear(hidden_states, moments, linear, gelu)
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=linear.eps)
    return _linear(normed, linear.weight, linear.bias.to(normed.dtype), gelu)


def linear_residual(x, linear, residual):
    if not linear.weight.is_mkldnn:
        return plain.linear_residual(x, linear, residual)
    if residual is None:
        return _linear(x, *linear), None
    return _mkldnn._linear_pointwise.binary(x, residual, *linear, "add"), None


def _linear(x, weight, bias, gelu=False):
    attr, algorithm = ("gelu", "tanh") if gelu else ("none", "")
    return _mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)
