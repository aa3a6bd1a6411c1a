"""Towers of SigLIP's descendants for bench/static.py: a packed forward on meta tensors, with every form of the operations.

Each stands for a kind: what it has is of that kind, widths are those of a large one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from siglip_fast.forward import HeadWeights, LayerWeights, MergerWeights, Packing, TowerWeights, forward_packed
from siglip_fast.ops import Linear, Norm, NormedLinear, Ops, PatchEmbedding, Pool, Position, Rotation, Segments
from siglip_fast.running.packing import TILE_ROWS


class Tower(NamedTuple):
    width: int
    heads: int
    intermediate: int
    patch: int  # numbers in a row of pixels
    taps: int  # of the interpolation of positions
    rotates: bool
    merges: bool  # four rows into one: at the end normalised together, before it each
    pools: bool
    activation: str
    longest: int  # rows of a segment


TOWERS = {
    "packed-qwen3-vl": Tower(1152, 16, 4304, 1536, 4, True, True, False, "tanh", 4096),
    "packed-naflex": Tower(1024, 16, 4096, 768, 1, False, False, True, "tanh", 256),
    "packed-qwen2-vl": Tower(1280, 16, 5120, 588, 16, True, False, False, "quick", 1024),
    "packed-giant": Tower(1536, 16, 6144, 768, 4, True, False, False, "tanh", 1024),
    "packed-windows": Tower(1152, 16, 4304, 588, 1, False, False, False, "tanh", 4),  # of 2×2 patches
}


def forward(name: str, dtype: torch.dtype, images: int) -> None:
    """One packed forward of so many images, or two, of about 1024 rows or more, launching what it would launch."""
    tower = TOWERS[name]
    count = max(2, images) * max(1, 1024 // tower.longest)
    keys = tuple(max(1, tower.longest - 4 * (i % 3)) for i in range(count))  # not of one size
    segments, M = _segments(keys), sum(keys)
    position = Position(_empty(2304, tower.width, dtype=dtype), _indices(M, tower.taps), _taps(M, tower.taps))
    rotation = Rotation(_floats(512, tower.width // tower.heads // 4, 2), _indices(M, 2)) if tower.rotates else None
    packing = Packing(segments, position, _indices(M), rotation, _indices(M) if tower.pools else None, segments)
    forward_packed(Ops("triton"), _weights(tower, dtype), _empty(M, tower.patch, dtype=dtype), packing)


def _weights(tower: Tower, dtype: torch.dtype) -> TowerWeights:
    D, F = tower.width, tower.intermediate

    def linear(out: int, K: int) -> Linear:
        return Linear(_empty(out, K, dtype=dtype), _empty(out, dtype=dtype))

    def normed(out: int, K: int) -> NormedLinear:
        return NormedLinear(_empty(out, K, dtype=dtype), _floats(out), _floats(out), 1e-6)

    norm = Norm(_empty(D, dtype=dtype), _empty(D, dtype=dtype), 1e-6)
    layer = LayerWeights(normed(3 * D, D), linear(D, D), normed(F, D), linear(D, F))
    head = HeadWeights(Pool(_floats(tower.heads, D), linear(D, D)), linear(D, D), normed(F, D), linear(D, F))
    of_each = MergerWeights(norm, linear(4 * D, 4 * D), linear(3584, 4 * D))
    of_four = MergerWeights(None, normed(4 * D, 4 * D), linear(3584, 4 * D))
    return TowerWeights(
        PatchEmbedding(*linear(D, tower.patch)[:2], 0),
        [layer],
        norm,
        head if tower.pools else None,
        tower.heads,
        tower.activation,
        of_four if tower.merges else None,
        {1: of_each} if tower.merges else {},
    )


def _segments(keys: tuple[int, ...]) -> Segments:
    first = tuple(sum(keys[:i]) for i in range(len(keys)))
    schedule = {rows: _indices(sum(-(-count // rows) for count in keys), 4) for rows in TILE_ROWS}
    return Segments(first, keys, keys, _indices(len(keys), 3), schedule)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _floats(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.float32)


def _indices(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int32)


def _taps(M: int, taps: int) -> Tensor | None:
    return _floats(M, taps) if taps > 1 else None
