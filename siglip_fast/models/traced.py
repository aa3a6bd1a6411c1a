"""Towers that torch.compile puts into its graph whole, as one operation (`siglip_fast.running.traced`)."""

from typing import Any

import torch
from torch import Tensor

from ..running.traced import Handle, tower_reason
from .base import Fused
from .weights import Derived


class Traced(Fused):
    def become_fast(self, backend: str | None, strict: bool, batch_invariant: bool | None) -> None:
        super().become_fast(backend, strict, batch_invariant)
        self._handle = Handle(self)

    def _route(self, pixel_values: Tensor, *args, **kwargs) -> tuple[Derived | None, str | None]:
        """As of all towers; where torch.compile traces, no weights are derived."""
        if not torch.compiler.is_compiling():
            return super()._route(pixel_values, *args, **kwargs)
        reason = next(self._call_reasons(pixel_values, *args, **kwargs), None)
        return None, reason or tower_reason(self._handle.tensor)

    def forget_derived(self) -> None:
        super().forget_derived()
        self._handle.forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = Handle(self)
