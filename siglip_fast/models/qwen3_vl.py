"""The vision towers of Qwen3-VL and its descendants: SigLIP's layers with 2-D rotary positions, on packed images and videos.

Rows of pixels come in the order of the merger: those of a square of 2 by 2 patches are neighbours, so four rows side by
side are a view. One frame is one segment of attention. Classes are made when asked for, as each is of another module of
transformers, not all of which every version has.
"""

import copy
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..forward import PackedOutputs, Packing
from ..ops import Position, Rotation
from ..running.grids import Grid, bilinear, frames, places, read
from ..running.packed_graphs import Call
from ..running.packing import Upload, add_segments
from ..running.traced import merging_forward
from .anatomy import Anatomy, Unsupported, check_head_dim, check_tensors, compare, compare_class, descendant, layer_view
from .base import Built
from .captured_packed import CapturedPacked
from .outputs import in_asked_form
from .packed import joined, together
from .rotary import RotaryTable
from .traced import Traced
from .weights import Derived

# Class, here as there → the part of transformers' that it is in
MODULES = {
    "Qwen3VLVisionModel": "qwen3_vl",
    "Qwen3VLMoeVisionModel": "qwen3_vl_moe",
    "Qwen3_5VisionModel": "qwen3_5",
    "Qwen3_5MoeVisionModel": "qwen3_5_moe",
    "Qwen4ExpVisionModel": "qwen4_exp",
    "CohereCompassVisionModel": "cohere_compass",
    "Qwen3OmniMoeVisionEncoder": "qwen3_omni_moe",
}


