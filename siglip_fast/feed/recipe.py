"""What an image processor does, told in numbers, where it does no more than resize, rescale and normalise: what it would
take copies for can then be done without, and its normalisation be left to the device that the model is on."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..models.base import Fused
from ..running.uint8 import Normalization, normalization
from .kinds import Inputs, inputs_of

CHANNELS = 3


@dataclass(frozen=True)
class Recipe:
    """Of either kind of model. Its inputs are those of `kinds`, but that their pixel_values are uint8, yet to be normalised."""

    resample: int  # Pillow's number of a filter
    normalization: Normalization
    on_white: bool  # whether the colour that an RGB image declares to be transparent becomes white

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to."""
        raise NotImplementedError

    def inputs(self, pixels: Tensor) -> Inputs:
        """Of one resized image, uint8 `[3, height, width]`, without the batch axis."""
        raise NotImplementedError

    def ready(self, inputs: Inputs) -> Inputs:
        """A batch of `inputs`, on the model's device, as `run` takes them."""
        return inputs

    def run(self, model: Fused, inputs: Inputs) -> BaseModelOutputWithPooling:
        """The model's output."""
        return model(**inputs)


@dataclass(frozen=True)
class FixedSizeRecipe(Recipe):
    size: tuple[int, int]  # height, width

    def target(self, height: int, width: int) -> tuple[int, int]:
        return self.size

    def inputs(self, pixels: Tensor) -> Inputs:
        return {"pixel_values": pixels}

    def run(self, model: Fused, inputs: Inputs) -> BaseModelOutputWithPooling:
        return model.forward_uint8(inputs["pixel_values"], **self.normalization._asdict())

    @classmethod
    def of(cls, processor: Any) -> "FixedSizeRecipe":
        size = processor.size["height"], processor.size["width"]
        return cls(*_common(processor), tuple(map(int, size)))


@dataclass(frozen=True)
class NaFlexRecipe(Recipe):
    patch_size: int
    max_num_patches: int
    image_size: Callable[..., tuple[int, int]]  # transformers' own, of the processor's module

    def target(self, height: int, width: int) -> tuple[int, int]:
        return self.image_size(height, width, self.patch_size, self.max_num_patches)

    def inputs(self, pixels: Tensor) -> Inputs:
        p = self.patch_size
        height, width = pixels.shape[1] // p, pixels.shape[2] // p
        rows = pixels.view(CHANNELS, height, p, width, p).permute(1, 3, 2, 4, 0).reshape(height * width, -1)
        padded = rows.new_zeros(self.max_num_patches, rows.shape[1])
        padded[: len(rows)] = rows
        return {
            "pixel_values": padded,
            "pixel_attention_mask": (torch.arange(self.max_num_patches) < len(rows)).int(),
            "spatial_shapes": torch.tensor([height, width]),
        }

    def ready(self, inputs: Inputs) -> Inputs:
        """As the image processor makes them: float32, and zero where they are padding."""
        values, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
        by_channel = values.view(len(values), -1, CHANNELS).transpose(1, 2)
        rows = self.normalization(by_channel).transpose(1, 2).reshape(values.shape)
        return inputs | {"pixel_values": rows.masked_fill_(mask[..., None] == 0, 0)}

    @classmethod
    def of(cls, processor: Any) -> "NaFlexRecipe":
        image_size = sys.modules[type(processor).__module__].get_image_size_for_max_num_patches
        return cls(*_common(processor), int(processor.patch_size), int(processor.max_num_patches), image_size)


RECIPES = {"SiglipImageProcessor": FixedSizeRecipe, "Siglip2ImageProcessor": NaFlexRecipe}


def _common(processor: Any) -> tuple[int, Normalization, bool]:
    normalize = normalization(processor.image_mean, processor.image_std, processor.rescale_factor, CHANNELS)
    return int(processor.resample), normalize, _puts_on_white(processor)


def _puts_on_white(processor: Any) -> bool:
    """As transformers 5 does where do_convert_rgb is set, and 4 does not."""
    image = Image.new("RGB", (8, 9))
    opaque = inputs_of(image, processor)["pixel_values"]
    image.info["transparency"] = (0, 0, 0)
    return not torch.equal(inputs_of(image, processor)["pixel_values"], opaque)


def recipe_of(processor: Any) -> Recipe | None:
    """What Hugging Face's image processor does, or None where it is none of transformers' for SigLIP, is set to do something
    else, or was changed so that it does."""
    kind = type(processor)
    made = RECIPES.get(kind.__name__.removesuffix("Pil")) if kind.__module__.startswith("transformers.") else None
    if made is None or not _only_resizes_and_normalizes(processor):
        return None
    try:
        recipe = made.of(processor)
    except (AttributeError, KeyError, TypeError, ValueError):  # settings of another form: a size by its shortest edge
        return None
    return recipe if all(_agrees(recipe, processor, *size) for size in ((40, 70), (1100, 900))) else None


def _only_resizes_and_normalizes(processor: Any) -> bool:
    steps = {name: value for name, value in vars(processor).items() if name.startswith("do_")}
    steps.pop("do_convert_rgb", None)  # its images are RGB
    return {name for name, value in steps.items() if value} == {"do_resize", "do_rescale", "do_normalize"}


def _agrees(recipe: Recipe, processor: Any, height: int, width: int) -> bool:
    """Whether both make the same of an image of noise: settings that nobody here has heard of, and overridden methods."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, CHANNELS), dtype=np.uint8))
    theirs = inputs_of(image, processor)
    target = recipe.target(height, width)
    pixels = torch.from_numpy(np.array(image.resize(target[::-1], recipe.resample)))
    ours = recipe.inputs(pixels.permute(2, 0, 1).contiguous())
    batch = {name: values[None] for name, values in ours.items()}
    batch = recipe.ready(batch)
    if batch["pixel_values"].dtype == torch.uint8:
        batch["pixel_values"] = recipe.normalization(batch["pixel_values"])
    if theirs.keys() != batch.keys():
        return False
    # float32's rounding; a level is a thousand times as much
    atol = 1e-6 / min(map(abs, recipe.normalization.image_std))
    return all(
        values.shape == batch[name][0].shape
        and torch.allclose(values.float(), batch[name][0].float(), rtol=0, atol=atol)
        for name, values in theirs.items()
    )
