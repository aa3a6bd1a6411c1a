"""The drop-in: `transformers.SiglipVisionModel` with a fused inference forward."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip import modeling_siglip
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..forward import Outputs
from ..ops import DTYPES
from ..running.traced import forward as traced_forward
from ..running.uint8 import Normalization
from .anatomy import of_transformers
from .base import Built
from .captured import Captured
from .outputs import HiddenStates, asked_for, in_asked_form
from .position import position_of
from .reasons import attention_reasons, keyword_reasons
from .traced import Traced
from .uint8 import TakesUint8
from .weights import Derived


class SiglipTower(Traced, Captured, TakesUint8):
    """What makes a SigLIP vision tower of transformers fast: mixed into the stock class, before it."""

    returns_hidden_states = True  # whether stock's forward does, when asked

    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """`pixel_values [B, C, H, W]` → `last_hidden_state [B, N, D]` and `pooler_output [B, D]` (None without head).

        With `output_hidden_states` also `hidden_states`: the residual stream `[B, N, D]` before the first layer and
        after each, before the last LayerNorm. Keyword arguments, dtypes and the tuple form are those of the stock class.

        Raises:
            TypeError: pixel_values are no tensor.
            ValueError: pixel_values have the wrong rank or channels, or a size that the position embedding does not
                fit and `interpolate_pos_encoding` was not asked for.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        compiling = torch.compiler.is_compiling()
        if compiling and torch.compiler.is_exporting():  # an exported program should not need this package
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        if compiling:
            derived, reason = self._route(pixel_values, interpolate_pos_encoding, **kwargs)
            outputs = None if reason else traced_forward(self, pixel_values, interpolate_pos_encoding)
        else:
            derived, reason, outputs = self._route_while_replaying(pixel_values, interpolate_pos_encoding, **kwargs)
        if reason is not None:
            self._delegate(reason)
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        if outputs is not None:
            return self._output(outputs, kwargs)
        return self._fused(derived, pixel_values, interpolate_pos_encoding, kwargs)

    _own_forward = forward  # without what a subclass or a hook puts around it

    @property
    def _tower(self) -> nn.Module:
        return self._modules.get("vision_model", self)  # nested until transformers 5.6

    def _request_reasons(self, interpolate_pos_encoding: bool = False, **kwargs) -> Iterator[str]:
        # ModernVBERT passes a patch_attention_mask, which no attention of transformers reads
        yield from keyword_reasons(self.config, kwargs, ignored=("patch_attention_mask",))
        if asked_for("output_hidden_states", self.config, kwargs):
            if not self.returns_hidden_states or torch.compiler.is_compiling():
                yield "output_hidden_states was asked for"
            elif getattr(self.config, "tie_last_hidden_states", None):
                yield "the config ties the last of the hidden states to last_hidden_state"
        yield from attention_reasons(self._tower)

    def _fused(
        self,
        derived: Derived,
        pixel_values: Tensor,
        interpolate: bool,
        kwargs: dict[str, Any],
        normalize: Normalization | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """The output, on the operations; pixel_values are uint8 where they have yet to be normalised."""
        asked = asked_for("output_hidden_states", self.config, kwargs)
        hidden_states = HiddenStates.asked_for(asked, self.config.num_hidden_layers + 1) if asked else None
        if derived.is_new:
            self._first_contact(derived, pixel_values)
        if not (asked or normalize) and (outputs := self._replayed(derived, pixel_values, interpolate)):
            return self._output(outputs, kwargs)
        position = position_of(self._tower.embeddings, pixel_values, interpolate)
        if normalize is None and pixel_values.dtype not in DTYPES:
            pixel_values = pixel_values.to(position.dtype)
        outputs = derived.run(pixel_values, position, hidden_states, normalize)
        return self._output(outputs, kwargs, hidden_states and tuple(hidden_states.kept))

    def _output(
        self, outputs: Outputs, kwargs: dict[str, Any], hidden_states: tuple[Tensor | None, ...] | None = None
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        return in_asked_form(BaseModelOutputWithPooling(*outputs, hidden_states), self.config, kwargs)


class SiglipVisionModel(Built, SiglipTower, transformers.SiglipVisionModel):
    """`transformers.SiglipVisionModel` (same constructor, parameters, state dict and outputs), made fast.

    A forward that needs no gradients runs on the fused operations of `siglip_fast.ops`. Where they do not apply, the
    stock forward runs and the reason is logged once; `why_not` tells it beforehand.

    Args:
        config: as for the stock class.
        backend: "auto", "triton", "cpu" or "torch" (`siglip_fast.backends`). Default: the environment variable
            SIGLIP_FAST_BACKEND, else "auto".
        strict: raise RuntimeError with the reason instead of running the stock forward (not under torch.export,
            where the stock forward is always the one that is traced).
        batch_invariant: each image gets the same bits alone, in any batch, at any place of it, and from a CUDA graph of
            a larger one (docs/batch-invariance.md has what it costs). For the fused forward, on one machine, with one
            number of threads: where stock's runs instead nothing is promised, and the log line says so. Default: the
            environment variable SIGLIP_FAST_BATCH_INVARIANT (0 or 1), else False.

    Raises:
        ValueError: the backend's name is unknown, or SIGLIP_FAST_BATCH_INVARIANT neither 0 nor 1.
        TypeError: batch_invariant is no bool.
    """

    anatomy = of_transformers(
        modeling_siglip, "Siglip", tower_class=getattr(modeling_siglip, "SiglipVisionTransformer", None)
    )


if hasattr(modeling_siglip, "SiglipVisionTransformer"):

    class SiglipVisionTransformer(SiglipTower, modeling_siglip.SiglipVisionTransformer):
        """The tower of SiglipModel and SiglipForImageClassification until transformers 5.6; see `siglip_fast.apply_to`."""

        anatomy = of_transformers(modeling_siglip, "Siglip")
        returns_hidden_states = False  # the model around it collects them
