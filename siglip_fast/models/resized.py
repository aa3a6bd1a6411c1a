"""A position embedding resized for images of each size, as stock's own embeddings resize it, and kept by size."""

import copy
import math
import threading
import types
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from .weights import finish

MOST_ROWS = 1 << 16  # that are kept: 150 MB of 1152 channels in bf16
FEWEST_ROWS = 1 << 11  # that there is memory for


class ResizedPositions:
    """Of an image's size, whatever tells it, to the rows that stock adds to its patches."""

    def __init__(self, embeddings: nn.Module):
        self._embeddings = embeddings
        self._lock = threading.Lock()
        self._forget()

    def _resized(self, sizes: list[tuple[int, ...]]) -> Iterator[Tensor]:
        """Of each size `[_rows(*size), D]`, in the dtype of the patches."""
        raise NotImplementedError

    def _rows(self, *size: int) -> int:
        return math.prod(size)

    def _forget(self) -> None:
        self._table: Tensor | None = None
        self._used = 0  # of its rows
        self._offsets: dict[tuple[int, ...], int] = {}

    def of(self, sizes: list[tuple[int, ...]]) -> tuple[Tensor, np.ndarray]:
        """`[P, D]`, with room for more behind, and where in it the rows of each image begin."""
        with self._lock:
            new = [*dict.fromkeys(size for size in sizes if size not in self._offsets)]
            if new:
                if self._used + sum(self._rows(*size) for size in new) > MOST_ROWS:
                    self._forget()
                    new = [*dict.fromkeys(sizes)]
                self._add(new)
            return self._table, np.array([self._offsets[size] for size in sizes])

    def _add(self, sizes: list[tuple[int, ...]]) -> None:
        """Behind the rows in use. What reads these may go on, and launch plans that hold the table hold the one that others
        use; where it has no room for the new ones, the next has twice as much."""
        offsets, used = {**self._offsets}, self._used
        with torch.inference_mode(False), torch.no_grad():
            new = [*self._resized(sizes)]
            table, rows = self._table, used + sum(map(len, new))
            if table is None or rows > len(table):
                table = new[0].new_empty(max(FEWEST_ROWS, 1 << (rows - 1).bit_length()), new[0].shape[1])
                if used:
                    table[:used] = self._table[:used]
            for size, own in zip(sizes, new, strict=True):
                table[used : used + len(own)] = own
                offsets[size] = used
                used += len(own)
        finish(table)
        self._table, self._used, self._offsets = table, used, offsets  # all, or where something failed none


class NaflexPositions(ResizedPositions):
    """Of transformers' SigLIP 2 embeddings, row-major."""

    def _resized(self, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """By stock's own code on patches that are zero, a size at a time: padded to the largest, a product of all at once
        would take as much memory for each."""
        embeddings = self._embeddings
        alone = copy.copy(embeddings)
        weight = embeddings.patch_embedding.weight.detach()
        alone.__dict__["_modules"] = {**embeddings._modules, "patch_embedding": _Nothing(weight)}
        for height, width in sizes:
            shapes = torch.tensor([[height, width]], device=weight.device)
            patches = weight.new_zeros(1, height * width, weight.shape[1])
            yield type(embeddings).forward(alone, patches, shapes)[0]


class NearestPositions(ResizedPositions):
    """Of the embeddings of Idefics and its kin, row-major."""

    def _resized(self, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        return (nearest(self._embeddings, height, width) for height, width in sizes)


class _Nothing(nn.Module):
    """In the place of the projection of patches: zeros `[1, N, D]`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.weight.new_zeros(*pixel_values.shape[:2], len(self.weight))


def nearest(embeddings: nn.Module, height: int, width: int) -> Tensor:
    """What those of Idefics and its kin add, `[height·width, D]`: their own code, on patches that are zero. It rounds the
    fractions of an image's sides in ways that differ from one version of transformers to the next."""
    weight, p = embeddings.position_embedding.weight, embeddings.patch_size
    stand_in = types.SimpleNamespace(
        patch_size=p,
        num_patches_per_side=embeddings.num_patches_per_side,
        patch_embedding=lambda pixels: weight.new_zeros(1, weight.shape[1], height, width),
        position_embedding=embeddings.position_embedding,
    )
    pixels = weight.new_zeros(()).expand(1, 1, height * p, width * p)
    mask = torch.ones(1, height, width, dtype=torch.bool, device=weight.device)
    return type(embeddings).forward(stand_in, pixels, mask)[0]
