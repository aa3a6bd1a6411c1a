"""As cases.py, of models for images of any size: their operations on a mix of sizes, packed.

Padding is among them: a row more behind an image's own, which attends to the image and which nothing attends to.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, Siglip2VisionConfig

from ..backends.torch import ACTIVATIONS
from ..ops import PatchEmbedding, Position, Rotation, Segments
from ..running.packing import TILE_ROWS, Upload, add_segments, ranges
from . import cases as of_one_size
from .cache import Operation, bucket
from .cases import PLAIN, TANH, Case, of_pooled, row_moments

ERF, QUICK = (ACTIVATIONS.index(activation) for activation in ("erf", "quick"))
SHARES = (1, 15, 64, 100, 64, 33)  # of the longest image, in percent
LONGEST, PATCHES = 1000, 256  # of a mix; of the longest image of which only their number is known
Named = tuple[str, tuple[int, ...]]


class Gridded(NamedTuple):
    """Of a tower on grids that merges nothing by an operation."""

    taps: int  # of a row's position
    rotates: bool  # Q and K
    activation: int = TANH
    is_normed: bool = True  # behind the last layer


GRIDDED = {  # by model_type
    "paddleocr_vl_vision": Gridded(4, True),
    "kimi_k25_vision": Gridded(1, True),
    "video_llama_3_vision": Gridded(1, True),
    "cosmos3_edge_vision": Gridded(1, False),
    "glm_image_vision": Gridded(4, False, ERF, is_normed=False),
    "hunyuan_vl_vision": Gridded(4, False, ERF, is_normed=False),
    "hy_v4_vl_vision": Gridded(1, False, ERF, is_normed=False),
    "ernie4_5_vl_moe_vision": Gridded(1, True, QUICK),
}


class Mix(NamedTuple):
    """Images behind one another: `queries` rows each, of which the first `keys` are patches; all padded to as many rows."""

    keys: np.ndarray
    queries: np.ndarray
    padded_to: int

    @property
    def first(self) -> np.ndarray:
        return np.cumsum(self.queries) - self.queries

    @property
    def starts(self) -> np.ndarray:
        """In a batch as NaFlex is given it and gives it back."""
        return np.arange(len(self.keys)) * self.padded_to


def mix(rows: int) -> Mix:
    """Of so many rows in all."""
    longest = min(LONGEST, max(1, rows * 100 // 282))  # 282: what the shares, with their padding, are of 100
    keys, queries = _of(longest, len(SHARES) * -(-rows // longest))
    count = int(np.searchsorted(np.cumsum(queries), rows)) + 1
    keys, queries = keys[:count], queries[:count]
    queries[-1] -= queries.sum() - rows
    return Mix(np.minimum(keys, queries), queries, longest)


def mix_of(images: int) -> Mix:
    """Of so many images."""
    return Mix(*_of(PATCHES, images), PATCHES)


def _of(longest: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    keys = np.maximum(np.resize(SHARES, images) * longest // 100, 1)
    return keys, keys + (keys < longest)


def cases_of(config: PretrainedConfig, tokens: int, dtype: torch.dtype, batch_sizes: Iterable[int]) -> list[Case]:
    """`siglip_fast.tuning.cases.cases` of any model; where its images have any size, of as many patches in all."""
    if not takes_any_size(config):
        return of_one_size.cases(config, tokens, dtype, batch_sizes)
    found: dict[tuple[Operation, int], Case] = {}
    for B in batch_sizes:
        for case in cases(config, dtype, B * tokens):
            found.setdefault((case.operation, bucket(case.rows)), case)
    return list(found.values())


def takes_any_size(config: PretrainedConfig) -> bool:
    is_gridded = config.model_type in GRIDDED or hasattr(config, "spatial_merge_size")
    return is_gridded or isinstance(config, Siglip2VisionConfig)


def usual_tokens(config: PretrainedConfig) -> int:
    """Patches of an image, where none else were asked for."""
    if hasattr(config, "image_size") and not takes_any_size(config):
        return (config.image_size // config.patch_size) ** 2
    return getattr(config, "num_patches", 1024)


def cases(config: PretrainedConfig, dtype: torch.dtype, rows: int) -> list[Case]:
    """The operations of a forward of a mix of so many rows."""
    if config.model_type in GRIDDED:
        groups = {rows: _gridded(config)}
    else:
        groups = _merging(config, rows) if hasattr(config, "spatial_merge_size") else _naflex(config, rows)
    return [Case(Operation(name, dims, dtype), count) for count, named in groups.items() for name, dims in named]


def _layers(D: int, F: int, H: int, rotation: tuple[int, ...] = (), activation: int = TANH) -> list[Named]:
    """A layer's, on rows."""
    return [
        ("layernorm_linear", (3 * D, D, PLAIN, *rotation)),
        ("attention_segments", (H, D // H)),
        ("linear_residual", (D, D, True)),
        (
            "layernorm_linear",
            (F, D, activation, *(() if activation == TANH else (1, 0))),
        ),  # as the triton backend names them
        ("linear_residual", (D, F, True)),
    ]


def _naflex(config: Siglip2VisionConfig, rows: int) -> dict[int, list[Named]]:
    D, F, H, p = config.hidden_size, config.intermediate_size, config.num_attention_heads, config.patch_size
    of_rows = [("patch_embed_rows", (D, config.num_channels * p * p, 1)), *_layers(D, F, H), ("layernorm", (D, True))]
    if not getattr(config, "vision_use_head", True):
        return {rows: of_rows}
    of_images = [("attention_pool_segments", (D, H)), *of_pooled(D, F)]
    images = len(mix(rows).keys)
    return {rows: of_rows + of_images} if images == rows else {rows: of_rows, images: of_images}


def _merging(config: PretrainedConfig, rows: int) -> dict[int, list[Named]]:
    """Of Qwen3-VL and its descendants, and of Qwen2-VL, whose hidden_size is that of what it merges into."""
    H, merged = config.num_heads, config.spatial_merge_size**2
    if hasattr(config, "embed_dim"):
        D, out, taps, activation = config.embed_dim, config.hidden_size, 1, QUICK
        F = int(D * config.mlp_ratio)
    else:
        D, F, out, taps, activation = config.hidden_size, config.intermediate_size, config.out_hidden_size, 4, TANH
    K, wide = config.in_channels * config.temporal_patch_size * config.patch_size**2, merged * D
    layers = _layers(D, F, H, (1, D // H), activation)
    of_rows = [("patch_embed_rows", (D, K, taps)), *layers, ("layernorm", (D,))]
    of_merged = [("linear", (wide, wide, ERF)), ("linear", (out, wide, PLAIN))]
    if getattr(config, "deepstack_visual_indexes", None):
        of_merged.append(("layernorm_linear", (wide, wide, ERF, merged, 0)))
    return {merged * (rows // merged): of_rows, rows // merged: of_merged}


def _gridded(config: PretrainedConfig) -> list[Named]:
    D, F, own = config.hidden_size, config.intermediate_size, GRIDDED[config.model_type]
    H = config.num_heads if hasattr(config, "num_heads") else config.num_attention_heads
    layers = _layers(D, F, H, (1, D // H) if own.rotates else (), own.activation)
    K = getattr(config, "num_channels", 3) * config.patch_size**2
    last = [("layernorm", (D,))] if own.is_normed else []
    return [("patch_embed_rows", (D, K, own.taps)), *layers, *last]


def inputs(case: Case, device: torch.device) -> tuple:
    """As `siglip_fast.tuning.cases.inputs`; also what another image's rows, or padding, would do wrong shows."""
    (name, dims, dtype), rows = case
    make = _MAKE.get((name, len(dims))) or _MAKE.get(name)
    return make(dims, rows, dtype, device) if make else of_one_size.inputs(case, device)


def _plain(name: str, dims: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device) -> tuple:
    return of_one_size.inputs(Case(Operation(name, dims, dtype), rows), device)


def _patch_embed_rows(dims: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device) -> tuple:
    (D, K, taps), of = dims, mix(rows)
    R = len(of.keys) * of.padded_to
    x, linear, _ = _plain("linear_residual", (D, K, False), R, dtype, device)
    table = _plain("attention", (1, 1, D), R, dtype, device)[0][:, 0, 0, 0].contiguous()
    source = ranges(of.starts, of.queries)
    index = (np.flip(source)[:, None] + 7 * np.arange(taps)) % R
    chosen, index = _uploaded(device, source, index)
    alone = torch.full_like(x, float("nan"))
    alone[chosen] = x[chosen]
    weight = None if taps == 1 else torch.rand(rows, taps, generator=_seeded(device), device=device)
    return alone, PatchEmbedding(*linear[:2], 1), Position(table, index, weight), chosen


def _layernorm_linear(dims: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device) -> tuple:
    out, K, activation, merged, head_dim = dims
    x, _, normed, activation, _ = _plain("layernorm_linear", (out, K, activation), rows, dtype, device)
    rotation = None
    if head_dim:
        angles = 6 * torch.rand(64, head_dim // 4, generator=_seeded(device), device=device)
        places = np.stack([np.arange(rows) % 64, np.arange(rows) * 7 % 61], 1)
        rotation = Rotation(torch.stack([angles.cos(), angles.sin()], -1), *_uploaded(device, places))
    return x, row_moments(x.view(rows * merged, -1)), normed, activation, rotation


def _linear(dims: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device) -> tuple:
    out, K, activation = dims
    return *_plain("linear_residual", (out, K, False), rows, dtype, device)[:2], ACTIVATIONS[activation]


def _attention_segments(dims: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device) -> tuple:
    of, (qkv,) = mix(rows), _plain("attention", (rows, *dims), 1, dtype, device)
    qkv = qkv[0]
    for i, (first, queries, keys) in enumerate(zip(of.first, of.queries, of.keys, strict=True)):
        if i % 2 == 0:  # whose own keys would count for nothing beside a neighbour's
            qkv[first : first + queries, 1] -= 1
        qkv[first + keys : first + queries, 1] += 3
    return qkv, _segments(device, of.first, of.queries, of.keys)


def _layernorm_of_rows(dims: tuple[int, ...], rows: int, dtype: torch.dtype, device: torch.device) -> tuple:
    of = mix(rows)
    places = np.minimum(np.arange(of.padded_to), of.keys[:, None]) + of.first[:, None]
    places = np.minimum(places, (of.first + of.queries - 1)[:, None]).reshape(-1)
    # As many as the case says, in an order of their own
    return *_plain("layernorm", dims[:1], rows, dtype, device)[:3], *_uploaded(device, np.resize(places, rows))


def _attention_pool_segments(dims: tuple[int, ...], images: int, dtype: torch.dtype, device: torch.device) -> tuple:
    of = mix_of(images)
    tokens, pool = _plain("attention_pool", (images * of.padded_to, *dims), 1, dtype, device)
    tokens = tokens[0].unflatten(0, (images, of.padded_to))
    for own, keys in zip(tokens, of.keys, strict=True):
        own[keys:] *= 50
    return tokens.flatten(0, 1), pool, _segments(device, of.starts, np.full(images, of.padded_to), of.keys)


_MAKE = {
    "patch_embed_rows": _patch_embed_rows,
    ("layernorm_linear", 5): _layernorm_linear,
    "linear": _linear,
    "attention_segments": _attention_segments,
    ("layernorm", 2): _layernorm_of_rows,
    "attention_pool_segments": _attention_pool_segments,
}


def _segments(device: torch.device, first: np.ndarray, queries: np.ndarray, keys: np.ndarray) -> Segments:
    upload = Upload()
    made = add_segments(upload, first, queries, keys, TILE_ROWS)
    upload.send(device)
    return made()


def _uploaded(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    upload = Upload()
    made = [upload.add(array) for array in arrays]
    upload.send(device)
    return [tensor() for tensor in made]


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)
