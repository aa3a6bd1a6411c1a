"""vLLM: the plugin that runs its own vision towers on the fused operations (entry point vllm.general_plugins).

Written against vLLM 0.33.0. It puts subclasses in the place of the towers' classes, in vLLM's modules, from which all of its
models with such a tower are built. A tower tells by a log line when it first ran fused; until then nothing is claimed.

What it does not do, and why: an out-of-tree MMEncoderAttention would reach every multimodal model, for a part of the
tower where vLLM already has FlashAttention; and the Transformers backend replaces each Linear, LayerNorm and Conv2d of a
tower from AutoModel by its own, so that the fast class would only ever run stock's forward there.
"""

import importlib
import inspect
import logging
import sys
from typing import NamedTuple

from ..errors import typed_line
from .plugin import plugin

logger = logging.getLogger("siglip_fast")

MODELS = "vllm.model_executor.models"


class Tower(NamedTuple):
    module: str  # of MODELS
    name: str  # of the class, there and in the module here
    ours: str  # of siglip_fast.models
    arguments: tuple[str, ...]  # of its forward


TOWERS = (
    Tower(
        *("siglip", "SiglipVisionTransformer", "vllm_siglip"),
        ("self", "pixel_values", "interpolate_pos_encoding", "select_layers", "feature_select_strategy"),
    ),
    Tower(
        *("lfm2_siglip2", "Siglip2VisionTransformer", "vllm_siglip2"),
        ("self", "pixel_values_packed", "spatial_shapes", "cu_seqlens", "max_seqlen", "select_layers"),
    ),
    Tower(*("qwen3_vl", "Qwen3_VisionTransformer", "vllm_qwen3_vl"), ("self", "x", "grid_thw", "encoder_metadata")),
)


@plugin("vLLM")
def register() -> None:
    """Replaces the classes in vLLM's modules; one that is not as expected is left, and if all are so, this raises."""
    failures = {}
    for tower in TOWERS:
        try:
            _replace(tower)
        except Exception as error:
            failures[tower.name] = error
    if len(failures) == len(TOWERS):
        raise failures[TOWERS[0].name]
    for name, error in failures.items():
        logger.warning("vLLM's %s is left as it was: %s", name, typed_line(error))


def _replace(tower: Tower) -> None:
    stock = getattr(importlib.import_module(f"{MODELS}.{tower.module}"), tower.name)
    arguments = tuple(inspect.signature(stock.forward).parameters)
    if arguments != tower.arguments:
        raise TypeError(f"{tower.name}.forward takes {list(arguments)}, expected {list(tower.arguments)}")
    fast = getattr(importlib.import_module(f"siglip_fast.models.{tower.ours}"), tower.name)
    for name, module in [*sys.modules.items()]:  # others have imported the class by its name
        if name.startswith(f"{MODELS}.") and vars(module).get(tower.name) is stock:
            setattr(module, tower.name, fast)
