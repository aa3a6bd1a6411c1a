"""VideoLLaMA 3's vision tower: SigLIP's layers and names with 2-D rotary positions and no others, on packed images and videos.

Each image or video has a merge size m: rows come square by square of m by m patches, and behind the last norm each square
becomes one row, as bilinear interpolation to 1/m has it. One frame is one segment of attention.
"""

import types
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..forward import PackedOutputs
from ..ops import Position
from ..running.grids import Grid, read
from ..running.packing import Upload
from .anatomy import of_layers, siglip_view
from .gridded import Gridded, output_of, without_positions
from .on_demand import fast_class, on_demand
from .weights import Derived

MODULES = {"VideoLlama3VisionModel": "video_llama_3"}


class VideoLlama3Tower(Gridded):
    """Its grids are (frames, height, width, merge size)."""

    beside = ("merge_sizes",)
    arguments = ("pixel_values", "grid_thw", "merge_sizes")
    rotary_at = ("rotary_pos_emb",)

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, merge_sizes: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """`pixel_values [M, K]`, the pixels of the M patches of all images and videos, `grid_thw` int64 `[B, 3]`, frames, height
        and width of each in patches, `merge_sizes` int64 `[B]` → `last_hidden_state [squares, D]`; the rest is as of
        `siglip_fast.models.qwen3_vl.Qwen3VLTower.forward`."""
        return self._forward(pixel_values, grid_thw, merge_sizes=merge_sizes, **kwargs)

    def _grids(self, grid_thw: Tensor, merge_sizes: Tensor) -> list[Grid] | str:
        if merge_sizes.shape != grid_thw.shape[:1] or merge_sizes.device != grid_thw.device:
            return f"merge_sizes are {list(merge_sizes.shape)} on {merge_sizes.device}, not one for each of grid_thw"
        grids = read(torch.cat([grid_thw, merge_sizes[:, None]], 1))  # together, so that the host waits once
        return "merge_sizes is not positive" if min(merge for *_, merge in grids) < 1 else grids

    def _merges(self, grids: Sequence[Grid]) -> tuple[int, ...]:
        return tuple(merge for *_, merge in grids)

    def _grids_reason(self, grids: Sequence[Grid]) -> str | None:
        fits = all(h % merge == 0 and w % merge == 0 for _, h, w, merge in grids)
        return None if fits else "the sides of grid_thw are no multiples of merge_sizes"

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        return without_positions(derived, self._patch_weight(), len(place), upload)

    def _finished(self, outputs: PackedOutputs, grids: list[Grid]) -> PackedOutputs:
        parts, begin = [], 0
        for merge, images in groupby(grids, lambda grid: grid[3]):
            end = begin + sum(t * h * w for t, h, w, _ in images)
            parts.append(_shrunk(outputs.last_hidden_state[begin:end], merge))
            begin = end
        return outputs._replace(last_hidden_state=parts[0] if len(parts) == 1 else torch.cat(parts))

    def _made(self, outputs: PackedOutputs) -> BaseModelOutput:
        return self.output_class(last_hidden_state=outputs.last_hidden_state)

    def _example(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        args, _ = super()._example()
        return args, {"merge_sizes": torch.ones(1, dtype=torch.int64)}

    def traced_outputs(self) -> list[tuple[int, int]]:
        return [(0, self.config.hidden_size)]


def _shrunk(rows: Tensor, merge: int) -> Tensor:
    """Of each `merge²` rows, those of a square, the middle one, or the mean of the four around the middle, as stock's
    interpolation sums them: in float32, two by two."""
    if merge == 1:
        return rows
    squares, middle = rows.view(-1, merge, merge, rows.shape[1]), merge // 2
    if merge % 2:
        return squares[:, middle, middle].contiguous()
    a, b, c, d = squares[:, middle - 1 : middle + 1, middle - 1 : middle + 1].float().flatten(1, 2).unbind(1)
    return (((a + b) + (c + d)) / 4).to(rows.dtype)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    anatomy = of_layers(stock, siglip_view, patch_at=("embeddings", "patch_embedding"))
    return fast_class(VideoLlama3Tower, stock, anatomy=anatomy, output_class=output_of(stock)[0])


__getattr__, installed = on_demand(globals(), MODULES, _fast)
