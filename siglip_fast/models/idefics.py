"""The vision towers of Idefics2, Idefics3 and SmolVLM: SigLIP's without a head, for images of any aspect, padded under a mask.

Aria's is Idefics3's. Classes are made when asked for (`siglip_fast.models.on_demand`).
"""

import types
from typing import get_args

from torch import nn

from .anatomy import of_transformers
from .on_demand import fast_class, on_demand
from .padded import PaddedTower

# Class, here as there → the part of transformers' that it is in
MODULES = {
    "Idefics2VisionTransformer": "idefics2",
    "Idefics3VisionTransformer": "idefics3",
    "SmolVLMVisionTransformer": "smolvlm",
}


def _fast(home: types.ModuleType, stock: type[nn.Module]) -> type[nn.Module]:
    return fast_class(
        PaddedTower,
        stock,
        home=__name__,
        anatomy=of_transformers(home, stock.__name__.removesuffix("VisionTransformer")),
        # BaseModelOutput, or in newer versions the one with a pooler_output, which is None
        output_class=next(c for c in get_args(stock.forward.__annotations__["return"]) if c is not tuple),
    )


__getattr__, installed = on_demand(globals(), MODULES, _fast)
