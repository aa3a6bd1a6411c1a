"""From a file or encoded bytes to what the model takes of it."""

from typing import Any

from .images import read_image
from .kinds import Inputs, inputs_of


class Prepare:
    """Decodes an image and has the model's image processor make its inputs; can be pickled, so that processes do it."""

    def __init__(self, processor: Any):
        self._processor = processor

    def __call__(self, source: str | bytes) -> Inputs:
        """Of one image, without the batch axis. Raises whatever Pillow raises on what is no whole image."""
        return inputs_of(read_image(source), self._processor)