class Qwen3VLTower(Built, Traced, CapturedPacked):
    """What makes such a tower fast: mixed into the stock class, before it."""

    layers_at = ("blocks",)
    attention_name = "attn"
    # None: stock gives a tuple of the merged rows and the list of features (transformers 4)
    output_class: ClassVar[type[BaseModelOutputWithPooling] | None]

    def forward(
        self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor | list[Tensor], ...]:
        """`hidden_states [M, K]`, the pixels of the M patches of all images and videos, and `grid_thw` int64 `[B, 3]`, frames,
        height and width of each in patches → `last_hidden_state [M, D]`, `pooler_output [M / 4, out]` and, of towers that
        have such, `deepstack_features`, a list of `[M / 4, out]`.

        With `output_hidden_states` also `hidden_states`: the residual stream `[M, D]` before the first layer and after
        each. Keyword arguments, the output's class and its tuple form are those of the stock class. A grid_thw on the CPU
        saves waiting for the device.

        Raises:
            TypeError: hidden_states are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        if torch.compiler.is_exporting():  # an exported program should not need this package
            return super().forward(hidden_states, grid_thw, **kwargs)
        if torch.compiler.is_compiling():
            _, reason = self._route(hidden_states, grid_thw, **kwargs)
            if reason is None:
                return self._output(merging_forward(self, hidden_states, grid_thw), (), kwargs)
        else:
            derived, reason, grids = self._route_sizes(hidden_states, grid_thw, **kwargs)
            if reason is None:
                return self._output(*self._run(derived, hidden_states, grids, kwargs), kwargs)
        self._delegate(reason)
        return super().forward(hidden_states, grid_thw, **kwargs)

    _own_forward = forward  # without what a subclass or a hook puts around it

    def why_not(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs) -> str | None:
        """As of all towers; also what the grids speak against, which are read for it."""
        return super().why_not(hidden_states, grid_thw, **kwargs)

    def _request_reasons(self, grid_thw: Any, **kwargs) -> Iterator[str]:
        yield from self._setting_reasons(kwargs)
        if self.config.spatial_merge_size != self.spatial_merge_size:  # stock goes by the one here, by the other there
            yield f"spatial_merge_size is {self.spatial_merge_size}, by the config {self.config.spatial_merge_size}"

    def _read(self, pixel_values: Tensor, grid_thw: Any, **kwargs) -> list[Grid] | str:
        # What is wrong with these stock's code is to say.
        K = self._patch_weight()[0].numel()
        if pixel_values.ndim != 2 or pixel_values.shape[1] != K or not pixel_values.is_floating_point():
            return f"hidden_states are {pixel_values.dtype}, {list(pixel_values.shape)}, not [rows, {K}]"
        if type(grid_thw) is not Tensor or grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or not len(grid_thw):
            return "grid_thw is no tensor [images, 3]"
        if grid_thw.dtype not in (torch.int64, torch.int32):
            return f"grid_thw is {grid_thw.dtype}"
        grids, merge = read(grid_thw), self.spatial_merge_size
        if any(t < 1 or h < 1 or w < 1 or h % merge or w % merge for t, h, w in grids):
            return f"grid_thw is not positive, or its sides are no multiples of {merge}"
        if (rows := sum(t * h * w for t, h, w in grids)) != len(pixel_values):
            return f"hidden_states have {len(pixel_values)} rows, by grid_thw {rows}"
        return grids

    def _output(
        self, outputs: PackedOutputs, states: tuple[Tensor | None, ...], kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPooling | tuple[Tensor | list[Tensor], ...]:
        if self.output_class is None:
            return outputs.pooler_output, outputs.features
        features = {"deepstack_features": outputs.features} if _has_taps(self) else {}
        output = self.output_class(outputs.last_hidden_state, outputs.pooler_output, **features)
        if states:
            output["hidden_states"] = states  # as stock adds them: behind all others in the tuple form
        return in_asked_form(output, self.config, kwargs)

    def _run(
        self, derived: Derived, pixel_rows: Tensor, grids: list[Grid], kwargs: dict[str, Any]
    ) -> tuple[PackedOutputs, tuple[Tensor | None, ...]]:
        """The outputs, and the hidden states, if they were asked for."""
        lengths = [t * h * w for t, h, w in grids]
        parts, states, begin = [], [], 0
        for images in together(lengths, derived.ops.images_at_once(pixel_rows.device, tokens=1)):
            end = begin + sum(lengths[images])
            kept, rows = self._hidden_states(kwargs, len(self.blocks)), pixel_rows[begin:end]
            outputs = None if kept else self._replayed(derived, rows, grids[images])
            if outputs is None:
                outputs = derived.run_packed(rows, self._pack(derived, grids[images]), kept and kept.collect)
            parts.append(outputs)
            states.append(tuple(kept.kept) if kept else ())
            begin = end
        return joined(parts), joined(states)

    @property
    def multiple_of(self) -> int:
        return self.spatial_merge_size**2

    def _example(self) -> tuple[Tensor, ...]:
        weight, merge = self._patch_weight().flatten(1), self.spatial_merge_size
        return weight.new_zeros(merge**2, weight.shape[1]), torch.tensor([[1, merge, merge]])

    def _counts(self, grids: list[Grid]) -> tuple[int, int]:
        return sum(t * h * w for t, h, w in grids), sum(t for t, _, _ in grids)

    def _call(self, derived: Derived, pixel_rows: Tensor, grids: list[Grid]) -> Call:
        return Call(pixel_rows, self._pack(derived, grids))

    def _pack(self, derived: Derived, grids: list[Grid]) -> Packing:
        place, upload = places(grids, self.spatial_merge_size), Upload()
        align_corners = getattr(self, "interpolation_align_corners", True)  # no attribute until transformers 5.6
        taps = bilinear(place, grids, self.num_grid_per_side, align_corners)
        index, weight, on_device = (upload.add(array) for array in (*taps, place))
        lengths = frames(grids)
        segments = add_segments(upload, np.cumsum(lengths) - lengths, lengths, lengths, self._tile_rows(derived))
        upload.send(self._patch_weight().device)
        table = derived.kept(RotaryTable, self.rotary_pos_emb).of(int(place.max()) + 1)
        learned = self.pos_embed.weight.detach().resolve_neg().contiguous()
        return Packing(segments(), Position(learned, index(), weight()), rotation=Rotation(table, on_device()))

    @property
    def num_features(self) -> int:
        return len(self.deepstack_visual_indexes) if _has_taps(self) else 0


def _has_taps(tower: nn.Module) -> bool:
    return hasattr(tower, "deepstack_visual_indexes")


def _anatomy(stock: type[nn.Module]) -> Anatomy:
    return Anatomy(
        check=lambda tower: _check(tower, stock),
        view=_view,
        patch_embedding=lambda tower: descendant(tower, "patch_embed", "proj"),
        watched=(
            *("config", "spatial_merge_size", "num_grid_per_side", "interpolation_mode", "interpolation_align_corners"),
            "deepstack_visual_indexes",
        ),
    )


def _check(tower: nn.Module, stock: type[nn.Module]) -> None:
    compare_class("blocks", tower.blocks, nn.ModuleList)
    if not len(tower.blocks):
        raise Unsupported("there are no layers")
    fresh = _fresh(stock, tower.config)
    block = fresh.blocks[0]
    if type(block.mlp.act_fn) is not type(ACT2FN["gelu_pytorch_tanh"]):
        raise Unsupported(f"hidden_act is {tower.config.hidden_act!r}, not 'gelu_pytorch_tanh'")
    check_head_dim(block.attn.head_dim)
    if block.attn.head_dim % 4:
        raise Unsupported("head_dim is no multiple of 4")
    for i, own in enumerate(tower.blocks):
        compare(f"blocks.{i}", own, block)
    for name, expected in fresh.named_children():
        if name != "blocks":
            compare(name, tower._modules.get(name), expected)
    _check_settings(tower)
    check_tensors(tower, tower.patch_embed.proj.weight)


def _fresh(stock: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """A tower of one layer, on the meta device."""
    config = copy.deepcopy(config)
    config.depth = 1
    config._attn_implementation = "sdpa"  # whatever else was asked for need not be installed for this
    with torch.device("meta"):
        return stock(config)


def _check_settings(tower: nn.Module) -> None:
    D, (rows, _) = tower.config.hidden_size, tower.pos_embed.weight.shape
    if tower.merger.hidden_size != D * tower.spatial_merge_size**2:
        raise Unsupported(f"spatial_merge_size is {tower.spatial_merge_size}, by the merger another")
    if tower.num_grid_per_side**2 > rows:
        raise Unsupported(f"num_grid_per_side is {tower.num_grid_per_side}, pos_embed has {rows} rows")
    if (mode := getattr(tower, "interpolation_mode", "bilinear")) != "bilinear":
        raise Unsupported(f"interpolation_mode is {mode!r}, not 'bilinear'")
    if _has_taps(tower) and len(tower.deepstack_visual_indexes) != len(tower.deepstack_merger_list):
        raise Unsupported("deepstack_visual_indexes are not one for each merger")
    if _has_taps(tower) and tower.deepstack_visual_indexes and D % 64:
        raise Unsupported("hidden_size is no multiple of 64")  # what moments of rows side by side need


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP, and what it has beside."""
    proj, taps = tower.patch_embed.proj, {}
    if _has_taps(tower):
        indexes = [*tower.deepstack_visual_indexes]
        taps = {i + 1: tower.deepstack_merger_list[indexes.index(i)] for i in range(len(tower.blocks)) if i in indexes}
    return types.SimpleNamespace(
        embeddings=types.SimpleNamespace(patch_embedding=proj, patch_size=proj.kernel_size[-1], num_patches=1),
        encoder=types.SimpleNamespace(layers=[_layer(block) for block in tower.blocks]),
        post_layernorm=None,
        rotates=True,
        merger=_merger(tower.merger),
        taps={layers: _merger(merger) for layers, merger in taps.items()},
    )


