"""From an opened image to resized pixels, by one of several libraries: Pillow alone, or what is faster where it can be had.

    pillow      Pillow decodes and resizes; the pixels that Hugging Face's image processor on Pillow makes, bit for bit
    torch       Pillow decodes, torch's antialiased interpolation resizes: it reads Pillow's memory, by way of Arrow
    simplejpeg  as torch, but libjpeg-turbo decodes JPEGs without Pillow

The last two agree with Pillow to one level of 255 (docs/feed.md has where, and the rare exception).
"""

import functools
import io
import statistics
import time
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ..errors import UserError, first_line
from .images import to_rgb
from .recipe import Recipe

DECODERS = ("pillow", "torch", "simplejpeg")
JPEG = ("JPEG", "MPO")  # the latter is a JPEG with further ones behind it
TORCH_MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
# These treat both sides of a pixel alike, so that it is the same to mirror an image before or after they resized it.
SYMMETRIC = (*TORCH_MODES, Image.Resampling.LANCZOS, Image.Resampling.HAMMING)


class Orientation(NamedTuple):
    """How stored pixels become upright: by a transposition, then by mirroring axes of `[3, height, width]`."""

    method: Image.Transpose | None
    transposes: bool
    flips: tuple[int, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.transpose(1, 2) if self.transposes else pixels).flip(self.flips).contiguous()


UPRIGHT = Orientation(None, False, ())
ORIENTATIONS = {  # by their number in EXIF
    2: Orientation(Image.Transpose.FLIP_LEFT_RIGHT, False, (2,)),
    3: Orientation(Image.Transpose.ROTATE_180, False, (1, 2)),
    4: Orientation(Image.Transpose.FLIP_TOP_BOTTOM, False, (1,)),
    5: Orientation(Image.Transpose.TRANSPOSE, True, ()),
    6: Orientation(Image.Transpose.ROTATE_270, True, (2,)),
    7: Orientation(Image.Transpose.TRANSVERSE, True, (1, 2)),
    8: Orientation(Image.Transpose.ROTATE_90, True, (1,)),
}


def resized(image: Image.Image, recipe: Recipe, decoder: str = "pillow", draft: bool = False) -> Tensor:
    """The pixels of an opened image, upright and RGB, of the size that the recipe wants: uint8 `[3, height, width]`.

    With `draft` a JPEG is decoded at a fraction of its size, of at least twice the wanted one.
    Raises whatever Pillow raises on what is no whole image, whatever the decoder.
    """
    if decoder != "pillow":
        Image.core.set_use_block_allocator(1)  # of one piece, which Arrow needs: a setting of the whole process
    if image.format not in JPEG:
        image.load()  # the orientation of a PNG may lie behind its pixels; a TIFF is turned by Pillow
    orientation = ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation), UPRIGHT)
    turn = -1 if orientation.transposes else 1
    height, width = recipe.target(*image.size[::-turn])[::turn]  # as stored
    box = _draft(image, (2 * width, 2 * height)) if draft and image.format in JPEG else None
    shrinks = image.width >= width and image.height >= height  # else torch's fewer bits show
    if decoder == "pillow" or not shrinks or recipe.resample not in TORCH_MODES:
        return _by_pillow(_rgb(image, recipe), orientation, (width, height), recipe.resample, box)
    return _by_torch(_decoded(image, decoder, recipe), orientation, (width, height), recipe.resample, box)


def _draft(image: Image.Image, size: tuple[int, int]) -> tuple[float, float] | None:
    """Has a JPEG decoded at a fraction of its size, of at least `size`. Returns width and height of what the image takes of
    the decoded pixels, which were rounded up, or None where nothing was gained."""
    whole, (_, box) = image.size, image.draft(None, size) or (None, None)
    return None if image.size == whole else box[2:]


def _by_pillow(
    image: Image.Image, orientation: Orientation, size: tuple[int, int], resample: int, box: tuple[float, float] | None
) -> Tensor:
    """`size` is width and height as stored, `box` that of `_draft`."""
    if box is None and (orientation.transposes or (orientation.flips and resample not in SYMMETRIC)):
        # Transposed later, rows would have been resized before columns: up to eight levels.
        image = image.transpose(orientation.method)
        size, orientation = size[:: -1 if orientation.transposes else 1], UPRIGHT
    image = image.resize(size, resample, box and (0, 0, *box))
    planes = bytearray().join(image.tobytes("raw", channel) for channel in "RGB")
    return orientation(torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width))


