"""Cosines and sines of transformers' 2-D rotary position embeddings, by position, kept as long as the derived weights."""

import threading

import torch
from torch import Tensor, nn

from .weights import finish


class RotaryTable:
    """Of the frequencies `inv_freq [d / 4]` of one axis, which a module has as its buffer.

    They are taken as they are: `.to(torch.bfloat16)` rounds buffers, and stock then turns by the rounded ones. What
    they are multiplied by stays float32, also where transformers until 5.5 counted positions in the buffer's dtype, which in
    16 bits is exact up to 256 only.
    """

    def __init__(self, rotary: nn.Module):
        self._inv_freq = rotary.inv_freq
        self._lock = threading.Lock()
        self._make(4096)  # more than the longest image that processors let through

    def _make(self, side: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            inv_freq = self._inv_freq.float()
            angles = torch.arange(side, device=inv_freq.device, dtype=torch.float32)[:, None] * inv_freq
            self._table = torch.stack([angles.cos(), angles.sin()], -1)
        finish(self._table)

    def of(self, side: int) -> Tensor:
        """`siglip_fast.ops.Rotation.table`, float32 `[at least side, d / 4, 2]`."""
        with self._lock:
            if side > len(self._table):
                self._make(1 << (side - 1).bit_length())
            return self._table
