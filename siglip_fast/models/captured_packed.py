"""Towers of images of any size whose forward can be recorded as CUDA graphs: `model.capture(token_budgets, max_images)`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import check_counts
from ..forward import PackedOutputs
from ..running.packed_graphs import Call, PackedGraphs
from .graphed import Graphed
from .packed import Packed
from .tuned import Tuned
from .weights import Derived


class CapturedPacked(Graphed, Tuned, Packed):
    multiple_of = 1  # rows, of which a budget has to have whole multiples

    def capture(self, token_budgets: Sequence[int], max_images: int = 64) -> None:
        """Record CUDA graphs of the fused forward, which later calls replay: no launch costs, the same results.

        A call runs on the graph of the smallest budget that holds the patches of all its images, whatever their sizes; one
        that fits none, or has more images, and one that asks for hidden_states are launched kernel by kernel as before. A
        graph computes its whole budget, so a few budgets that are not far apart cost less than one large one. Graphs are
        recorded again when weights were edited; dropped for training; and released, for good, when the model is moved or
        cast (`.to()`), copied or pickled, or by `capture([])`.

        Args:
            token_budgets: one graph each, of so many patches; they share their memory. An image that NaFlex's processor
                padded counts one patch more than it has.
            max_images: of a call; of a video each frame is one, unless its frames attend to each other.

        Raises:
            ValueError: a budget or max_images is not a positive integer.
            RuntimeError: the model is not on a CUDA device, its fused forward does not apply, or it does not run on Triton.
        """
        check_counts(token_budgets=[*token_budgets], max_images=max_images)
        self._forget_graphs()
        if not token_budgets:
            return
        with torch.no_grad():
            args, kwargs = self._example()
            if reason := super().why_not(*args, **kwargs):  # not by a tower's own, whose arguments come as stock's do
                raise RuntimeError(f"capture: the fused forward does not apply: {reason}")
            derived = self._current()
            if derived.ops.backend != "triton":  # the others go by lists that are on the host
                raise RuntimeError(f"capture: images of any size need the triton backend, got {derived.ops.backend!r}")
            to_capture = (
                tuple(-(-budget // self.multiple_of) * self.multiple_of for budget in token_budgets),
                max_images,
            )
            self._record(derived, *to_capture)
            self._to_capture = to_capture

    def _recorded(self, derived: Derived, budgets: tuple[int, ...], max_images: int) -> PackedGraphs:
        (pixel_values, *args), kwargs = self._example()
        call = self._call(derived, pixel_values, self._read(pixel_values, *args, **kwargs))
        return PackedGraphs(derived.run_packed, budgets, max_images, call)

    def _replayed(self, derived: Derived, pixel_values: Tensor, sizes: Any) -> PackedOutputs | None:
        """The outputs by a CUDA graph, where one was captured for such a call."""
        graphs = self._graphs(derived)
        budget = None if graphs is None else graphs.budget_for(*self._counts(sizes))
        return None if budget is None else graphs.replay(budget, self._call(derived, pixel_values, sizes))

    def _example(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The arguments of a small call, as `_read` takes them."""
        raise NotImplementedError

    def _counts(self, sizes: Any) -> tuple[int, int]:
        """How many packed rows and segments a call of these sizes has."""
        raise NotImplementedError

    def _call(self, derived: Derived, pixel_values: Tensor, sizes: Any) -> Call:
        """The call as graphs take it."""
        raise NotImplementedError
