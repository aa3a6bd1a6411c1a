"""The vision towers of MiniCPM-V 4.6 and 4.7 and of MiniCPM-OCR: SigLIP's on images of any size, side by side in one strip.

Behind one of the layers squares of 2 by 2 patches become one, unless the call says otherwise. For that the patches of a square
are neighbours among the packed rows, row-major within it, as the squares are within an image; else patches are row-major.
"""

import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..backends.torch import flat_patches
from ..forward import Packing, Shrink
from ..ops import Position
from ..running.grids import places, read
from ..running.packing import Upload, add_segments
from .anatomy import Anatomy, Unsupported, compare, of_transformers, packed_embeddings
from .base import Built
from .on_demand import fast_class, on_demand
from .outputs import in_asked_form
from .packed import Packed, joined, together
from .resized import ResizedPositions
from .weights import Derived

# Class, here as there → the part of transformers' that it is in
MODULES = {
    "MiniCPMV4_6VisionModel": "minicpmv4_6",
    "MiniCPMV4_7VisionModel": "minicpmv4_7",
    "MiniCPMOcrVisionModel": "minicpm_ocr",
}
SIDE = 2  # of the squares


class Images(NamedTuple):
    """Those of a call."""

    shapes: list[tuple[int, int]]  # height and width in patches
    shrink_after: int | None  # layers
    device: torch.device  # where the shapes were: stock rounds fractions of the sides there

    @property
    def lengths(self) -> np.ndarray:
        return np.array(self.shapes).prod(1)


