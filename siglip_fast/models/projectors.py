"""Projectors beside a vision tower that stock runs image by image: here on all images at once, by stock's own modules.

PaddleOCR-VL's reads the sizes of the images on the device for each of them; ours goes by what the tower has read. Nothing is
derived, so gradients and edits of weights are stock's.
"""

import types

import torch
from torch import Tensor, nn

from ..backends.select import is_capturing
from ..running.grids import Grid, in_squares, read
from ..running.packing import Upload
from .base import checked_batch_invariant, log_once
from .gridded import rows_of, whole_squares
from .on_demand import fast_class, on_demand
from .source import interception

MODULES = {"PaddleOCRProjector": "paddleocr_vl"}


class AllImagesAtOnce(nn.Module):
    """Mixed into PaddleOCR-VL's projector, before it."""

    def forward(self, image_features: Tensor, image_grid_thw: Tensor) -> Tensor:
        """`image_features [M, D]`, rows of all images in raster order, and `image_grid_thw` int `[B, 3]`, frames, height and
        width of each in patches → `[M / m², out]`, m the side of the squares that are merged. Where that does not apply
        stock's forward runs, and the reason is logged once."""
        grids, reason = self._grids(image_features, image_grid_thw)
        if reason is not None:
            log_once(type(self).__name__, reason, False)
            return super().forward(image_features, image_grid_thw)
        side, upload = self.merge_kernel_size[0], Upload()
        order = upload.add(in_squares(grids, side))
        upload.send(image_features.device)
        rows = self.pre_norm(image_features).index_select(0, order())
        return self.linear_2(self.act(self.linear_1(rows.view(len(rows) // side**2, -1))))

    def _grids(self, image_features: Tensor, image_grid_thw: Tensor) -> tuple[list[Grid], str | None]:
        """The sizes of the images, or the reason why stock's forward has to run."""
        if torch.compiler.is_compiling():
            return [], "torch.compile traces"
        if is_capturing(image_features):
            return [], "the sizes of images cannot be read inside a CUDA graph"
        if checked_batch_invariant(None):  # an image's bits would depend on the others
            return [], "SIGLIP_FAST_BATCH_INVARIANT is set"
        if reason := next(filter(None, map(interception, self.children())), None):
            return [], reason  # a hook would see all images at once
        side, other = self.merge_kernel_size
        grids = read(image_grid_thw) if image_grid_thw.shape[1:] == (3,) else []
        if not grids or min(map(min, grids)) < 1 or side != other or not whole_squares(grids, side):
            return [], f"image_grid_thw is not of whole squares of {side} by {other} patches"
        if (rows := sum(rows_of(grids))) != len(image_features):
            return [], f"image_features have {len(image_features)} rows, by image_grid_thw {rows}"
        return grids, None


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    return fast_class(AllImagesAtOnce, stock)


__getattr__, installed = on_demand(globals(), MODULES, _fast)
