"""Cosmos3 Edge's vision tower: SigLIP 2's weights, names and position resize, on packed images and videos.

Rows come square by square of merge size by merge size patches. One frame is one segment of attention. Its projector is
outside of it. (Cosmos3 Omni's tower is Qwen3-VL's own class.)
"""

import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..forward import PackedOutputs
from ..ops import Position
from ..running.grids import Grid
from ..running.packing import Upload
from .anatomy import of_layers, siglip_view
from .gridded import InSquares, output_of, resized_as_stock
from .on_demand import fast_class, on_demand
from .resized import ResizedPositions
from .weights import Derived

MODULES = {"Cosmos3EdgeVisionModel": "cosmos3_edge"}


class Cosmos3EdgeTower(InSquares):
    has_own_positions = True
    pools: bool  # whether the pooler's output is the last hidden state

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [M, K]`, the pixels of the M patches of all images and videos, and `grid_thw` int64 `[B, 3]`, frames,
        height and width of each in patches → `last_hidden_state [M, D]`, and the same as `pooler_output` where stock's has
        it; the rest is as of `siglip_fast.models.qwen3_vl.Qwen3VLTower.forward`."""
        return self._forward(pixel_values, grid_thw, **kwargs)

    @property
    def _side(self) -> int:
        return self.embeddings.config.spatial_merge_size  # what stock goes by

    def _position(
        self, derived: Derived, grids: list[Grid], place: np.ndarray, upload: Upload
    ) -> Callable[[], Position]:
        sizes = [(h, w, self._side) for _, h, w in grids]
        return resized_as_stock(derived.kept(_Positions, self.embeddings), sizes, grids, upload)

    def _made(self, outputs: PackedOutputs) -> BaseModelOutputWithPooling:
        last = outputs.last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=last if self.pools else None)


class _Positions(ResizedPositions):
    def _rows(self, height: int, width: int, side: int) -> int:
        return height * width

    def _resized(self, sizes: list[tuple[int, int, int]]) -> Iterator[Tensor]:
        """By stock's own code."""
        embeddings = self._embeddings
        side_of_table = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.detach().view(side_of_table, side_of_table, -1)
        for height, width, side in sizes:
            grid = torch.tensor([[1, height, width]], device="cpu")  # whose numbers are read
            yield type(embeddings).resize_positional_embeddings(table, grid, side)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    anatomy = of_layers(
        stock,
        lambda tower: siglip_view(tower, rotates=False),
        patch_at=("embeddings", "patch_embedding"),
        rotates=False,
    )
    return fast_class(Cosmos3EdgeTower, stock, anatomy=anatomy, pools=output_of(stock)[1])


__getattr__, installed = on_demand(globals(), MODULES, _fast)
