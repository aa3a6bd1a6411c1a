"""The operations on the fused Triton kernels, or by the vendor's route where that was measured to be the faster one.

Contracts are in `siglip_fast.ops`.
"""

from collections.abc import Callable
from typing import Any

import torch

from siglip_fast.kernels.attention import attention as _attention
from siglip_fast.kernels.attention_pool import attention_pool as _attention_pool
from siglip_fast.kernels.layernorm import layernorm as _layernorm
from siglip_fast.kernels.layernorm_linear import layernorm_linear as _layernorm_linear
from siglip_fast.kernels.linear_residual import linear_residual as _linear_residual
from siglip_fast.kernels.patch_embed import patch_embed as _patch_embed

from . import vendor
from .choice import DEFAULT, Choice
from .select import is_for_graph
from .torch import pack


class Backend:
    """The operations, each as `selection_on` its tensors' device says for its shape; without one, by default."""

    pack = staticmethod(pack)

    def __init__(self, selection_on: Callable[[torch.device], Any] | None = None):
        self._selection_on = selection_on
        self._selections: dict[torch.device, Any] = {}  # loaded when a device is first met

    @classmethod
    def fixed(cls, choice: Choice) -> "Backend":
        """The operations by this choice whatever their shape, as tuning measures them."""
        backend = cls()
        backend._choice = lambda *_: choice
        return backend

    def patch_embed(self, pixel_values, patch, position):
        weight, bias, patch_size, scale, _ = patch
        dims = (*weight.shape, patch_size, len(position))
        choice = self._choice("patch_embed", dims, weight, len(pixel_values) * len(position))
        if choice.route != "triton" and pixel_values.dtype != torch.uint8:  # bytes only our kernel reads
            return vendor.patch_embed(pixel_values, patch, position)
        return _patch_embed(pixel_values, weight, bias, position, patch_size, scale, choice.config)

    def layernorm_linear(self, hidden_states, moments, linear, gelu):
        weight, colsum, bias, eps, _ = linear
        rows = hidden_states.numel() // weight.shape[1]
        choice = self._choice("layernorm_linear", (*weight.shape, gelu), hidden_states, rows)
        if choice.route != "triton":
            return vendor.layernorm_linear(hidden_states, moments, linear, gelu)
        config = _fitting(choice.config, hidden_states, weight)
        return _layernorm_linear(hidden_states, moments, weight, colsum, bias, eps, gelu, config)

    def attention(self, qkv):
        B, N, _, H, d = qkv.shape
        choice = self._choice("attention", (N, H, d), qkv, B)
        return _attention(qkv, choice.config) if choice.route == "triton" else vendor.attention(qkv, choice.route)

    def linear_residual(self, x, linear, residual):
        weight, bias, _ = linear
        dims = (*weight.shape, residual is not None)
        choice = self._choice("linear_residual", dims, x, x.numel() // weight.shape[1])
        if choice.route != "triton":
            return vendor.linear_residual(x, linear, residual)
        return _linear_residual(x, weight, bias, residual, _fitting(choice.config, x, weight))

    def layernorm(self, hidden_states, moments, norm):
        D = hidden_states.shape[-1]
        choice = self._choice("layernorm", (D,), hidden_states, hidden_states.numel() // D)
        if choice.route != "triton":
            return vendor.layernorm(hidden_states, moments, norm)
        return _layernorm(hidden_states, moments, *norm, choice.config)

    def attention_pool(self, hidden_states, pool):
        B, N, D = hidden_states.shape
        choice = self._choice("attention_pool", (N, D, len(pool.scores)), hidden_states, B)
        if choice.route != "triton":
            return vendor.attention_pool(hidden_states, pool)
        return _attention_pool(hidden_states, pool.scores, pool.value.weight, pool.value.bias, choice.config)

    def _choice(self, name: str, dims: tuple[int, ...], tensor: torch.Tensor, rows: int) -> Choice:
        if self._selection_on is None:
            return DEFAULT
        selection = self._selections.get(tensor.device)
        if selection is None:
            selection = self._selections[tensor.device] = self._selection_on(tensor.device)
        launch = "graph" if is_for_graph() else "eager"
        return selection.choice(name, dims, tensor.dtype, rows, launch)


def _fitting(config: dict | None, *operands: torch.Tensor) -> dict | None:
    """None, the default, instead of tensor descriptors where a parameter lies at an address that they cannot take."""
    if config and config.get("TMA") and any(tensor.data_ptr() % 16 for tensor in operands):
        return None
    return config
