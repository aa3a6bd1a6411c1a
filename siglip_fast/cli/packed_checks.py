"""What `siglip-fast info` checks of a model for images of any size: its operations on a small mix of sizes, packed.

Padding is among them: a row more behind an image's own, which attends to the image and which nothing attends to.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import Siglip2VisionConfig

from ..backends.torch import flat_patches
from ..ops import Position, Segments
from ..running.packing import TILE_ROWS, Upload, add_segments, ranges
from ..tuning import cases as of_one_size
from ..tuning.cache import Operation
from ..tuning.cases import PLAIN, TANH, Case

KEYS = np.array([1, 15, 64, 100, 64, 33])  # patches of each image
QUERIES = KEYS + (KEYS < 100)  # where an image is padded
FIRST = np.cumsum(QUERIES) - QUERIES
ROWS, IMAGES, PADDED_TO = int(QUERIES.sum()), len(KEYS), 100
STARTS = np.arange(IMAGES) * PADDED_TO  # in a batch as the model is given it and gives it back


def cases(config: Siglip2VisionConfig, dtype: torch.dtype) -> list[Case]:
    """The operations of a forward of these images."""
    D, F, H, p = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.patch_size
    of_rows = [
        ("patch_embed_rows", (D, config.num_channels * p * p, p)),
        ("layernorm_linear", (3 * D, D, PLAIN)),
        ("attention_segments", (H, D // H)),
        ("linear_residual", (D, D, True)),
        ("layernorm_linear", (F, D, TANH)),
        ("linear_residual", (D, F, True)),
        ("layernorm", (D,)),
    ]
    of_images = [
        ("attention_pool_segments", (D, H)),
        ("linear_residual", (D, D, False)),
        ("layernorm_linear", (F, D, TANH)),
        ("linear_residual", (D, F, True)),
    ]
    found = [Case(Operation(name, dims, dtype), ROWS) for name, dims in of_rows]
    if getattr(config, "vision_use_head", True):
        found += [Case(Operation(name, dims, dtype), IMAGES) for name, dims in of_images]
    return found


def inputs(case: Case, device: torch.device) -> tuple:
    """As `siglip_fast.tuning.cases.inputs`; also what another image's rows, or padding, would do wrong shows."""
    (name, dims, dtype), _ = case
    if name == "patch_embed_rows":
        pixels, patch, table = _of_one_size("patch_embed", (*dims, IMAGES * PADDED_TO), dtype, device)
        rows = ranges(STARTS, QUERIES)
        chosen, index = _uploaded(device, rows, np.flip(rows)[:, None])
        pixel_rows = flat_patches(pixels, patch.patch_size)[0]
        alone = torch.full_like(pixel_rows, float("nan"))
        alone[chosen] = pixel_rows[chosen]
        return alone, patch, Position(table, index), chosen
    if name == "attention_segments":
        (qkv,) = _of_one_size("attention", (ROWS, *dims), dtype, device)
        qkv = qkv[0]
        for i, (first, queries, keys) in enumerate(zip(FIRST, QUERIES, KEYS, strict=True)):
            if i % 2 == 0:  # whose own keys would count for nothing beside a neighbour's
                qkv[first : first + queries, 1] -= 1
            qkv[first + keys : first + queries, 1] += 3
        return qkv, _segments(device, FIRST, QUERIES)
    if name == "layernorm":
        places = np.minimum(np.arange(PADDED_TO), KEYS[:, None]) + FIRST[:, None]
        return *of_one_size.inputs(case, device)[:3], *_uploaded(device, places.reshape(-1))
    if name == "attention_pool_segments":
        tokens, pool = _of_one_size("attention_pool", (IMAGES * PADDED_TO, *dims), dtype, device)
        tokens = tokens[0].unflatten(0, (IMAGES, PADDED_TO))
        for own, keys in zip(tokens, KEYS, strict=True):
            own[keys:] *= 50
        return tokens.flatten(0, 1), pool, _segments(device, STARTS, np.full(IMAGES, PADDED_TO))
    return of_one_size.inputs(case, device)


def _of_one_size(name: str, dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple:
    """Those of one image that has all the rows."""
    rows = dims[-1] if name == "patch_embed" else 1
    return of_one_size.inputs(Case(Operation(name, dims, dtype), rows), device)


def _segments(device: torch.device, first: np.ndarray, queries: np.ndarray) -> Segments:
    upload = Upload()
    made = add_segments(upload, first, queries, KEYS, TILE_ROWS)
    upload.send(device)
    return made()


def _uploaded(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    upload = Upload()
    made = [upload.add(array) for array in arrays]
    upload.send(device)
    return [tensor() for tensor in made]
