"""Images from files or encoded bytes, upright and in RGB."""

import contextlib
import io
import os
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


@contextlib.contextmanager
def opened(source: str | bytes) -> Iterator[Image.Image]:
    """The image in a file or in encoded bytes, its pixels not decoded yet.

    Raises whatever Pillow raises on what is no image.
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
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError:  # its text has an address in memory where the source is bytes
        raise ValueError("cannot identify an image in it") from None
    with image:
        yield image


def read_image(source: str | bytes) -> Image.Image:
    """The image in a file or in encoded bytes, as RGB, upright.

    Raises whatever Pillow raises on what is no whole image.
    """
    with opened(source) as image:
        ImageOps.exif_transpose(image, in_place=True)  # else an upright image is copied
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image.convert("RGB")`, without a copy of what is RGB; but 16-bit gray is scaled to 8 bits, where Pillow would clip
    it to white. Raises ValueError where no value is defined to be white."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"Pillow mode {image.mode}: pixels without a defined white")
    return image.convert("RGB")
