"""A position embedding resized for images of each size, as stock's own embeddings resize it, and kept by size."""

import copy
import threading
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .weights import finish

MOST_ROWS = 1 << 16  # that are kept: 150 MB of 1152 channels in bf16


class ResizedPositions:
    """Of `embeddings`, transformers'; `resize(embeddings, height, width)` gives what they add to an image of so many patches,
    `[height·width, D]`."""

    def __init__(self, embeddings: nn.Module, resize: Callable[[nn.Module, int, int], Tensor]):
        self._embeddings = embeddings
        self._resize = resize
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        weight = self._embeddings.position_embedding.weight
        self._table = weight.new_empty(0, weight.shape[1])
        self._offsets: dict[tuple[int, int], int] = {}

    def of(self, shapes: list[tuple[int, int]]) -> tuple[Tensor, np.ndarray]:
        """`[P, D]`, and where in it the rows of each image begin, row-major."""
        with self._lock:
            new = [*dict.fromkeys(shape for shape in shapes if shape not in self._offsets)]
            if new:
                if len(self._table) + sum(h * w for h, w in new) > MOST_ROWS:
                    self._forget()
                    new = [*dict.fromkeys(shapes)]
                self._add(new)
            return self._table, np.array([self._offsets[shape] for shape in shapes])

    def _add(self, shapes: list[tuple[int, int]]) -> None:
        tables = [self._table]
        # A size at a time: padded to the largest, a product of all at once would take as much memory for each.
        with torch.inference_mode(False), torch.no_grad():
            for height, width in shapes:
                self._offsets[height, width] = sum(map(len, tables))
                tables.append(self._resize(self._embeddings, height, width))
            self._table = torch.cat(tables)
        finish(self._table)


class _Nothing(nn.Module):
    """In the place of the projection of patches: zeros `[1, N, D]`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.weight.new_zeros(*pixel_values.shape[:2], len(self.weight))


def antialiased(embeddings: nn.Module, height: int, width: int) -> Tensor:
    """What SigLIP 2's add, `[height·width, D]`: their own code, on patches that are zero."""
    alone = copy.copy(embeddings)
    weight = embeddings.patch_embedding.weight.detach()
    alone.__dict__["_modules"] = {**embeddings._modules, "patch_embedding": _Nothing(weight)}
    shapes = torch.tensor([[height, width]], device=weight.device)
    return type(embeddings).forward(alone, weight.new_zeros(1, height * width, weight.shape[1]), shapes)[0]


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
