"""The operations as the vendor's libraries compute them, with the row moments that the Triton backend carries.

What `siglip-fast tune` measures the fused kernels against: cuBLAS and cuBLASLt through torch's addmm, every backend of
torch's scaled_dot_product_attention, the flash-attn package. Contracts are in `siglip_fast.ops`.
"""

import importlib.util

import torch
from torch.nn import functional as F

from siglip_fast.kernels.residual_epilogue import residual_epilogue

from . import torch as plain
from .torch import attention_pool as attention_pool
from .torch import layernorm as layernorm
from .torch import linear as linear

aten = torch.ops.aten
# By the operators themselves: torch.nn.attention.sdpa_kernel would set flags of the whole process in each forward.
SDPA = {
    "sdpa flash": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v)[0],
    "sdpa cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0],
    "sdpa efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0],
}


def routes(operation: str) -> list[str]:
    """The names of the vendor's routes for an operation; some may not exist on a device, and for what goes by segments
    there are none."""
    if operation.endswith("_segments"):
        return []
    if operation != "attention":
        return ["vendor"]
    return ["sdpa", *SDPA, *(["flash_attn"] if importlib.util.find_spec("flash_attn") else [])]


def patch_embed(pixel_values, patch, position):
    out, _ = plain.patch_embed(pixel_values, patch, position)
    return residual_epilogue(out[None], None, None, position.dtype)


def patch_embed_rows(pixel_rows, patch, rows, table, index, weight):
    out, _ = plain.patch_embed_rows(pixel_rows, patch, (table, index, weight), rows)
    return residual_epilogue(out[None], None, None, table.dtype)


def layernorm_linear(hidden_states, moments, linear, activation, rotation):
    if not (activation == "tanh" and hidden_states.is_cuda):
        return plain.layernorm_linear(hidden_states, moments, linear, activation, rotation)
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=linear.eps).flatten(0, -2)
    normed = normed.to(linear.weight.dtype)
    # The epilogue of cuBLASLt is GELU-tanh; on a CPU this function is GELU-erf.
    out = torch._addmm_activation(linear.bias.to(normed.dtype), normed, linear.weight.T, use_gelu=True)
    return out.unflatten(0, hidden_states.shape[:-1])


def linear_residual(x, linear, residual):
    out = F.linear(x, linear.weight, linear.bias)
    return residual_epilogue(out[None], None, residual, out.dtype if residual is None else residual.dtype)


def attention(qkv, route):
    """By the flash-attn package, the SDPA operator of that name, or "sdpa": the one that torch chooses."""
    if route == "flash_attn":
        from flash_attn import flash_attn_qkvpacked_func

        return flash_attn_qkvpacked_func(qkv)
    if route == "sdpa":
        return plain.attention(qkv)
    return SDPA[route](*(part.transpose(1, 2) for part in qkv.unbind(2))).transpose(1, 2).contiguous()
