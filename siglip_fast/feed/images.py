"""Images from files or encoded bytes, upright and in RGB."""

import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


def read_image(source: str | bytes) -> Image.Image:
    """The image in a file or in encoded bytes, as RGB, upright.

    Raises whatever Pillow raises on what is no whole image.
    """
    if not source:
        raise ValueError("empty")
    if isinstance(source, str):
        if source != source.encode(errors="replace").decode():
            raise ValueError("its name is not UTF-8")  # which neither kind of output can hold
        if os.path.exists(source) and not os.path.isfile(source):
            raise ValueError("not a regular file")  # opening a FIFO would wait for ever
        if os.path.getsize(source) == 0:
            raise ValueError("empty")
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError:  # its text has an address in memory where the source is bytes
        raise ValueError("cannot identify an image in it") from None
    with opened as image:
        return to_rgb(ImageOps.exif_transpose(image), image.format)


def to_rgb(image: Image.Image, format: str | None = None) -> Image.Image:
    """`image.convert("RGB")`, but 16-bit gray is scaled to 8 bits, where Pillow would clip it to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"Pillow mode {image.mode}: pixels without a defined white")
    return image.convert("RGB")
