"""The shapes of the published SigLIP and SigLIP 2 vision towers, by name such as "base-patch16-224"."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import SiglipVisionConfig

# name: hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, patch_size, image sizes
_FAMILIES = {
    "base-patch16": (768, 12, 12, 3072, 16, (224, 256, 384, 512)),
    "base-patch32": (768, 12, 12, 3072, 32, (256,)),
    "large-patch16": (1024, 24, 16, 4096, 16, (256, 384, 512)),
    "so400m-patch14": (1152, 27, 16, 4304, 14, (224, 384, 448, 896)),
    "so400m-patch16": (1152, 27, 16, 4304, 16, (256, 384, 512)),
    "giant-opt-patch16": (1536, 40, 16, 6144, 16, (256, 384)),
}

VARIANTS: dict[str, dict[str, int]] = {
    f"{family}-{image_size}": {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size,
        "patch_size": patch_size,
        "image_size": image_size,
    }
    for family, (hidden_size, layers, heads, intermediate_size, patch_size, image_sizes) in _FAMILIES.items()
    for image_size in image_sizes
}


class UnknownVariantError(ValueError):
    """No published checkpoint has this name."""


def config_for(name: str) -> "SiglipVisionConfig":
    """The vision config of the published checkpoints called `name`, such as "base-patch16-224".

    Raises:
        UnknownVariantError: there is none; the message lists those that exist.
    """
    if name not in VARIANTS:
        raise UnknownVariantError(f"unknown variant {name!r}; expected one of {', '.join(VARIANTS)}")
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**VARIANTS[name])