def _layer(block: nn.Module) -> types.SimpleNamespace:
    attention = block.attn
    mlp = types.SimpleNamespace(fc1=block.mlp.linear_fc1, fc2=block.mlp.linear_fc2)
    return layer_view((block.norm1, block.norm2), attention.qkv, attention.proj, attention.num_heads, mlp)


def _merger(merger: nn.Module) -> types.SimpleNamespace:
    if hasattr(merger, "ln_q"):  # Qwen3-Omni's names
        return types.SimpleNamespace(norm=merger.ln_q, fc1=merger.mlp[0], fc2=merger.mlp[2])
    return types.SimpleNamespace(norm=merger.norm, fc1=merger.linear_fc1, fc2=merger.linear_fc2)


def installed() -> list[type[nn.Module]]:
    """The fast classes of all towers that the installed transformers has."""
    classes = (getattr(sys.modules[__name__], name, None) for name in MODULES)
    return [cls for cls in classes if cls is not None]


def __getattr__(name: str) -> type[nn.Module]:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    part = MODULES[name]
    try:
        home = importlib.import_module(f"transformers.models.{part}.modeling_{part}")
    except ImportError as error:
        raise AttributeError(f"the installed transformers has no {name}") from error
    return globals().setdefault(name, _fast(home, getattr(home, name)))


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    # Towers with taps return such, but for transformers 4, which has no class for it
    output_class = getattr(home, "BaseModelOutputWithDeepstackFeatures", None)
    if output_class is None and hasattr(home, "BaseModelOutputWithPooling"):
        output_class = BaseModelOutputWithPooling
    members = {
        "__module__": __name__,
        "__doc__": f"transformers' {stock.__name__}, made fast; see `siglip_fast.apply_to`.",
        "anatomy": _anatomy(stock),
        "output_class": output_class,
        "returns_hidden_states": output_class is not None,
    }
    return type(stock.__name__, (Qwen3VLTower, stock), members)
