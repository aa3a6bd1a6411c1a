"""Towers whose fused forward can be recorded as CUDA graphs: what is common to images of one size and of any size."""

import logging
from collections.abc import Callable
from typing import Any

from ..running.graphs import RECORDING
from .base import Fused
from .weights import Derived

logger = logging.getLogger("siglip_fast")


class Graphed(Fused):
    """The graphs lie with the derived weights that they read, and go with them."""

    _to_capture: tuple | None = None  # what `_recorded` is to record, if anything

    def _recorded(self, derived: Derived, *to_capture: Any) -> Any:
        """The graphs that `to_capture` asks for."""
        raise NotImplementedError

    def _graphs(self, derived: Derived) -> Any:
        """Those on these weights, recorded again if the weights are new; None where there are none."""
        to_capture = self._to_capture
        if to_capture is None:
            return None
        try:
            return derived.graphs or self._record(derived, *to_capture)
        except RuntimeError as error:  # out of memory, say: launched kernel by kernel it may do
            self._forget_graphs()
            logger.warning("recording CUDA graphs again failed, there are none any more: %s", error)
            return None

    def _record(self, derived: Derived, *to_capture: Any) -> Any:
        with RECORDING:
            if derived.graphs is None:  # else another thread was faster
                derived.graphs = self._recorded(derived, *to_capture)
            return derived.graphs

    def _forget_graphs(self) -> None:
        self._to_capture = None
        for derived in self._derived.values():
            derived.graphs = None

    def _apply(self, fn: Callable, *args, **kwargs) -> "Graphed":
        self._to_capture = None
        return super()._apply(fn, *args, **kwargs)
