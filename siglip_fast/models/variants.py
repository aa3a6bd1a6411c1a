"""Vision configs: those of the published SigLIP and SigLIP 2 towers, by name such as "base-patch16-224" or
"base-patch16-naflex", and a checkpoint's."""

import os
import re
from argparse import Namespace

from transformers import PretrainedConfig, Siglip2VisionConfig, SiglipVisionConfig

from ..errors import UserError, first_line

_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
_FAMILIES = {  # name: the fields, and the image sizes
    "base-patch16": (768, 12, 12, 3072, 16, (224, 256, 384, 512)),
    "base-patch32": (768, 12, 12, 3072, 32, (256,)),
    "large-patch16": (1024, 24, 16, 4096, 16, (256, 384, 512)),
    "so400m-patch14": (1152, 27, 16, 4304, 14, (224, 384, 448, 896)),
    "so400m-patch16": (1152, 27, 16, 4304, 16, (256, 384, 512)),
    "giant-opt-patch16": (1536, 40, 16, 6144, 16, (256, 384)),
}
VARIANTS: dict[str, dict[str, int]] = {  # for images of one size
    f"{family}-{image_size}": dict(zip(_FIELDS, values, strict=True)) | {"image_size": image_size}
    for family, (*values, image_sizes) in _FAMILIES.items()
    for image_size in image_sizes
}
NAFLEX: dict[str, dict[str, int]] = {  # for images of any size, by patches
    f"{family}-naflex": dict(zip(_FIELDS, _FAMILIES[family][:-1], strict=True)) | {"num_patches": 256}
    for family in ("base-patch16", "so400m-patch16")
}
VisionConfig = SiglipVisionConfig | Siglip2VisionConfig


class UnknownVariantError(ValueError):
    """No published checkpoint has this name."""


def config_for(name: str) -> VisionConfig:
    """The vision config of the published checkpoints called `name`, such as "base-patch16-224" or "base-patch16-naflex".

    Raises:
        UnknownVariantError: there is none; the message lists those that exist.
    """
    if name in NAFLEX:
        return Siglip2VisionConfig(**NAFLEX[name])
    if name not in VARIANTS:
        raise UnknownVariantError(f"unknown variant {name!r}; expected one of {', '.join([*VARIANTS, *NAFLEX])}")
    return SiglipVisionConfig(**VARIANTS[name])


def config_of(name: str) -> VisionConfig:
    """The vision config of a SigLIP or SigLIP 2 checkpoint, a folder or an id on the Hub. Raises UserError, or OSError where there is none."""
    # The Hub would be asked for whatever is no folder, again and again where there is no network.
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.isdir(os.path.dirname(name))
    if not (os.path.isdir(name) or is_hub_id):
        raise UserError(f"{name}: no such folder, and no id on the Hugging Face Hub (OWNER/NAME)")
    config, _ = PretrainedConfig.get_config_dict(name)
    if not config:
        raise UserError(f"{name}: there is no config.json")
    kind = config.get("model_type")
    of_kind = {"siglip": SiglipVisionConfig, "siglip2": Siglip2VisionConfig}.get(
        str(kind).removesuffix("_vision_model")
    )
    if of_kind is None:
        raise UserError(f"{name} is no SigLIP model: its config has model_type {kind!r}")
    return of_kind.from_pretrained(name)


def load_config(args: Namespace) -> VisionConfig:
    """The vision config of `args.model` or `args.random_weights`. Raises UserError where there is none."""
    try:
        return config_of(args.model) if args.model else config_for(args.random_weights)
    except (ValueError, OSError) as error:
        raise UserError(first_line(error)) from error