def _by_torch(
    pixels: Tensor, orientation: Orientation, size: tuple[int, int], resample: int, box: tuple[float, float] | None
) -> Tensor:
    """As `_by_pillow`, of `[H, W, 3 or 4]`."""
    (H, W, _), (width, height) = pixels.shape, size
    images = pixels.permute(2, 0, 1)[None]
    resize = functools.partial(torch.nn.functional.interpolate, mode=TORCH_MODES[resample], antialias=True)
    if box is not None and box != (W, H):
        images = resize(images, scale_factor=(height / box[1], width / box[0]), recompute_scale_factor=False)
    else:
        if box is None and _columns_first(H, W, height, width, orientation):
            images = resize(images, (height, W))
        images = resize(images, (height, width))
    return orientation(images[0, :3])


def _columns_first(height: int, width: int, to_height: int, to_width: int, orientation: Orientation) -> bool:
    """Whether Pillow, given the image upright, would resize what are columns here before rows; torch does rows first.
    What lies between the two steps is rounded, so that the order tells by up to six levels."""
    if orientation.transposes:
        height, width, to_height, to_width = width, height, to_width, to_height
    lost_rows, lost_columns = height - to_height, width - to_width
    pillow = _pillow_has_an_order() and lost_rows > 0 and lost_rows > 2 * lost_columns
    return pillow != orientation.transposes


@functools.cache
def _pillow_has_an_order() -> bool:
    return int(PIL.__version__.split(".")[0]) >= 13  # before, rows were always first


def _decoded(image: Image.Image, decoder: str, recipe: Recipe) -> Tensor:
    """uint8 `[H, W, 3]`, or `[H, W, 4]` of which the last channel means nothing; as stored."""
    if decoder == "simplejpeg" and image.format in JPEG and image.mode in ("RGB", "L"):
        import simplejpeg

        image.fp.seek(0)
        try:
            return torch.from_numpy(
                simplejpeg.decode_jpeg(image.fp.read(), min_height=image.height, min_width=image.width)
            )
        except ValueError:  # Pillow will say what is wrong with it, or read it all the same
            pass
    return _shared(_rgb(image, recipe))


def _rgb(image: Image.Image, recipe: Recipe) -> Image.Image:
    image = to_rgb(image)
    if recipe.on_white and image.info.get("transparency") is not None:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image


def _shared(image: Image.Image) -> Tensor:
    """Pillow's own memory of an RGB image, `[H, W, 4]`."""
    import pyarrow

    return torch.from_dlpack(pyarrow.array(image).flatten()).view(image.height, image.width, 4)


def missing(decoder: str) -> str | None:
    """Why the decoder cannot be used here, or None."""
    if decoder == "pillow":
        return None
    try:
        if decoder == "simplejpeg":
            import simplejpeg  # noqa: F401
    except ImportError as error:
        return f"{first_line(error)}: pip install -e '.[fast]' in the checkout"
    try:
        Image.core.set_use_block_allocator(1)
        _shared(Image.new("RGB", (5, 3)))
    except Exception as error:  # an old Pillow's images are no Arrow arrays; PILLOW_ALIGNMENT leaves gaps between rows
        return f"Pillow {PIL.__version__} does not share its memory: {first_line(error)}"
    return None


def check_decoder(decoder: str) -> None:
    """Raises UserError where it cannot be used here."""
    if reason := missing(decoder):
        raise UserError(f"--decoder {decoder}: {reason}")


def fastest(recipe: Recipe) -> tuple[str, dict[str, float]]:
    """The decoder that takes the least time on this machine for a JPEG of a megapixel, and the milliseconds of each."""
    jpeg, times = _example(), {decoder: [] for decoder in DECODERS if not missing(decoder)}
    for _ in range(5):
        for decoder, seconds in times.items():
            start = time.perf_counter()
            resized(Image.open(io.BytesIO(jpeg)), recipe, decoder)
            seconds.append(time.perf_counter() - start)
    milliseconds = {decoder: 1e3 * statistics.median(seconds) for decoder, seconds in times.items()}
    return min(milliseconds, key=milliseconds.get), milliseconds


def _example() -> bytes:
    """About as hard to decode as a photograph of 1152×864 pixels: noise without its finest details."""
    coarse = np.random.default_rng(0).integers(0, 256, (216, 288, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((1152, 864), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
