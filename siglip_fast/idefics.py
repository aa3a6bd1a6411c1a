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

from .anatomy import of_transformers
from .backends.select import is_capturing
from .forward import forward
from .fused import Fused, attention_reasons
from .ops import DTYPES


class IdeficsTower(Fused):
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
        derived, reason = self._route(pixel_values, patch_attention_mask, **kwargs)
        if reason is not None:
            self._delegate(reason)
            return super().forward(pixel_values, patch_attention_mask=patch_attention_mask, **kwargs)
        with torch.no_grad():
            position = self._position(pixel_values)
            if pixel_values.dtype not in DTYPES:
                pixel_values = pixel_values.to(position.dtype)
            last_hidden_state, _ = forward(derived.ops, derived.weights, pixel_values, position)
        output = self.output_class(last_hidden_state=last_hidden_state)
        return_dict = kwargs.get("return_dict", getattr(self.config, "return_dict", True))
        return output.to_tuple() if return_dict is False else output

    def _request_reasons(self, patch_attention_mask: Tensor | None = None, **kwargs) -> Iterator[str]:
        if torch.compiler.is_compiling():
            yield "torch.compile traces"
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name, getattr(self.config, name, False)):
                yield f"{name} was asked for"
        if extra := [name for name, value in kwargs.items() if name not in _OWN_KWARGS and value is not None]:
            yield f"the keyword arguments {', '.join(extra)} were given"
        if kwargs.get("return_dict", True) is None:
            yield "return_dict is None, which means different things to different versions of transformers"
        if patch_attention_mask is not None and is_capturing(patch_attention_mask):
            yield "a mask cannot be read inside a CUDA graph"
        elif patch_attention_mask is not None and not patch_attention_mask.all():
            yield "the images are padded (patch_attention_mask is not all true)"
        yield from attention_reasons(self.encoder.layers)

    def _route(self, pixel_values: Tensor, patch_attention_mask: Tensor | None = None, **kwargs):
        # What is wrong with the shapes stock's code is to say.
        weight = self._patch_weight()
        p = self.patch_size
        if isinstance(pixel_values, Tensor) and weight is not None:
            if pixel_values.ndim != 4 or pixel_values.shape[1] != weight.shape[1]:
                return None, f"pixel_values have the shape {list(pixel_values.shape)}"
            B, _, height, width = pixel_values.shape
            grid = (B, height // p, width // p)
            if patch_attention_mask is not None and tuple(patch_attention_mask.shape) != grid:
                return None, f"patch_attention_mask has the shape {list(patch_attention_mask.shape)}"
        return super()._route(pixel_values, patch_attention_mask, **kwargs)

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


_OWN_KWARGS = ("return_dict", "output_attentions", "output_hidden_states")


def _fast(home: types.ModuleType, prefix: str) -> type[nn.Module]:
    name = f"{prefix}VisionTransformer"
    stock = getattr(home, name)
    members = {
        "__module__": __name__,
        "__doc__": f"transformers' {name}, made fast; see `siglip_fast.swap`.",
        "anatomy": of_transformers(home, prefix),
        # BaseModelOutput, or in newer versions the one with a pooler_output, which is None
        "output_class": next(c for c in get_args(stock.forward.__annotations__["return"]) if c is not tuple),
    }
    return type(name, (IdeficsTower, stock), members)


Idefics3VisionTransformer = _fast(modeling_idefics3, "Idefics3")
SmolVLMVisionTransformer = _fast(modeling_smolvlm, "SmolVLM")
