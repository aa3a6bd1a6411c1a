"""Segments for tests of packed operations: what a call uploads."""

import numpy as np
import torch

from siglip_fast.ops import Segments
from siglip_fast.running.packing import TILE_ROWS, Upload, add_segments


def segments_of(keys: list[int], device: str, extra: list[int] | None = None) -> Segments:
    """One behind the other; `extra` are rows of each that are no keys, and only look at the others."""
    counts = np.array(keys)
    queries = counts + np.array(extra or [0] * len(keys))
    upload = Upload()
    made = add_segments(upload, np.cumsum(queries) - queries, queries, counts, TILE_ROWS)
    upload.send(torch.device("cpu"))  # from where no memory is pinned, which ttsem has none of
    segments = made()
    schedule = {rows: entries.to(device) for rows, entries in segments.schedule.items()}
    return segments._replace(table=segments.table.to(device), schedule=schedule)
