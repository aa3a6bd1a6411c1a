"""Images and videos on grids of patches: each row's place, and what resizing a learned table of positions takes.

Numbers on the host, as everything that `siglip_fast.running.packing` uploads. `grids` has (frames, height, width) of each
image or video, in patches, and maybe more behind these; rows of all are behind one another, frame after frame.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Grid = tuple[int, ...]

# By tensor, its version when it was read, and what was in it
_read: "WeakTensorKeyDictionary" = WeakTensorKeyDictionary()


def read(grid_thw: Tensor) -> list[Grid]:
    """What is in an integer tensor, an entry a row. Of one that is on a device the host waits for it, once as long as the
    tensor lives and is not edited; what torch does not count (edits through `.data` or DLPack) it does not see."""
    if grid_thw.device.type == "cpu" or grid_thw.is_inference():
        return [*map(tuple, grid_thw.tolist())]
    return read_once(grid_thw)


def read_once(grid_thw: Tensor) -> list[Grid]:
    version, grids = _read.get(grid_thw, (None, None))
    if version != grid_thw._version:
        version, grids = grid_thw._version, [*map(tuple, grid_thw.tolist())]
        _read[grid_thw] = version, grids
    return grids


def frames(grids: Sequence[Grid]) -> np.ndarray:
    """`[S]`: rows of each frame, one frame after the other."""
    t, h, w, *_ = np.array(grids).T
    return np.repeat(h * w, t)


def places(grids: Sequence[Grid], merge: int | Sequence[int]) -> np.ndarray:
    """`[M, 2]`: row and column of each patch. Patches of a square of `merge` by `merge`, which may be another for each image,
    are neighbours, row-major within it, as the squares are within a frame."""
    merges = [merge] * len(grids) if isinstance(merge, int) else merge
    each = zip(grids, merges, strict=True)
    return np.concatenate([np.tile(_places_in_frame(h, w, side), (t, 1)) for (t, h, w, *_), side in each])


def _places_in_frame(height: int, width: int, merge: int) -> np.ndarray:
    row = np.arange(height).reshape(-1, 1, merge, 1)
    column = np.arange(width).reshape(1, -1, 1, merge)
    return np.stack(np.broadcast_arrays(row, column), -1).reshape(-1, 2)


def in_squares(grids: Sequence[Grid], side: int) -> np.ndarray:
    """`[M]`: of rows in raster order the order in which the patches of squares of `side` by `side` are neighbours."""
    return np.concatenate([source.T.reshape(-1) for source in _sources(grids, side)])


def squares(grids: Sequence[Grid], side: int) -> list[np.ndarray]:
    """Of rows in raster order those that lie in the same place in each frame, place by place, in the order in which the
    patches of squares of `side` by `side` are neighbours: a `[places, frames]` for images in a row that have as many."""
    found: list[list[np.ndarray]] = []
    for source in _sources(grids, side):
        if found and found[-1][0].shape[1] == source.shape[1]:
            found[-1].append(source)
        else:
            found.append([source])
    return [np.concatenate(sources) for sources in found]


def _sources(grids: Sequence[Grid], side: int) -> Iterator[np.ndarray]:
    """Of each image `[places, frames]`: the rows of each place, in that order, in raster order."""
    first = 0
    for t, h, w, *_ in grids:
        row, column = _places_in_frame(h, w, side).T
        yield first + (row * w + column)[:, None] + h * w * np.arange(t)
        first += t * h * w


def bilinear(
    places: np.ndarray, grids: Sequence[Grid], side: int, align_corners: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What resizes a table of `side` by `side` positions to each grid: index `[M, 4]` into its rows, float32 weight `[M, 4]`.

    As torch's F.interpolate (mode "bilinear"), and in the same float32 numbers as transformers'
    `vision_utils.get_vision_interpolation_indices_and_weights`.
    """
    t, h, w = np.array(grids).T
    sizes = np.repeat(np.stack([h, w], 1), t * h * w, axis=0).astype(np.float32)  # [M, 2]
    at = places.astype(np.float32)
    if align_corners:
        at = at * np.float32(side - 1) / np.maximum(sizes - 1, 1)
    else:
        at = (at + np.float32(0.5)) * np.float32(side) / sizes - np.float32(0.5)
    return _taps(at, side)


def interpolated(places: np.ndarray, grids: Sequence[Grid], side: int) -> tuple[np.ndarray, np.ndarray]:
    """As `bilinear` without align_corners, in the numbers of F.interpolate itself: it rounds the scale to float32, and then
    product and sum together. On a table of 128 by 128 the two are 1e-5 apart, more than float32 has to be off."""
    t, h, w = np.array(grids).T
    scale = np.repeat(side / np.stack([h, w], 1), t * h * w, axis=0).astype(np.float32)  # [M, 2]
    return _taps((scale.astype(np.float64) * (places + 0.5) - 0.5).astype(np.float32), side)


def _taps(at: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Of points `at`, float32 `[M, 2]`, on a table of `side` by `side`."""
    low = np.floor(at)[:, None]  # [M, 1, 2]
    neighbours = low + np.array([0, 1], np.float32)[:, None]  # [M, 2, 2]
    weight = np.maximum(1 - np.abs(at[:, None] - neighbours), 0)
    tap = np.clip(neighbours, 0, side - 1).astype(np.int64)
    index = tap[:, :, None, 0] * side + tap[:, None, :, 1]
    return index.reshape(-1, 4), (weight[:, :, None, 0] * weight[:, None, :, 1]).reshape(-1, 4)
