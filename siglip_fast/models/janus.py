"""Janus' vision tower: SigLIP's with the exact GELU, whose pooled output is the first token, normalised once more."""

import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .anatomy import Anatomy, Unsupported, of_transformers
from .on_demand import fast_class, on_demand
from .outputs import in_asked_form
from .tiles import TilesTower

# Class, here as there → the part of transformers' that it is in
MODULES = {"JanusVisionModel": "janus"}


class JanusTower(TilesTower):
    """What makes such a tower fast: mixed into the stock class, before it."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [B, C, H, W]` → `last_hidden_state [B, N, D]` and `pooler_output [B, D]`.

        With `output_hidden_states` also `hidden_states`: the residual stream `[B, N, D]` before the first layer and after
        each. Keyword arguments and the tuple form are those of the stock class.

        Raises:
            TypeError: pixel_values are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        if not torch.compiler.is_exporting():
            derived, reason, _ = self._route_sizes(pixel_values, interpolate_pos_encoding, **kwargs)
            if reason is None:
                kept = self._hidden_states(kwargs, self.config.num_hidden_layers)
                y, _ = self._run(derived, pixel_values, kept, interpolate_pos_encoding)
                output = BaseModelOutputWithPooling(y, self.post_layernorm(y[:, 0]), kept and tuple(kept.kept))
                return in_asked_form(output, self.config, kwargs)
            self._delegate(reason)
        return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)

    def _request_reasons(self, *args, **kwargs) -> Iterator[str]:
        yield from super()._request_reasons(*args, **kwargs)
        rates = self.config.hidden_dropout_rate or self.config.projection_dropout
        if rates and any(type(module) is nn.Dropout and module.training for module in self.modules()):
            yield "dropout is active"


def _anatomy(home: types.ModuleType) -> Anatomy:
    siglips = of_transformers(home, "Janus", activation="gelu")

    def check(tower: nn.Module) -> None:
        if tower.config.use_qk_norm:
            raise Unsupported("use_qk_norm is True")
        siglips.check(tower)

    return siglips._replace(check=check, view=_view)


def _view(tower: nn.Module) -> types.SimpleNamespace:
    """The tower under the names of transformers' SigLIP."""
    return types.SimpleNamespace(
        embeddings=tower.embeddings,
        encoder=types.SimpleNamespace(layers=[_layer(layer) for layer in tower.encoder.layers]),
        post_layernorm=tower.post_layernorm,
        activation="erf",
    )


def _layer(layer: nn.Module) -> types.SimpleNamespace:
    own, norms = layer.self_attn, {"layer_norm1": layer.layer_norm1, "layer_norm2": layer.layer_norm2}
    attention = types.SimpleNamespace(q_proj=own.q_proj, k_proj=own.k_proj, v_proj=own.v_proj)
    attention.out_proj, attention.num_heads = own.projection_layer, own.num_heads
    return types.SimpleNamespace(self_attn=attention, mlp=layer.mlp, **norms)


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    # transformers 4 would record those of layers that the tower has none of
    records = stock._can_record_outputs["hidden_states"] is home.JanusVisionEncoderLayer
    return fast_class(JanusTower, stock, anatomy=_anatomy(home), returns_hidden_states=records)


__getattr__, installed = on_demand(globals(), MODULES, _fast)
