"""vLLM's vision tower of Qwen3-VL and Qwen3.5, all of it on the fused operations: images and videos, packed by the caller."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.conv import Conv3dLayer
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.model_executor.models import qwen2_5_vl, qwen3_vl

from ..forward import Packing
from ..ops import Rotation
from ..running.grids import Grid, frames, places, read
from ..running.packing import Upload, add_segments, tile_rows
from .anatomy import Anatomy, Unsupported, check_head_dim, check_tensors, layer_view, packed_embeddings
from .gridded import resized_bilinearly
from .packed import joined, together
from .vllm_tower import PARAMETERS, VllmTower, check_parts
from .weights import Derived, finish

PARTS = ("patch_embed", "pos_embed", "blocks", "merger", "deepstack_merger_list")
_GELU = type(get_act_fn("gelu_pytorch_tanh"))
_KNOWN = (
    *(qwen3_vl.Qwen3_VisionPatchEmbed, Conv3dLayer, nn.Embedding, nn.ModuleList, qwen3_vl.Qwen3_VisionBlock),
    *(nn.LayerNorm, qwen2_5_vl.Qwen2_5_VisionAttention, ApplyRotaryEmb, qwen3_vl.Qwen3_VisionMLP, _GELU),
    *(qwen3_vl.Qwen3_VisionPatchMerger, nn.GELU),
)


def check(tower: nn.Module) -> None:
    """Raise Unsupported unless the operations compute what the tower does."""
    head_dim = tower.hidden_size // tower.num_heads
    check_head_dim(head_dim)
    check_parts(tower, PARTS, _KNOWN, head_dim)
    for i, block in enumerate(tower.blocks):
        if type(block.mlp.act_fn) is not _GELU or getattr(block.mlp.act_fn, "approximate", "tanh") != "tanh":
            raise Unsupported(f"blocks.{i}.mlp.act_fn is {block.mlp.act_fn!r}, not GELU by tanh")
    for merger in (tower.merger, *tower.deepstack_merger_list):
        if merger.act_fn.approximate != "none":
            raise Unsupported(f"a merger's act_fn is {merger.act_fn!r}, not GELU by erf")
    rotary = tower.rotary_pos_emb
    if type(rotary) is not RotaryEmbedding or not rotary.is_neox_style or rotary.cos_sin_cache.shape[1] * 2 != head_dim:
        raise Unsupported("rotary_pos_emb is not of both axes, a quarter of head_dim each")
    if tower.deepstack_visual_indexes and tower.hidden_size % 64:
        raise Unsupported("hidden_size is no multiple of 64")  # what moments of rows side by side need
    check_tensors(tower, tower.patch_embed.proj.weight, PARAMETERS)


def view(tower: nn.Module) -> SimpleNamespace:
    """The tower under the names of transformers' SigLIP, and what it has beside."""
    proj, taps = tower.patch_embed.proj, zip(tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True)
    return SimpleNamespace(
        embeddings=packed_embeddings(proj, proj.kernel_size[-1]),
        encoder=SimpleNamespace(layers=[_layer(block) for block in tower.blocks]),
        post_layernorm=None,
        rotates=True,
        merger=_merger(tower.merger),
        taps={index + 1: _merger(merger) for index, merger in sorted(taps)},
    )


def _layer(block: nn.Module) -> SimpleNamespace:
    attention, mlp = block.attn, SimpleNamespace(fc1=block.mlp.linear_fc1, fc2=block.mlp.linear_fc2)
    norms, heads = (block.norm1, block.norm2), attention.num_attention_heads_per_partition
    return layer_view(norms, attention.qkv, attention.proj, heads, mlp)


def _merger(merger: nn.Module) -> SimpleNamespace:
    return SimpleNamespace(norm=merger.norm, fc1=merger.linear_fc1, fc2=merger.linear_fc2)


def rotary_table(rotary: nn.Module) -> Tensor:
    """`siglip_fast.ops.Rotation.table` of vLLM's cosines and sines, which it rounds to the model's dtype."""
    with torch.inference_mode(False), torch.no_grad():
        table = torch.stack(rotary.cos_sin_cache.float().chunk(2, -1), -1)
    finish(table)
    return table


class Qwen3_VisionTransformer(VllmTower, qwen3_vl.Qwen3_VisionTransformer):  # noqa: N801, as vLLM spells it
    anatomy = Anatomy(
        *(check, view, lambda tower: tower.patch_embed.proj),
        ("num_grid_per_side", "spatial_merge_size", "deepstack_visual_indexes"),
        PARAMETERS,
    )

    def forward(
        self, x: Tensor, grid_thw: Tensor | list[list[int]], *, encoder_metadata: dict[str, Tensor] | None = None
    ) -> Tensor:
        """`x [M, K]`, pixels of the patches of all images and videos, `grid_thw [B, 3]` → `[M / 4, out · (1 + taps)]`, as
        vLLM's: the merged rows and beside them those of the taps."""
        x = x.to(self.device, non_blocking=True)

        def merged(derived: Derived) -> Tensor:
            return self._run(derived, self.input_norm(x, self.dtype), _grids(grid_thw))

        out = self._fused(merged, len(x), x, grid_thw, encoder_metadata)
        return super().forward(x, grid_thw, encoder_metadata=encoder_metadata) if out is None else out

    def _call_reasons(self, x: Tensor, grid_thw: Any, encoder_metadata: Any) -> Iterator[str]:
        yield from super()._call_reasons(x, grid_thw, encoder_metadata)
        if encoder_metadata is not None:
            yield "encoder_metadata is given, as inside of vLLM's CUDA graphs of encoders"
            return  # and no grids
        weight, grids, merge = self._patch_weight(), _grids(grid_thw), self.spatial_merge_size
        if weight is not None and (x.ndim != 2 or x.shape[1] != weight[0].numel()):
            yield f"x has shape {list(x.shape)}, not [rows, {weight[0].numel()}]"
        elif any(t < 1 or h < 1 or w < 1 or h % merge or w % merge for t, h, w in grids):
            yield f"grid_thw is not positive, or its sides are no multiples of {merge}"
        elif sum(t * h * w for t, h, w in grids) != len(x):
            yield f"x has {len(x)} rows, by grid_thw another number"
        elif max(max(h, w) for _, h, w in grids) > len(self.rotary_pos_emb.cos_sin_cache):
            yield "a side is longer than the table of the rotation"

    def _run(self, derived: Derived, rows: Tensor, grids: list[Grid]) -> Tensor:
        lengths, parts, begin = [t * h * w for t, h, w in grids], [], 0
        for images in together(lengths, derived.ops.images_at_once(rows.device, tokens=1)):
            end = begin + sum(lengths[images])
            outputs = derived.run_packed(rows[begin:end], self._pack(derived, grids[images]))
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


def _grids(grid_thw: Tensor | list[list[int]]) -> list[Grid]:
    return read(grid_thw) if isinstance(grid_thw, Tensor) else [*map(tuple, grid_thw)]
