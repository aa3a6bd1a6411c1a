"""The two kinds of models and what sets them apart: SigLIP's for images of one size, and SigLIP 2's NaFlex for images of any.

What either is called with are tensors by name, the keyword arguments of its forward; of one image they lack the batch axis.
"""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Siglip2VisionConfig

from ..models.siglip import SiglipVisionModel
from ..models.siglip2 import Siglip2VisionModel
from ..models.variants import VisionConfig

Inputs = dict[str, Tensor]


class FixedSize:
    """Square images of `config.image_size`: `pixel_values [B, C, H, W]`."""

    model = SiglipVisionModel
    processor = "SiglipImageProcessor"
    keeps_aspect = False

    def __init__(self, config: VisionConfig):
        self._config = config

    def settings(self) -> dict[str, Any]:
        """An image processor's, where the model comes without one: what differs from its defaults."""
        return {"size": {"height": self._config.image_size, "width": self._config.image_size}}

    def misfit(self, processor: Any) -> str | None:
        """What is wrong with what the image processor makes for the model, or None."""
        size, made = self._config.image_size, list(inputs_of(Image.new("RGB", (8, 9)), processor)["pixel_values"].shape)
        return None if made[1:] == [size, size] else f"makes {made[1:]} pixels, the model takes {size}²"

    def example(self) -> Inputs:
        """A batch of one image, without content."""
        return {"pixel_values": torch.zeros(1, self._config.num_channels, *[self._config.image_size] * 2)}

    def grids(self, inputs: Inputs) -> list[tuple[int, int]]:
        """How many patches each image is high and wide."""
        B, _, height, width = inputs["pixel_values"].shape
        return [(height // self._config.patch_size, width // self._config.patch_size)] * B


class NaFlex:
    """Images of any size as rows of patches, padded to N of them: `pixel_values [B, N, C·p·p]`, `pixel_attention_mask [B, N]`
    and `spatial_shapes [B, 2]`."""

    model = Siglip2VisionModel
    processor = "Siglip2ImageProcessor"
    keeps_aspect = True

    def __init__(self, config: VisionConfig):
        self._config = config

    def settings(self) -> dict[str, Any]:
        """As of FixedSize."""
        return {"patch_size": self._config.patch_size, "max_num_patches": self._config.num_patches}

    def misfit(self, processor: Any) -> str | None:
        """As of FixedSize."""
        p, rows = self._config.patch_size, processor.max_num_patches
        if processor.patch_size != p:
            return f"makes patches of {processor.patch_size}² pixels, the model takes {p}²"
        longer = Image.new("RGB", (p * (rows + 1), p))
        made = len(inputs_of(longer, processor)["pixel_values"])
        return None if made == rows else f"makes {made} patches of an image, for a max_num_patches of {rows}"

    def example(self) -> Inputs:
        """As of FixedSize: of as many patches as the position embedding has, none of them padding."""
        p, N = self._config.patch_size, self._config.num_patches
        return {
            "pixel_values": torch.zeros(1, N, self._config.num_channels * p * p),
            "pixel_attention_mask": torch.ones(1, N, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[math.isqrt(N)] * 2]),
        }

    def grids(self, inputs: Inputs) -> list[tuple[int, int]]:
        """As of FixedSize."""
        return [(height, width) for height, width in inputs["spatial_shapes"].tolist()]


def kind_of(config: VisionConfig) -> FixedSize | NaFlex:
    return (NaFlex if isinstance(config, Siglip2VisionConfig) else FixedSize)(config)


def inputs_of(image: Image.Image, processor: Any) -> Inputs:
    """One RGB image as the model takes it, without the batch axis."""
    # The format is told because an image 1 or 3 pixels high would be taken for one with its channels first.
    processed = processor(image, return_tensors="pt", input_data_format="channels_last")
    return {name: values[0] for name, values in processed.items()}


def batch_of(images: list[Inputs]) -> Inputs:
    return {name: torch.stack([image[name] for image in images]) for name in images[0]}
