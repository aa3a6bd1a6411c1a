"""Phi-4-multimodal's vision tower: SigLIP's with its head, for images of any aspect, padded under a mask.

Its attention calls itself causal. transformers' sdpa is so where it gets no mask, which is where nothing is padded, and not
where something is: such calls are fused, the others are stock's.
"""

import types

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .anatomy import of_transformers
from .on_demand import fast_class, on_demand
from .padded import PaddedTower

# Class, here as there → the part of transformers' that it is in
MODULES = {"Phi4MultimodalVisionModel": "phi4_multimodal"}


def _view(tower: nn.Module) -> types.SimpleNamespace:
    embeddings = types.SimpleNamespace(
        patch_embedding=tower.embeddings.patch_embedding,
        patch_size=tower.embeddings.patch_size,
        num_patches=1,  # nothing is packed for one number of patches: images are fused only where some are smaller
    )
    return types.SimpleNamespace(
        embeddings=embeddings, encoder=tower.encoder, post_layernorm=tower.post_layernorm, head=tower.head
    )


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    return fast_class(
        PaddedTower,
        stock,
        home=__name__,
        anatomy=of_transformers(home, "Phi4Multimodal")._replace(view=_view),
        output_class=BaseModelOutputWithPooling,
        unpadded_reason="its attention is causal where nothing is padded",
    )


__getattr__, installed = on_demand(globals(), MODULES, _fast)
