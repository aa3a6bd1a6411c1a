"""PaddleOCR-VL's vision tower: SigLIP's layers and names with 2-D rotary positions beside the learned ones, rows in raster order.

One frame is one segment of attention. Nothing is merged inside, so a grid may be odd. Until transformers 5.6 the forward
took the bounds of the frames from the caller.
"""

import inspect
import math
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..ops import Position
from ..running.grids import Grid, frames
from ..running.packing import Upload
from .anatomy import of_layers, siglip_view
from .gridded import Gridded, resized_bilinearly
from .on_demand import fast_class, on_demand
from .weights import Derived

MODULES = {"PaddleOCRVisionTransformer": "paddleocr_vl"}


class PaddleOCRTower(Gridded):
    arguments = ("pixel_values", "attention_mask", "grid_thw")
    leading = (1,)
    is_flat = False
    rotary_at = ("encoder", "rotary_pos_emb")

    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        grid_thw: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [1, M, C, p, p]`, the M patches of all images and videos, and `grid_thw` int64 `[B, 3]`, frames, height
        and width of each in patches → `last_hidden_state [M, D]`; the rest is as of
        `siglip_fast.models.qwen3_vl.Qwen3VLTower.forward`."""
        return self._forward(pixel_values, grid_thw, attention_mask=attention_mask, **kwargs)

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        learned = self.embeddings.position_embedding.weight
        align_corners = getattr(
            self.embeddings, "interpolation_align_corners", False
        )  # no attribute until transformers 5.6
        return resized_bilinearly(learned, math.isqrt(len(learned)), align_corners, grids, place, upload)


class TowerWithBounds(PaddleOCRTower):
    """Until transformers 5.6."""

    arguments = ("pixel_values", "cu_seqlens", "attention_mask", "image_grid_thw")
    grids_name = "image_grid_thw"
    beside = ("cu_seqlens",)

    def forward(
        self,
        pixel_values: Tensor,
        cu_seqlens: Tensor,
        attention_mask: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """As of the newer; `cu_seqlens` int32 `[frames + 1]`, the first row of each frame and the end."""
        own = {"cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        return self._forward(pixel_values, image_grid_thw, **own, **kwargs)

    def _grids(self, grid_thw: Tensor, cu_seqlens: Tensor) -> list[Grid] | str:
        if cu_seqlens.device != grid_thw.device:
            return f"cu_seqlens are on {cu_seqlens.device}, image_grid_thw on {grid_thw.device}"
        numbers = torch.cat([grid_thw.flatten(), cu_seqlens.flatten()]).tolist()  # the host waits once
        of_grids, bounds = numbers[: grid_thw.numel()], numbers[grid_thw.numel() :]
        grids = [*zip(of_grids[::3], of_grids[1::3], of_grids[2::3], strict=True)]
        if min(of_grids) > 0 and bounds != [0, *np.cumsum(frames(grids))]:
            return "cu_seqlens are not the bounds of the frames"
        return grids

    def _example(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        args, _ = super()._example()
        return args, {"cu_seqlens": torch.tensor([0, args[0].shape[1]])}


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    has_bounds = "cu_seqlens" in inspect.signature(stock.forward).parameters
    anatomy = of_layers(stock, siglip_view, patch_at=("embeddings", "patch_embedding"))
    return fast_class(TowerWithBounds if has_bounds else PaddleOCRTower, stock, anatomy=anatomy)


__getattr__, installed = on_demand(globals(), MODULES, _fast)
