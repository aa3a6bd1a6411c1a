"""vLLM: the plugin that runs its own SigLIP tower on the fused operations (entry point vllm.general_plugins).

Written against vLLM 0.33.0. It puts a subclass in the place of `vllm.model_executor.models.siglip`'s
SiglipVisionTransformer, from which all of its models with a SigLIP tower are built (Gemma 3, PaliGemma, LLaVA, ...).

What it does not do, and why: an out-of-tree MMEncoderAttention would reach every multimodal model, for a part of the
tower where vLLM already has FlashAttention; and the Transformers backend replaces each Linear, LayerNorm and Conv2d of a
tower from AutoModel by its own, so that the fast class would only ever run stock's forward there.
"""

import inspect

from .plugin import plugin

ARGUMENTS = ["self", "pixel_values", "interpolate_pos_encoding", "select_layers", "feature_select_strategy"]


@plugin("vLLM")
def register() -> str:
    """Replaces the class in vLLM's module, or raises and leaves it."""
    from vllm.model_executor.models import siglip

    arguments = list(inspect.signature(siglip.SiglipVisionTransformer.forward).parameters)
    if arguments != ARGUMENTS:
        raise TypeError(f"SiglipVisionTransformer.forward takes {arguments}, expected {ARGUMENTS}")
    from ..models.vllm import FastSiglipVisionTransformer

    siglip.SiglipVisionTransformer = FastSiglipVisionTransformer
    return "its SigLIP vision towers run on fused operations"
