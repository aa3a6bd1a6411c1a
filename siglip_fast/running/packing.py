"""From the sizes of a call's images, known on the host, to what the operations go by on the device.

Everything is computed on the host and uploaded in one piece, so a forward waits for the device at most once, to learn the
sizes, and not at all where they are on the CPU.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..ops import Segments

TILE_ROWS = (16, 32, 64, 128)  # that a tile of the triton backend's attention may have


def tile_rows(backend: str) -> tuple[int, ...]:
    """Of the tiles that attention's schedule has to be for on this backend."""
    return TILE_ROWS if backend == "triton" else ()


class Upload:
    """int32 and float32 arrays that reach a device in one copy."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._tensors: list[Tensor] = []

    def add(self, array: np.ndarray) -> Callable[[], Tensor]:
        """What gives the array's tensor once it was sent; an integer array's is int32."""
        place = len(self._arrays)
        self._arrays.append(np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int32))
        return lambda: self._tensors[place]

    def send(self, device: torch.device) -> None:
        """Without waiting."""
        sizes = [-(-array.size // 4) * 4 for array in self._arrays]  # kernels like addresses at multiples of 16 bytes
        piece = torch.empty(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        for array, part in zip(self._arrays, piece.split(sizes), strict=True):
            part.numpy()[: array.size] = array.reshape(-1).view(np.int32)
        moved = piece.to(device, non_blocking=True)
        for array, part in zip(self._arrays, moved.split(sizes), strict=True):
            dtype = torch.float32 if array.dtype == np.float32 else torch.int32
            self._tensors.append(part[: array.size].view(dtype).view(array.shape))


def add_segments(
    upload: Upload, first: np.ndarray, queries: np.ndarray, keys: np.ndarray, tile_rows: Sequence[int] = ()
) -> Callable[[], Segments]:
    """What gives `siglip_fast.ops.Segments` of these, one entry a segment, once `upload` was sent; with the schedule for
    tiles of so many rows."""
    n = int(keys[0])
    equal = (queries == n).all() and (keys == n).all() and (first == n * np.arange(len(first))).all()
    table = upload.add(np.stack([first, queries, keys], 1))
    schedules = {rows: upload.add(schedule(first, queries, keys, rows)) for rows in tile_rows}
    host = [tuple(column.tolist()) for column in (first, queries, keys)]
    length = n if equal else None
    return lambda: Segments(*host, table(), {rows: made() for rows, made in schedules.items()}, length)


def schedule(first: np.ndarray, queries: np.ndarray, keys: np.ndarray, tile_rows: int) -> np.ndarray:
    """int32 `[tiles, 4]`: `Segments.schedule`. The longest segments first, so that none of them begins when the others end."""
    order = np.argsort(-keys, kind="stable")
    tiles = -(-queries[order] // tile_rows)
    segment = np.repeat(order, tiles)
    tile = np.arange(len(segment)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    columns = (first[segment], tile * tile_rows, queries[segment], keys[segment])
    return np.stack(columns, 1).astype(np.int32)


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`first[i], first[i] + 1, …`, `counts[i]` of them, for one i after the other."""
    return np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
