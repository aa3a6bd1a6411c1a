"""Idefics3's and SmolVLM's vision towers: SigLIP's without a head, for images of any aspect, padded under a mask.

The fused forward applies where nothing is padded. Positions then are the same for all images of a batch, and stock's
own embeddings compute them, with whatever rounding they do it in.
"""

import types
from collections.abc import Iterator
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.smolvlm import modeling_smolvlm

from ..backends.select import is_capturing
from .anatomy import of_transformers
from .base import Built
from .outputs import asked_for, in_asked_form
from .reasons import attention_reasons, keyword_reasons


class IdeficsTower(Built):
    """What makes such a tower fast: mixed into the stock class, before it."""

    output_class: ClassVar[type[BaseModelOutput]]

    def forward(
        self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """`pixel_values [B, C, H, W]`, `patch_attention_mask` bool `[B, H/p, W/p]` → `last_hidden_state [B, N, D]`.

        Raises:
            TypeError: pixel_values are no tensor.
            RuntimeError: `strict` is set and the fused path does not apply, or the backend asked for cannot run here.
        """
        if not torch.compiler.is_exporting():
            derived, reason = self._route(pixel_values, patch_attention_mask, **kwargs)
            if reason is None:
                position = self._position(pixel_values)
                last_hidden_state, _ = derived.run(pixel_values, position)
                output = self.output_class(last_hidden_state=last_hidden_state)
                return in_asked_form(output, self.config, kwargs)
            self._delegate(reason)
        return super().forward(pixel_values, patch_attention_mask=patch_attention_mask, **kwargs)

    def _call_reasons(
        self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs
    ) -> Iterator[str]:
        yield from super()._call_reasons(pixel_values, patch_attention_mask, **kwargs)
        # What is wrong with these stock's code is to say.
        weight, p = self._patch_weight(), self.patch_size
        if weight is None:
            return  # the tower has a reason
        if pixel_values.ndim != 4 or pixel_values.shape[1] != weight.shape[1] or min(pixel_values.shape[2:]) < p:
            yield f"pixel_values have the shape [batch, {', '.join(map(str, pixel_values.shape[1:]))}]"
            return
        if pixel_values.dtype != weight.dtype:
            yield f"pixel_values are {pixel_values.dtype}, the weights {weight.dtype}"
        B, _, height, width = pixel_values.shape
        mask = patch_attention_mask
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, height // p, width // p)):
            yield "patch_attention_mask is not bool, or not of the images' patches"

    def _request_reasons(self, patch_attention_mask: Tensor | None = None, **kwargs) -> Iterator[str]:
        if torch.compiler.is_compiling():
            yield "torch.compile traces"
        yield from keyword_reasons(self.config, kwargs)
        if asked_for("output_hidden_states", self.config, kwargs):
            yield "output_hidden_states was asked for"
        if patch_attention_mask is not None and is_capturing(patch_attention_mask):
            yield "a mask cannot be read inside a CUDA graph"
        elif patch_attention_mask is not None and not patch_attention_mask.all():
            yield "the images are padded (patch_attention_mask is not all true)"
        yield from attention_reasons(self)

    def _position(self, pixel_values: Tensor) -> Tensor:
        """The position embedding `[N, D]` that stock's embeddings add to the patches of such images."""
        embeddings, p = self.embeddings, self.patch_size
        height, width = pixel_values.shape[2] // p, pixel_values.shape[3] // p
        stand_in = types.SimpleNamespace(
            patch_size=p,
            num_patches_per_side=embeddings.num_patches_per_side,
            patch_embedding=lambda pixels: embeddings.position_embedding.weight.new_zeros(
                1, self.config.hidden_size, height, width
            ),
            position_embedding=embeddings.position_embedding,
        )
        mask = torch.ones(1, height, width, dtype=torch.bool, device=pixel_values.device)
        return type(embeddings).forward(stand_in, pixel_values[:1], mask)[0]


def _fast(home: types.ModuleType, prefix: str) -> type[nn.Module]:
    name = f"{prefix}VisionTransformer"
    stock = getattr(home, name)
    members = {
        "__module__": __name__,
        "__doc__": f"transformers' {name}, made fast; see `siglip_fast.apply_to`.",
        "anatomy": of_transformers(home, prefix),
        # BaseModelOutput, or in newer versions the one with a pooler_output, which is None
        "output_class": next(c for c in get_args(stock.forward.__annotations__["return"]) if c is not tuple),
    }
    return type(name, (IdeficsTower, stock), members)


Idefics3VisionTransformer = _fast(modeling_idefics3, "Idefics3")
SmolVLMVisionTransformer = _fast(modeling_smolvlm, "SmolVLM")
