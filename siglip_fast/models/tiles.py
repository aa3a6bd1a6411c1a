"""Towers for images of one size, the config's, beside SigLIP's own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..forward import Outputs
from ..ops import DTYPES
from .base import Built
from .outputs import HiddenStates
from .packed import Sized
from .position import position_of
from .weights import Derived


class TilesTower(Built, Sized):
    """What such towers have in common."""

    def _request_reasons(self, interpolate_pos_encoding: bool = False, **kwargs) -> Iterator[str]:
        if torch.compiler.is_compiling():
            yield "torch.compile traces"
        yield from self._setting_reasons(kwargs)

    def _read(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs) -> str | None:
        # What is wrong with these stock's code is to say.
        weight, size, shape = self._patch_weight(), self.config.image_size, [*pixel_values.shape]
        is_image = len(shape) == 4 and shape[1] == weight.shape[1] and min(shape[2:]) >= weight.shape[-1]
        if not is_image or not pixel_values.is_floating_point():
            return f"pixel_values are {pixel_values.dtype}, {shape}, not [batch, {weight.shape[1]}, height, width]"
        if not interpolate_pos_encoding and shape[2:] != [size, size]:
            return f"pixel_values are {shape}, not of {size} pixels a side"
        return None

    def _run(
        self, derived: Derived, pixel_values: Tensor, kept: HiddenStates | None, interpolate: bool = False
    ) -> Outputs:
        position = position_of(self.embeddings, pixel_values, interpolate)
        if pixel_values.dtype not in DTYPES:
            pixel_values = pixel_values.to(position.dtype)
        return derived.run(pixel_values, position, kept)
