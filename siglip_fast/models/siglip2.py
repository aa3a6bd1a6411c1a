"""SigLIP 2's NaFlex towers: images of any aspect, as rows of patches padded to the same number under a mask.

The fused forward computes no padding: the rows of all images are packed, one image's behind another's. Stock's padded rows
are outputs too, and all of an image are equal, since they have the same pixels and the same position: one row more for each
image, which attends to the image and which nothing attends to, gives them all.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip2 import modeling_siglip2
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..forward import Outputs, Packing
from ..ops import Position
from ..running.packed_graphs import Call
from ..running.packing import Upload, add_segments, ranges
from ..running.traced import naflex_forward
from .anatomy import of_transformers
from .base import Built
from .captured_packed import CapturedPacked
from .outputs import in_asked_form
from .packed import joined, together, with_own_positions
from .resized import NaflexPositions
from .traced import Traced
from .weights import Derived


class Sizes(NamedTuple):
    """Of a call's images."""

    shapes: list[tuple[int, int]]  # patches, height by width
    padded_to: int  # rows

    @property
    def lengths(self) -> np.ndarray:
        return np.array(self.shapes).prod(1)

    @property
    def queries(self) -> np.ndarray:
        """Of each image its patches, and one row for all that pad it."""
        return self.lengths + (self.lengths < self.padded_to)


