"""A position embedding resized for images of each size, as stock's own embeddings resize it, and kept by size."""

import copy
import threading

import numpy as np
import torch
from torch import Tensor, nn

from .weights import finish

MOST_ROWS = 1 << 16  # that are kept: 150 MB of 1152 channels in bf16


class ResizedPositions:
    """Of transformers' SigLIP 2 embeddings, or vLLM's, which want sizes on the CPU: `sizes_on`; None: where the weights are."""

    def __init__(self, embeddings: nn.Module, sizes_on: str | None = None):
        self._embeddings = embeddings
        self._sizes_on = sizes_on or embeddings.position_embedding.weight.device
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
                tables.append(_resized(self._embeddings, torch.tensor([[height, width]], device=self._sizes_on)))
            self._table = torch.cat(tables)
        finish(self._table)


class _Nothing(nn.Module):
    """In the place of the projection of patches: zeros `[..., D]`."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.weight.new_zeros(*pixel_values.shape[:-1], len(self.weight))


def _resized(embeddings: nn.Module, size: Tensor) -> Tensor:
    """What stock adds to the patches of an image of `size [1, 2]`, `[height·width, D]`: its own code, on patches that are
    zero."""
    alone = copy.copy(embeddings)
    weight = embeddings.patch_embedding.weight.detach()
    alone.__dict__["_modules"] = {**embeddings._modules, "patch_embedding": _Nothing(weight)}
    return type(embeddings).forward(alone, weight.new_zeros(1, int(size.prod()), weight.shape[1]), size)[0]