class MiniCPMTower(Built, Packed):
    """What makes such a tower fast: mixed into the stock class, before it."""

    def forward(
        self,
        pixel_values: Tensor,
        target_sizes: Tensor | None = None,
        use_vit_merger: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [1, C, p, M·p]`, the M patches of all images, and `target_sizes` int32 `[B, 2]`, height and width of each
        in patches → `last_hidden_state [1, M / 4, D]`, or `[1, M, D]` without `use_vit_merger`.

        With `output_hidden_states` also `hidden_states`: the residual stream before the first layer and after each, the
        last one after the LayerNorm. Keyword arguments and the tuple form are those of the stock class. target_sizes on
        the CPU save waiting for the device.

        Raises:
            TypeError: pixel_values are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        args = (pixel_values, target_sizes, use_vit_merger)
        if not torch.compiler.is_exporting():
            derived, reason, images = self._route_sizes(*args, **kwargs)
            if reason is None:
                return self._fused(derived, pixel_values, images, kwargs)
            self._delegate(reason)
        return super().forward(*args, **kwargs)

    def _request_reasons(
        self, target_sizes: Tensor | None = None, use_vit_merger: bool = True, **kwargs
    ) -> Iterator[str]:
        yield from self._setting_reasons(kwargs)

    def _read(
        self, pixel_values: Tensor, target_sizes: Any = None, use_vit_merger: bool = True, **kwargs
    ) -> Images | str:
        # What is wrong with these stock's code is to say.
        weight, shape = self._patch_weight(), tuple(pixel_values.shape)
        C, p = weight.shape[1], weight.shape[-1]
        if shape[:3] != (1, C, p) or len(shape) != 4 or pixel_values.dtype != weight.dtype:
            return f"pixel_values are {pixel_values.dtype}, {list(shape)}, not {weight.dtype}, [1, {C}, {p}, width]"
        if type(target_sizes) is not Tensor or target_sizes.ndim != 2 or target_sizes.shape[1] != 2:
            return "target_sizes are no tensor [images, 2]"
        if not len(target_sizes) or target_sizes.dtype not in (torch.int64, torch.int32):
            return f"target_sizes are {target_sizes.dtype}, of {len(target_sizes)} images"
        after = self.config.insert_layer_id + 1 if use_vit_merger else 0
        after = after if 0 < after <= len(self.encoder.layers) else None
        images = Images(read(target_sizes), after, target_sizes.device)
        if any(side < 1 or (after and side % SIDE) for sides in images.shapes for side in sides):
            return f"target_sizes are not positive, or, with use_vit_merger, no multiples of {SIDE}"
        if shape[3] != p * images.lengths.sum():
            return f"pixel_values have {shape[3] / p:g} patches, by target_sizes {images.lengths.sum()}"
        return images

    def _fused(
        self, derived: Derived, pixel_values: Tensor, images: Images, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        pixel_rows, parts, begin = flat_patches(pixel_values, self._patch_weight().shape[-1])[0], [], 0
        for some in together(images.lengths, derived.ops.images_at_once(pixel_values.device, tokens=1)):
            own = images._replace(shapes=images.shapes[some])
            end = begin + own.lengths.sum()
            parts.append(self._run(derived, pixel_rows[begin:end], own, kwargs))
            begin = end
        y, states = joined(parts)
        states = states and [x if x is None else x[None] for x in states]
        if states and states[-1] is not None and getattr(self.config, "tie_last_hidden_states", None) is not False:
            states[-1] = y[None]
        output = BaseModelOutputWithPooling(y[None], hidden_states=states and tuple(states))
        return in_asked_form(output, self.config, kwargs)

    def _run(
        self, derived: Derived, pixel_rows: Tensor, images: Images, kwargs: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor | None] | None]:
        """last_hidden_state, and the hidden states, if they were asked for."""
        kept = self._hidden_states(kwargs, self.config.num_hidden_layers)
        packing = self._pack(derived, images)
        y = derived.run_packed(pixel_rows, packing, kept and kept.collect).last_hidden_state
        if kept and images.shrink_after:  # those of all patches are row-major in stock
            order = packing.rows.argsort()
            before = [x if x is None else x[order] for x in kept.kept[: images.shrink_after + 1]]
            kept.kept[: images.shrink_after + 1] = before
        return y, kept and kept.kept

    def _pack(self, derived: Derived, images: Images) -> Packing:
        lengths, after, upload = images.lengths, images.shrink_after, Upload()
        first, widths = np.cumsum(lengths) - lengths, np.array(images.shapes)[:, 1]
        table, offsets = derived.kept(Positions, self.embeddings).on(images.device).of(images.shapes)
        row, column = places([(1, *shape) for shape in images.shapes], SIDE if after else 1).T
        within = row * np.repeat(widths, lengths) + column
        rows = upload.add(np.repeat(first, lengths) + within)
        index = upload.add((np.repeat(offsets, lengths) + within)[:, None])

        def segments(lengths: np.ndarray) -> Any:
            return add_segments(upload, np.cumsum(lengths) - lengths, lengths, lengths, self._tile_rows(derived))

        own = segments(lengths)
        if after:
            windows, left = segments(np.full(lengths.sum() // SIDE**2, SIDE**2)), segments(lengths // SIDE**2)
        upload.send(self._patch_weight().device)
        position = Position(table, index())
        if not after:
            return Packing(own(), position)
        return Packing(own(), position, rows(), shrink=Shrink(after, windows(), left()))


class Positions:
    """Those that embeddings have for images of each size, as stock computes them where the sizes are: devices round otherwise."""

    def __init__(self, embeddings: nn.Module):
        self._embeddings = embeddings
        self._by_device: dict[torch.device, _OnDevice] = {}

    def on(self, device: torch.device) -> ResizedPositions:
        return self._by_device.setdefault(device, _OnDevice(self._embeddings, device))


class _OnDevice(ResizedPositions):
    def __init__(self, embeddings: nn.Module, device: torch.device):
        super().__init__(embeddings)
        self._device = device

    def _resized(self, sizes: list[tuple[int, int]]) -> Iterator[Tensor]:
        """By stock's own code on patches that are zero."""
        embeddings = self._embeddings
        weight = embeddings.position_embedding.weight
        for height, width in sizes:
            stand_in = types.SimpleNamespace(
                num_patches_per_side=embeddings.num_patches_per_side,
                patch_embedding=lambda pixels, n=height * width: weight.new_zeros(1, weight.shape[1], 1, n),
                position_embedding=embeddings.position_embedding,
            )
            target_sizes = torch.tensor([[height, width]], dtype=torch.int32, device=self._device)
            yield type(embeddings).forward(stand_in, None, target_sizes=target_sizes)[0]


def _anatomy(home: types.ModuleType, prefix: str) -> Anatomy:
    siglips, merger = of_transformers(home, prefix), getattr(home, f"{prefix}ViTWindowAttentionMerger")

    def check(tower: nn.Module) -> None:
        siglips.check(tower)
        with torch.device("meta"):
            compare("vit_merger", tower.vit_merger, merger(tower.config))
        if tower.vit_merger.window_kernel_size != (SIDE, SIDE):
            raise Unsupported(f"window_kernel_size is {tower.vit_merger.window_kernel_size}")
        if tower.config.hidden_size % 64:
            raise Unsupported("hidden_size is no multiple of 64")  # what moments of rows side by side need

    return siglips._replace(check=check, view=_view)


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP, and what it has beside."""
    conv, merger = tower.embeddings.patch_embedding, tower.vit_merger
    shrink = types.SimpleNamespace(
        self_attn=merger.self_attn,
        layer_norm1=merger.layer_norm1,
        layer_norm2=merger.pre_norm,
        mlp=types.SimpleNamespace(fc1=merger.linear_1, fc2=merger.linear_2),
    )
    return types.SimpleNamespace(
        embeddings=packed_embeddings(conv, conv.kernel_size[0]),
        encoder=tower.encoder,
        post_layernorm=tower.post_layernorm,
        shrink=shrink,
    )


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    return fast_class(MiniCPMTower, stock, anatomy=_anatomy(home, stock.__name__.removesuffix("VisionModel")))


__getattr__, installed = on_demand(globals(), MODULES, _fast)