class Siglip2Tower(Traced, CapturedPacked):
    """What makes a SigLIP 2 NaFlex tower of transformers fast: mixed into the stock class, before it."""

    mask_name = "pixel_attention_mask"
    autocasts = True

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor,
        spatial_shapes: Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [B, N, K]`, `pixel_attention_mask [B, N]`, `spatial_shapes` int64 `[B, 2]` (height, width in patches)
        → `last_hidden_state [B, N, D]` and `pooler_output [B, D]` (None without head).

        With `output_hidden_states` also `hidden_states`: the residual stream `[B, N, D]` before the first layer and
        after each. Padded rows are those of stock. Keyword arguments and the tuple form are those of the stock class.

        Raises:
            TypeError: pixel_values are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        args = (pixel_values, pixel_attention_mask, spatial_shapes)
        if torch.compiler.is_exporting():  # an exported program should not need this package
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            _, reason = self._route(*args, **kwargs)
            if reason is None:
                return in_asked_form(BaseModelOutputWithPooling(*naflex_forward(self, *args)), self.config, kwargs)
        else:
            derived, reason, sizes = self._route_sizes(*args, **kwargs)
            if reason is None:
                return self._fused(derived, pixel_values, sizes, kwargs)
        self._delegate(reason)
        return super().forward(*args, **kwargs)

    _own_forward = forward  # without what a subclass or a hook puts around it

    @property
    def _tower(self) -> nn.Module:
        return self._modules.get("vision_model", self)  # nested until transformers 5.6

    def _request_reasons(self, pixel_attention_mask: Any, spatial_shapes: Any, **kwargs) -> Iterator[str]:
        yield from self._setting_reasons(kwargs)

    def _read(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None, spatial_shapes: Tensor, **kwargs
    ) -> Sizes | str:
        mask, shapes = pixel_attention_mask, spatial_shapes
        if reason := self._unusual(pixel_values, mask, shapes):  # what is wrong with such stock's code is to say
            return reason
        device, (B, N, _) = pixel_values.device, pixel_values.shape
        lengths = shapes.to(device).prod(1)
        inside = torch.arange(N, device=device) < lengths[:, None]
        fits = inside.all() if mask is None else (mask == inside).all()
        first_padded = pixel_values[torch.arange(B, device=device), lengths.clamp(0, N - 1)]
        alike = ((pixel_values == first_padded[:, None]).all(-1) | inside).all()
        # The one time that the host waits.
        *numbers, fits, alike = torch.cat([shapes.to(device).flatten(), fits[None], alike[None]]).tolist()
        sizes = Sizes([*zip(numbers[::2], numbers[1::2], strict=True)], N)
        if min(numbers) < 1 or sizes.lengths.max() > N:
            return "spatial_shapes are not positive, or of more patches than there are rows"
        if not fits:
            return f"{self.mask_name} is not true for exactly the first height·width rows of each image"
        return sizes if alike else "the rows that pad an image differ from each other"

    def _unusual(self, pixel_values: Tensor, mask: Any, shapes: Any) -> str | None:
        K, shape = self._patch_weight().shape[1], pixel_values.shape
        if len(shape) != 3 or shape[2] != K or not shape[1] or not pixel_values.is_floating_point():
            return f"pixel_values are {pixel_values.dtype}, {list(shape)}, not [batch, rows, {K}]"
        if (
            type(shapes) is not Tensor
            or shapes.shape != (shape[0], 2)
            or shapes.dtype not in (torch.int64, torch.int32)
        ):
            return "spatial_shapes are no integer tensor [batch, 2]"
        if mask is not None and (type(mask) is not Tensor or mask.shape != pixel_values.shape[:2]):
            return f"{self.mask_name} is no tensor [batch, rows]"
        if mask is not None and mask.device != pixel_values.device:
            return f"{self.mask_name} is on {mask.device}, pixel_values on {pixel_values.device}"
        return None

    def _fused(
        self, derived: Derived, pixel_values: Tensor, sizes: Sizes, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        parts = []
        for images in together(sizes.lengths, derived.ops.images_at_once(pixel_values.device, tokens=1)):
            some = sizes._replace(shapes=sizes.shapes[images])
            kept = self._hidden_states(kwargs, self.config.num_hidden_layers)
            outputs = self._run(derived, pixel_values[images], some, kept and kept.collect)
            parts.append((*outputs, kept and tuple(kept.kept)))
        return in_asked_form(BaseModelOutputWithPooling(*joined(parts)), self.config, kwargs)

    def _run(
        self, derived: Derived, pixel_values: Tensor, sizes: Sizes, collect: Callable[[Tensor], None] | None
    ) -> Outputs:
        B, N, _ = pixel_values.shape
        outputs = None if collect else self._replayed(derived, pixel_values, sizes)
        if outputs is None:
            pack = functools.cache(functools.partial(self._pack, derived, sizes))

            def padded(x: Tensor) -> None:
                rows = pack().out_rows
                collect((x if rows is None else x.index_select(0, rows)).view(B, N, -1))

            told_by = *sizes.shapes, N
            outputs = derived.run_sizes(pixel_values.flatten(0, 1), told_by, pack, collect and padded)
        return outputs.last_hidden_state.view(B, N, -1), outputs.pooler_output

    def _example(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        weight = self._patch_weight()
        shapes = torch.ones(1, 2, dtype=torch.int64)
        return (weight.new_zeros(1, 1, weight.shape[1]), torch.ones(1, 1, device=weight.device), shapes), {}

    def _counts(self, sizes: Sizes) -> tuple[int, int]:
        return int(sizes.queries.sum()), len(sizes.shapes)

    def _call(self, derived: Derived, pixel_values: Tensor, sizes: Sizes) -> Call:
        packing = with_own_positions(self._pack(derived, sizes, in_packed_rows=True))
        rows = pixel_values.flatten(0, 1)
        if packing.rows is not None:
            rows = rows.index_select(0, packing.rows)
        tight = packing._replace(rows=None, out_rows=None)
        return Call(rows, tight, packing.out_rows, has_own_positions=True)

    def _pack(self, derived: Derived, sizes: Sizes, in_packed_rows: bool = False) -> Packing:
        """The head's images are told by the rows of last_hidden_state as stock has it, or `in_packed_rows`."""
        N, lengths, device = sizes.padded_to, sizes.lengths, self._patch_weight().device
        B, is_padded, queries = len(lengths), lengths < N, sizes.queries
        order = np.argsort(-lengths, kind="stable")  # images of equal length side by side: they attend in one call
        first = np.empty_like(lengths)
        first[order] = np.cumsum(queries[order]) - queries[order]
        upload = Upload()
        positions = derived.kept(NaflexPositions, self._tower.embeddings)
        table, offsets = positions.of(sizes.shapes)
        index = ranges(offsets[order], queries[order])
        padding = (first + lengths)[is_padded]
        index[padding] = offsets[is_padded]  # where stock puts them: at the position of the first patch
        index = upload.add(index[:, None])
        segments = add_segments(upload, first[order], queries[order], lengths[order], self._tile_rows(derived))
        starts = np.arange(B) * N
        of_images = (first, queries) if in_packed_rows else (starts, np.full(B, N))
        images = add_segments(upload, *of_images, lengths)
        rows = upload.add(ranges(starts[order], queries[order]))
        places = np.minimum(np.arange(N), lengths[:, None]) + first[:, None]
        out_rows = upload.add(places.reshape(-1))
        upload.send(device)
        is_whole = not is_padded.any()
        return Packing(
            segments=segments(),
            position=Position(table, index()),
            rows=None if is_whole else rows(),
            out_rows=None if is_whole else out_rows(),
            images=images(),
        )


class Siglip2VisionModel(Built, Siglip2Tower, transformers.Siglip2VisionModel):
    """`transformers.Siglip2VisionModel` (same constructor, parameters, state dict and outputs), made fast.

    A forward that needs no gradients runs on the fused operations of `siglip_fast.ops`. Where they do not apply, the
    stock forward runs and the reason is logged once; `why_not` tells it beforehand.

    Args:
        config: as for the stock class.
        backend, strict, batch_invariant: as of `siglip_fast.SiglipVisionModel`.

    Raises:
        ValueError: the backend's name is unknown, or SIGLIP_FAST_BATCH_INVARIANT neither 0 nor 1.
        TypeError: batch_invariant is no bool.
    """

    anatomy = of_transformers(
        modeling_siglip2, "Siglip2", tower_class=getattr(modeling_siglip2, "Siglip2VisionTransformer", None)
    )


if hasattr(modeling_siglip2, "Siglip2VisionTransformer"):

    class Siglip2VisionTransformer(Siglip2Tower, modeling_siglip2.Siglip2VisionTransformer):
        """The tower of Siglip2Model and Siglip2ForImageClassification until transformers 5.6; see `siglip_fast.apply_to`."""

        anatomy = of_transformers(modeling_siglip2, "Siglip2")
        mask_name = "attention_mask"

        def forward(
            self,
            pixel_values: Tensor,
            attention_mask: Tensor,
            spatial_shapes: Tensor,
            **kwargs: Unpack[TransformersKwargs],
        ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
            """As of the model; the mask has another name here."""
            return super().forward(pixel_values, attention_mask, spatial_shapes, **kwargs)
