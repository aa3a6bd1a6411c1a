"""Towers of images of one size whose forward can be recorded as CUDA graphs: `model.capture(batch_sizes)`."""

import functools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.select import is_capturing
from ..errors import check_counts
from ..forward import Outputs
from ..running.graphs import Graphs
from .graphed import Graphed
from .outputs import asked_for
from .position import must_interpolate, position_of
from .reasons import autocast_dtype
from .tuned import Tuned
from .weights import Derived


class Captured(Graphed, Tuned):
    def capture(self, batch_sizes: Sequence[int], image_size: int | None = None) -> None:
        """Record CUDA graphs of the fused forward, which later calls replay: no launch costs, the same results.

        A batch runs on the graph of the smallest captured size that holds it and is less than twice as large; other
        batches, images of another size and `forward_uint8` are launched kernel by kernel as before. Graphs are recorded
        again when weights were edited, and once more for torch.autocast; dropped for training; and released, for good,
        when the model is moved or cast (`.to()`), copied or pickled, or by `capture([])`. Inside a CUDA graph that
        somebody else captures the kernels are launched into that one, which does not see later edits of weights.

        Args:
            batch_sizes: one graph each; they share their memory.
            image_size: height and width of the images, in pixels. Default: the config's; others are for calls with
                `interpolate_pos_encoding=True`.

        Raises:
            ValueError: a batch size or the image size is not a positive integer.
            RuntimeError: the model is not on a CUDA device, or its fused forward does not apply.
        """
        image_size = self.config.image_size if image_size is None else image_size
        check_counts(image_size=image_size, batch_sizes=[*batch_sizes])
        self._forget_graphs()
        if not batch_sizes:
            return
        image = self._example(image_size)
        with torch.no_grad():
            if reason := self.why_not(image[None]):
                raise RuntimeError(f"capture: the fused forward does not apply: {reason}")
            derived = self._current()
            self._first_contact(derived, image.expand(max(batch_sizes), -1, -1, -1))
            self._record(derived, tuple(batch_sizes), image_size)
        self._to_capture = tuple(batch_sizes), image_size

    def _replayed(self, derived: Derived, pixel_values: Tensor, interpolate: bool) -> Outputs | None:
        """The outputs by a CUDA graph, where one was captured for such images."""
        if self._to_capture is None or is_capturing(pixel_values) or (graphs := self._graphs(derived)) is None:
            return None
        size = graphs.batch_size_for(pixel_values)
        if size and (interpolate or not graphs.is_interpolated):
            return graphs.replay(size, pixel_values)
        return None

    def _route_while_replaying(
        self, pixel_values: Tensor, interpolate: bool, **kwargs
    ) -> tuple[Derived | None, str | None, Outputs | None]:
        """As `_route`, and the outputs of a CUDA graph, where there is one for such images.

        The graph of the last call begins first, and is checked to be of the tower as it is now while the GPU is busy: to
        look takes a third of the time of one image. If it is not, its outputs are dropped.
        """
        reason = next(self._call_reasons(pixel_values, interpolate, **kwargs), None)
        if reason is not None:
            return None, reason, None
        last = self._derived.get(autocast_dtype(pixel_values.device))
        asked = asked_for("output_hidden_states", self.config, kwargs)
        is_ready = last is not None and last.is_trusted and last.graphs is not None and not asked
        # A graph reads memory by its address, so that much has to be known first.
        begins = is_ready and last.source.is_in_place()
        outputs = self._replayed(last, pixel_values, interpolate) if begins else None
        begun = weakref.ref(last) if outputs else lambda: None
        del last  # old weights go before new ones are made
        derived, reason = self._checked()
        return derived, reason, outputs if derived is begun() and reason is None else None

    def _recorded(self, derived: Derived, batch_sizes: tuple[int, ...], image_size: int) -> Graphs:
        image, embeddings = self._example(image_size), self._tower.embeddings
        interpolate = must_interpolate(embeddings, image_size, image_size)
        position = position_of(embeddings, image[None], interpolate)
        forward = functools.partial(derived.forward, derived.ops, derived.weights, position=position)
        return Graphs(forward, batch_sizes, image, interpolate)

    def _example(self, image_size: int) -> Tensor:
        """An image `[C, H, W]` as the model takes it."""
        weight = self._patch_weight()
        return weight.new_zeros((weight.shape[1], image_size, image_size))
