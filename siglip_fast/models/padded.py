"""Towers whose images are padded to one size, under a mask of their patches: Idefics' and their kin.

Where nothing is padded they are towers for images of one size. Where something is, patches are packed, one image's behind
another's. Padded patches are outputs too, and see the image's own: where all pixels that pad an image are alike, so are
these rows, and one more row for the image gives them all; else each of them is a row. Nothing attends to such a row.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends.select import is_capturing
from ..backends.torch import flat_patches
from ..forward import Outputs, Packing
from ..ops import Position
from ..running.packing import Upload, add_segments
from .base import Built
from .outputs import in_asked_form
from .packed import Sized, joined, together
from .reasons import autocast_dtype
from .resized import NearestPositions, nearest
from .weights import Derived


class Images(NamedTuple):
    """Those of a call, some of which are padded."""

    pixel_rows: Tensor  # [B, N, K], of all N patches
    shapes: np.ndarray  # int64 [B, 2], height and width of each image in patches
    alike: np.ndarray  # bool [B]: whether all pixels that pad it are
    padded_to: tuple[int, int]  # patches

    @property
    def lengths(self) -> np.ndarray:
        return self.shapes.prod(1)

    def __getitem__(self, images: slice) -> "Images":
        return self._replace(pixel_rows=self.pixel_rows[images], shapes=self.shapes[images], alike=self.alike[images])


class PaddedTower(Built, Sized):
    """What makes such a tower fast: mixed into the stock class, before it."""

    output_class: type  # of stock's forward
    unpadded_reason: str | None = None  # why stock's code has to run where nothing is padded

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs) -> Any:
        """`pixel_values [B, C, H, W]`, `patch_attention_mask` bool `[B, H/p, W/p]`, true in the patches of the image, which
        are the first of the first rows → `last_hidden_state [B, N, D]`, of a tower with a head `pooler_output [B, D]`.

        With `output_hidden_states` also `hidden_states`: the residual stream `[B, N, D]` before the first layer and after
        each. Padded rows are those of stock. The output's class and its tuple form are those of the stock class.

        Raises:
            TypeError: pixel_values are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        if not torch.compiler.is_exporting():
            derived, reason, images = self._route_sizes(pixel_values, patch_attention_mask, **kwargs)
            if reason is None:
                run = self._run if images is None else self._run_padded
                return self._output(*run(derived, pixel_values if images is None else images, kwargs), kwargs)
            self._delegate(reason)
        return super().forward(pixel_values, patch_attention_mask=patch_attention_mask, **kwargs)

    def _call_reasons(
        self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs
    ) -> Iterator[str]:
        yield from super()._call_reasons(pixel_values, patch_attention_mask, **kwargs)
        # What is wrong with these stock's code is to say.
        weight, mask = self._patch_weight(), patch_attention_mask
        if weight is None:
            return  # the tower has a reason
        p = weight.shape[-1]
        if pixel_values.ndim != 4 or pixel_values.shape[1] != weight.shape[1] or min(pixel_values.shape[2:]) < p:
            yield f"pixel_values have the shape [batch, {', '.join(map(str, pixel_values.shape[1:]))}]"
            return
        if pixel_values.dtype != weight.dtype:
            yield f"pixel_values are {pixel_values.dtype}, the weights {weight.dtype}"
        B, _, height, width = pixel_values.shape
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, height // p, width // p)):
            yield "patch_attention_mask is not bool, or not of the images' patches"
        elif mask is not None and mask.device != pixel_values.device:
            yield f"patch_attention_mask is on {mask.device}, pixel_values on {pixel_values.device}"

    def _request_reasons(self, patch_attention_mask: Tensor | None = None, **kwargs) -> Iterator[str]:
        if torch.compiler.is_compiling():
            yield "torch.compile traces"
        if patch_attention_mask is not None and is_capturing(patch_attention_mask):
            yield "a mask cannot be read inside a CUDA graph"
        yield from self._setting_reasons(kwargs)

    def _read(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs) -> Images | str | None:
        """None where nothing is padded."""
        mask = patch_attention_mask
        if mask is None:
            return self.unpadded_reason
        B, rows, columns = mask.shape
        heights, widths = mask[:, :, 0].sum(1), mask[:, 0].sum(1)
        at = [torch.arange(n, device=mask.device) for n in (rows, columns)]
        inside = (at[0] < heights[:, None])[:, :, None] & (at[1] < widths[:, None])[:, None]
        # The one time that the host waits where nothing is padded.
        *numbers, fits = torch.cat([heights, widths, (mask == inside).all()[None]]).tolist()
        shapes = np.array(numbers).reshape(2, B).T
        if not fits or not shapes.all():
            return "patch_attention_mask is not true for exactly a rectangle in the upper left of each image"
        if (shapes == (rows, columns)).all():
            return self.unpadded_reason
        if reason := self._padded_reason(mask.device):
            return reason
        pixel_rows = flat_patches(pixel_values, self._patch_weight().shape[-1])
        first = torch.where(widths < columns, widths, heights * columns)
        *alike, finite = torch.cat(_padding(pixel_rows, inside.flatten(1), first)).tolist()
        if not finite:
            return "images are padded with pixels that are not finite"
        return Images(pixel_rows, shapes, np.array(alike), (rows, columns))

    def _padded_reason(self, device: torch.device) -> str | None:
        """Why stock's code has to run where something is padded."""
        if dtype := autocast_dtype(device):
            return f"autocast to {dtype} is active, on padded images"
        if (name := self.config._attn_implementation) != "sdpa":  # FlashAttention gives padded rows zeros
            return f"attention implementation {name!r} was asked for, on padded images"
        return None

    def _run(self, derived: Derived, pixel_values: Tensor, kwargs: dict[str, Any]) -> tuple[Outputs, Any]:
        """The outputs, and the hidden states, if they were asked for, of images that are not padded."""
        position = self._position(derived, pixel_values)
        kept = self._hidden_states(kwargs, self.config.num_hidden_layers)
        outputs = derived.run(pixel_values, position, kept)
        return outputs, kept and tuple(kept.kept)

    def _position(self, derived: Derived, pixel_values: Tensor) -> Tensor:
        """Of images of one size that are not padded, `[N, D]`."""
        height, width = (side // self._patch_weight().shape[-1] for side in pixel_values.shape[2:])
        if is_capturing(pixel_values):  # where what is to be kept cannot be made
            return nearest(self.embeddings, height, width)
        table, (begin,) = derived.kept(NearestPositions, self.embeddings).of([(height, width)])
        return table[begin : begin + height * width]

    def _run_padded(self, derived: Derived, images: Images, kwargs: dict[str, Any]) -> tuple[Outputs, Any]:
        parts = []
        for some in together(images.lengths, derived.ops.images_at_once(images.pixel_rows.device, tokens=1)):
            parts.append(self._run_together(derived, images[some], kwargs))
        return joined(parts)

    def _run_together(self, derived: Derived, images: Images, kwargs: dict[str, Any]) -> tuple[Outputs, Any]:
        kept = self._hidden_states(kwargs, self.config.num_hidden_layers)
        packing = self._pack(derived, images)
        rows, shape = packing.out_rows, (*images.pixel_rows.shape[:2], -1)
        if derived.weights.head is not None:  # which goes by packed rows
            packing = packing._replace(out_rows=None)
        outputs = derived.run_packed(images.pixel_rows.flatten(0, 1), packing, kept and kept.collect)
        y = outputs.last_hidden_state
        y = (y if packing.out_rows is not None else y.index_select(0, rows)).view(shape)
        states = kept and tuple(x if x is None else x.index_select(0, rows).view(shape) for x in kept.kept)
        return (y, outputs.pooler_output), states

    def _output(self, outputs: Outputs, hidden_states: tuple[Tensor | None, ...] | None, kwargs: dict[str, Any]) -> Any:
        y, pooled = outputs
        pooler = {} if pooled is None else {"pooler_output": pooled}
        output = self.output_class(last_hidden_state=y, **pooler, hidden_states=hidden_states)
        return in_asked_form(output, self.config, kwargs)

    def _pack(self, derived: Derived, images: Images) -> Packing:
        places, first, queries = _places(images)
        positions = derived.kept(NearestPositions, self.embeddings)
        table, offsets = positions.of([*map(tuple, images.shapes.tolist())])
        rows, index = np.empty(queries.sum(), np.int64), np.empty(queries.sum(), np.int64)
        rows[places.reshape(-1)] = np.arange(places.size)
        within = places - first[:, None]
        # Stock has padded patches at the position of the first one.
        index[places] = offsets[:, None] + np.where(within < images.lengths[:, None], within, 0)
        upload, order = Upload(), np.argsort(first)
        ordered = first[order], queries[order], images.lengths[order]
        segments = add_segments(upload, *ordered, self._tile_rows(derived))
        own = add_segments(upload, first, queries, images.lengths) if derived.weights.head is not None else None
        rows, index, out_rows = (upload.add(array) for array in (rows, index[:, None], places.reshape(-1)))
        upload.send(images.pixel_rows.device)
        return Packing(segments(), Position(table, index()), rows(), out_rows=out_rows(), images=own and own())


def _padding(pixel_rows: Tensor, inside: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pixels that are not `inside` `[B, N]` an image: whether they are alike `[B]`, and whether all are finite `[1]`.
    `first` int64 `[B]` is one such patch of each image that has any."""
    B, N, _ = pixel_rows.shape
    example = pixel_rows[torch.arange(B, device=first.device), first.clamp(max=N - 1)]
    alike = ((pixel_rows == example[:, None]).all(-1) | inside).all(1)
    finite = ((pixel_rows.abs() < torch.inf).all(-1) | inside).all()
    return alike, finite[None]


def _places(images: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where among the packed rows each patch is, `[B, N]`, and of each image the first row, and how many it has.

    An image's own patches are the first of its rows, row-major. Images of equal length are side by side: they attend in one call.
    """
    heights, widths = images.shapes.T[:, :, None]
    row, column = np.divmod(np.arange(np.prod(images.padded_to)), images.padded_to[1])
    inside = (row < heights) & (column < widths)  # [B, N]
    lengths, padded = inside.sum(1), (~inside).sum(1)
    queries = lengths + np.where(images.alike, np.minimum(padded, 1), padded)
    order = np.lexsort((queries, -lengths))
    first = np.empty_like(queries)
    first[order] = np.cumsum(queries[order]) - queries[order]
    behind = np.where(images.alike[:, None], 0, np.cumsum(~inside, 1) - 1)
    within = np.where(inside, np.cumsum(inside, 1) - 1, lengths[:, None] + behind)
    return first[:, None] + within, first, queries
