"""Molmo 2's vision tower: SigLIP 2's layers on crops of one size, whose patches come as rows, without a last LayerNorm.

Its caller reads hidden states from the middle and the end, so their means are all that is computed behind the layers.
"""

import functools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..forward import Packing
from ..ops import Position
from ..running.packing import Upload, add_segments
from .anatomy import (
    Anatomy,
    Unsupported,
    check_head_dim,
    check_layers,
    check_tensors,
    compare,
    descendant,
    of_one_layer,
)
from .base import Built
from .on_demand import fast_class, on_demand
from .outputs import in_asked_form
from .packed import Packed, joined, together
from .weights import Derived

# Class, here as there → the part of transformers' that it is in
MODULES = {"Molmo2VisionModel": "molmo2"}


class Molmo2Tower(Built, Packed):
    """What makes such a tower fast: mixed into the stock class, before it."""

    layers_at = ("layers",)

    def forward(
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [B, N, K]`, the N patches of each crop → `last_hidden_state [B, N, D]` and their mean,
        `pooler_output [B, D]`.

        With `output_hidden_states` also `hidden_states`: the residual stream `[B, N, D]` before the first layer and after
        each. Keyword arguments and the tuple form are those of the stock class.

        Raises:
            TypeError: pixel_values are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        if not torch.compiler.is_exporting():
            derived, reason, _ = self._route_sizes(pixel_values, **kwargs)
            if reason is None:
                return self._fused(derived, pixel_values, kwargs)
            self._delegate(reason)
        return super().forward(pixel_values, **kwargs)

    def _request_reasons(self, **kwargs) -> Iterator[str]:
        yield from self._setting_reasons(kwargs)

    def _read(self, pixel_values: Tensor, **kwargs) -> str | None:
        # What is wrong with these stock's code is to say.
        N, K = len(self.positional_embedding), self._patch_weight().shape[1]
        if pixel_values.shape[1:] != (N, K) or not pixel_values.is_floating_point():
            return f"pixel_values are {pixel_values.dtype}, {list(pixel_values.shape)}, not [crops, {N}, {K}]"
        return None

    def _fused(
        self, derived: Derived, pixel_values: Tensor, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        B, N, _ = pixel_values.shape
        parts = []
        for crops in together([N] * B, derived.ops.images_at_once(pixel_values.device, tokens=1)):
            rows, kept = pixel_values[crops], self._hidden_states(kwargs, self.config.num_hidden_layers)
            pack = functools.partial(self._pack, derived, len(rows))
            outputs = derived.run_sizes(rows.flatten(0, 1), len(rows), pack, kept and kept.collect)
            states = kept and tuple(x if x is None else x.view(-1, N, x.shape[-1]) for x in kept.kept)
            y = outputs.last_hidden_state.view(-1, N, outputs.last_hidden_state.shape[-1])
            # torch sums in an order that may depend on how many crops there are
            means = torch.stack([crop.mean(0) for crop in y]) if self.batch_invariant else y.mean(1)
            parts.append((y, means, states))
        return in_asked_form(BaseModelOutputWithPooling(*joined(parts)), self.config, kwargs)

    def _pack(self, derived: Derived, crops: int) -> Packing:
        table, upload = self.positional_embedding.detach().resolve_neg().contiguous(), Upload()
        index = upload.add(np.tile(np.arange(len(table)), crops)[:, None])
        lengths = np.full(crops, len(table))
        segments = add_segments(upload, np.cumsum(lengths) - lengths, lengths, lengths, self._tile_rows(derived))
        upload.send(table.device)
        return Packing(segments(), Position(table, index()))


def _check(tower: nn.Module, stock: type[nn.Module]) -> None:
    expected = of_one_layer(stock, tower.config)
    attention = expected.layers[0].self_attn
    check_layers("layers", tower.layers, expected.layers[0])
    check_head_dim(attention.head_dim)
    if attention.num_key_value_groups != 1:
        raise Unsupported(f"{attention.num_key_value_groups} heads share a key")
    compare("patch_embedding", tower.patch_embedding, expected.patch_embedding)
    if tower.positional_embedding.shape != expected.positional_embedding.shape:
        raise Unsupported(f"positional_embedding has shape {list(tower.positional_embedding.shape)}")
    check_tensors(tower, tower.patch_embedding.weight)


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    embeddings = types.SimpleNamespace(patch_embedding=tower.patch_embedding, patch_size=tower.config.patch_size)
    encoder = types.SimpleNamespace(layers=[_layer(layer) for layer in tower.layers])
    return types.SimpleNamespace(embeddings=embeddings, encoder=encoder, post_layernorm=None)


def _layer(layer: nn.Module) -> types.SimpleNamespace:
    own, norms = layer.self_attn, {"layer_norm1": layer.layer_norm1, "layer_norm2": layer.layer_norm2}
    attention = types.SimpleNamespace(q_proj=own.q_proj, k_proj=own.k_proj, v_proj=own.v_proj, out_proj=own.o_proj)
    attention.num_heads = own.q_proj.out_features // own.head_dim
    return types.SimpleNamespace(self_attn=attention, mlp=layer.mlp, **norms)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    return fast_class(
        Molmo2Tower,
        stock,
        anatomy=Anatomy(
            check=lambda tower: _check(tower, stock),
            view=_view,
            patch_embedding=lambda tower: descendant(tower, "patch_embedding"),
            watched=("config",),
        ),
    )


__getattr__, installed = on_demand(globals(), MODULES, _fast)
