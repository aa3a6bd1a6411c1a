"""SigLIP 2's vision tower as servers have it (LFM2-VL), its encoder on the fused operations: images of any size, packed by the
caller.

vLLM and SGLang have the same one, on layers of their own. Only what is behind `embeddings` and `encoder` is the server's:
post_layernorm and the selection of features.
"""

import functools
from collections.abc import Callable, Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..forward import Packing
from ..ops import Position
from ..running.packing import Upload, add_segments, ranges, tile_rows
from .resized import ResizedPositions
from .server_tower import ServerTower
from .weights import Derived


class _Positions(ResizedPositions):
    def _resized(self, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """By the server's own code."""
        embeddings, lengths = self._embeddings, [height * width for height, width in sizes]
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.detach().view(side, side, -1)
        # which wants the sizes on the CPU
        packed = embeddings.resize_positional_embeddings_packed(table, torch.tensor(sizes), lengths_list=lengths)
        return iter(packed.split(lengths))


class Siglip2Tower(ServerTower):
    resolve: ClassVar[Callable[..., Tensor]]  # the server's `resolve_visual_encoder_outputs`

    def forward(
        self,
        pixel_values_packed: Tensor,
        spatial_shapes: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: Tensor,
        select_layers: list[int] | None = None,
    ) -> Tensor:
        """`pixel_values_packed [1, M, K]` or `[M, K]`, `spatial_shapes` int `[B, 2]` on the CPU → as the server's: `[1, M, D]`,
        the last hidden state, or the selected ones side by side. `cu_seqlens` has the images' rows, by which the server's
        forward goes."""
        args = (spatial_shapes, cu_seqlens, max_seqlen)

        def encoded(derived: Derived) -> Tensor | list[Tensor]:
            """What the server's encoder returns: the last of its hidden states `[1, M, D]`, or every one."""
            stream: list[Tensor] = []
            collect = None if select_layers is None else lambda x: stream.append(x[None])
            shapes, rows = [*map(tuple, spatial_shapes.tolist())], pixel_values_packed.flatten(0, -2)
            pack = functools.partial(self._pack, derived, shapes)
            last = derived.run_sizes(rows, tuple(shapes), pack, collect).last_hidden_state
            return last[None] if collect is None else stream

        states = self._fused(encoded, pixel_values_packed.shape[-2], pixel_values_packed, *args)
        if states is None:
            return super().forward(pixel_values_packed, *args, select_layers)
        layers = self.config.num_hidden_layers
        return self.resolve(states, self.post_layernorm, select_layers=select_layers, max_possible_layers=layers)

    def _call_reasons(
        self, pixel_values: Tensor, spatial_shapes: Tensor, cu_seqlens: Tensor, max_seqlen: Tensor
    ) -> Iterator[str]:
        yield from super()._call_reasons(pixel_values, spatial_shapes, cu_seqlens, max_seqlen)
        weight = self._patch_weight()
        if weight is None:
            return  # the tower has a reason
        if not pixel_values.is_floating_point() or pixel_values.shape[-1] != weight.shape[1]:
            yield f"pixel_values are {pixel_values.dtype} of {pixel_values.shape[-1]} columns, not {weight.shape[1]}"
        lengths = spatial_shapes.prod(1).tolist()
        if min(spatial_shapes.flatten().tolist(), default=0) < 1 or sum(lengths) != pixel_values.shape[:-1].numel():
            yield "spatial_shapes are not positive, or of another number of patches than there are rows"
        elif len(cu_seqlens) != len(lengths) + 1 or (  # on a device it would have to be waited for
            not cu_seqlens.is_cuda and cu_seqlens.tolist() != [0, *np.cumsum(lengths).tolist()]
        ):
            yield "cu_seqlens are not the images' of spatial_shapes"

    def _pack(self, derived: Derived, shapes: list[tuple[int, int]]) -> Packing:
        lengths, upload = np.array(shapes).prod(1), Upload()
        table, offsets = derived.kept(_Positions, self.embeddings).of(shapes)
        index = upload.add(ranges(offsets, lengths)[:, None])
        rows = tile_rows(derived.ops.backend)
        segments = add_segments(upload, np.cumsum(lengths) - lengths, lengths, lengths, rows)
        upload.send(self.embeddings.position_embedding.weight.device)
        return Packing(segments(), Position(table, index()))
