"""Qwen3-VL's vision tower as servers have it, all of it on the fused operations: images and videos, packed by the caller.

vLLM and SGLang have the same one, on layers of their own; a few things are called otherwise.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..forward import Packing
from ..ops import Rotation
from ..running.grids import Grid, frames, places, read
from ..running.packing import Upload, add_segments, tile_rows
from .anatomy import Anatomy, Unsupported, check_head_dim, check_tensors, layer_view, packed_embeddings
from .gridded import resized_bilinearly
from .packed import joined, together
from .server_tower import Check, ServerTower, check_parts
from .weights import Derived, finish

PARTS = ("patch_embed", "pos_embed", "blocks", "merger", "deepstack_merger_list")
WATCHED = ("num_grid_per_side", "spatial_merge_size", "deepstack_visual_indexes")


class Own(NamedTuple):
    """What is a server's own in such a tower."""

    known: Mapping[type, Check]
    parameters: tuple[type, ...]
    rotary: type
    gelu: type  # by tanh
    activation: str  # the name of it in a block's MLP
    qkv: str  # that of the projection in its attention
    taps: Callable[[nn.Module], Iterable[tuple[int, nn.Module]]]  # the layers that are tapped, and their mergers


def anatomy_of(own: Own) -> Anatomy:
    def check(tower: nn.Module) -> None:
        head_dim = tower.hidden_size // tower.num_heads
        check_head_dim(head_dim)
        check_parts(tower, PARTS, own.known)
        for i, block in enumerate(tower.blocks):
            activation = getattr(block.mlp, own.activation)
            if type(activation) is not own.gelu or getattr(activation, "approximate", "tanh") != "tanh":
                raise Unsupported(f"blocks.{i}.mlp.{own.activation} is {activation!r}, not GELU by tanh")
        for merger in (tower.merger, *tower.deepstack_merger_list):
            if merger.act_fn.approximate != "none":
                raise Unsupported(f"a merger's act_fn is {merger.act_fn!r}, not GELU by erf")
        _check_rotary(tower.rotary_pos_emb, own.rotary, head_dim)
        if tower.deepstack_visual_indexes and tower.hidden_size % 64:
            raise Unsupported("hidden_size is no multiple of 64")  # what moments of rows side by side need
        check_tensors(tower, tower.patch_embed.proj.weight, own.parameters)

    def view(tower: nn.Module) -> SimpleNamespace:
        """The tower under the names of transformers' SigLIP, and what it has beside."""
        proj = tower.patch_embed.proj
        return SimpleNamespace(
            embeddings=packed_embeddings(proj, proj.kernel_size[-1]),
            encoder=SimpleNamespace(layers=[_layer(block, own.qkv) for block in tower.blocks]),
            post_layernorm=None,
            rotates=True,
            merger=_merger(tower.merger),
            taps={index + 1: _merger(merger) for index, merger in sorted(own.taps(tower), key=lambda tap: tap[0])},
        )

    return Anatomy(check, view, lambda tower: tower.patch_embed.proj, WATCHED, own.parameters)


def _check_rotary(rotary: nn.Module, expected: type, head_dim: int) -> None:
    if type(rotary) is not expected or not rotary.is_neox_style or rotary.cos_sin_cache.shape[1] * 2 != head_dim:
        raise Unsupported("rotary_pos_emb is not of both axes, a quarter of head_dim each")


def _layer(block: nn.Module, qkv: str) -> SimpleNamespace:
    attention, mlp = block.attn, SimpleNamespace(fc1=block.mlp.linear_fc1, fc2=block.mlp.linear_fc2)
    norms, heads = (block.norm1, block.norm2), attention.num_attention_heads_per_partition
    return layer_view(norms, getattr(attention, qkv), attention.proj, heads, mlp)


def _merger(merger: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(norm=merger.norm, fc1=merger.linear_fc1, fc2=merger.linear_fc2)


def rotary_table(rotary: nn.Module) -> Tensor:
    """`siglip_fast.ops.Rotation.table` of the server's cosines and sines, which may be rounded to the model's dtype."""
    with torch.inference_mode(False), torch.no_grad():
        table = torch.stack(rotary.cos_sin_cache.float().chunk(2, -1), -1)
    finish(table)
    return table


class Qwen3VLTower(ServerTower):
    def _call_reasons(self, x: Tensor, grid_thw: Any, *args: Any) -> Iterator[str]:
        yield from super()._call_reasons(x, grid_thw, *args)
        weight, grids, merge = self._patch_weight(), grids_of(grid_thw), self.spatial_merge_size
        if weight is not None and (x.ndim != 2 or x.shape[1] != weight[0].numel()):
            yield f"x has shape {list(x.shape)}, not [rows, {weight[0].numel()}]"
        elif any(t < 1 or h < 1 or w < 1 or h % merge or w % merge for t, h, w in grids):
            yield f"grid_thw is not positive, or its sides are no multiples of {merge}"
        elif sum(t * h * w for t, h, w in grids) != len(x):
            yield f"x has {len(x)} rows, by grid_thw another number"
        elif max(max(h, w) for _, h, w in grids) > len(self.rotary_pos_emb.cos_sin_cache):
            yield "a side is longer than the table of the rotation"

    def _run(self, derived: Derived, rows: Tensor, grids: list[Grid]) -> Tensor:
        """`rows [M, K]` of all images and videos → `[M / 4, out · (1 + taps)]`."""
        lengths, parts, begin = [t * h * w for t, h, w in grids], [], 0
        for images in together(lengths, derived.ops.images_at_once(rows.device, tokens=1)):
            end, some = begin + sum(lengths[images]), grids[images]
            outputs = derived.run_sizes(rows[begin:end], tuple(some), functools.partial(self._pack, derived, some))
            parts.append(torch.cat([outputs.pooler_output, *outputs.features], 1))
            begin = end
        return joined(parts)

    def _pack(self, derived: Derived, grids: Sequence[Grid]) -> Packing:
        place, upload = places(grids, self.spatial_merge_size), Upload()
        position = resized_bilinearly(self.pos_embed.weight, self.num_grid_per_side, True, grids, place, upload)
        on_device = upload.add(place)
        lengths, rows = frames(grids), tile_rows(derived.ops.backend)
        segments = add_segments(upload, np.cumsum(lengths) - lengths, lengths, lengths, rows)
        upload.send(self.device)
        table = derived.kept(rotary_table, self.rotary_pos_emb)
        return Packing(segments(), position(), rotation=Rotation(table, on_device()))


def grids_of(grid_thw: Tensor | list[list[int]]) -> list[Grid]:
    return read(grid_thw) if isinstance(grid_thw, Tensor) else [*map(tuple, grid_thw)]
