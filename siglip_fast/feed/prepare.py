"""From a file or encoded bytes to what the model takes of it."""

from typing import Any

from ..errors import UserError
from .decoders import check_decoder, fastest, resized
from .images import opened, read_image
from .kinds import Inputs, inputs_of
from .recipe import recipe_of


class Prepare:
    """Decodes an image and makes the model's inputs of it, as the model's image processor would; can be pickled, so that
    processes do it.

    Where the processor only resizes, rescales and normalises, `recipe` says so, pixel_values are uint8, and the recipe
    runs the model on them. Else `recipe` is None, and the processor itself makes the inputs.

    Args:
        processor: Hugging Face's, on Pillow.
        decoder: one of `decoders.DECODERS`, or "auto" for the fastest of them here.
        draft: decode JPEGs at a fraction of their size.

    Raises:
        UserError: the decoder cannot be used here, or it or `draft` not with this processor.
    """

    def __init__(self, processor: Any, decoder: str = "pillow", draft: bool = False):
        self.recipe = recipe_of(processor)
        self.milliseconds: dict[str, float] = {}  # of the decoders, where they were measured
        self._processor, self._draft = processor, draft
        if self.recipe is None and (draft or decoder not in ("pillow", "auto")):
            option = "--draft" if draft else f"--decoder {decoder}"
            raise UserError(f"{option}: the model's image processor does more than resize, rescale and normalise")
        if self.recipe is None:
            decoder = "pillow"
        if decoder == "auto":
            decoder, self.milliseconds = fastest(self.recipe)
        check_decoder(decoder)
        self.decoder = decoder

    def __call__(self, source: str | bytes) -> Inputs:
        """Of one image, without the batch axis. Raises whatever Pillow raises on what is no whole image."""
        if self.recipe is None:
            return inputs_of(read_image(source), self._processor)
        with opened(source) as image:
            return self.recipe.inputs(resized(image, self.recipe, self.decoder, self._draft))
