"""`siglip-fast embed`: images in, one embedding each out, as Parquet or .npy.

find_files → embeddings (decode_ahead: threads; Encoder: batches) → a sink, whose file appears whole or not at all
"""

import contextlib
import glob
import io
import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import UserError, first_line, load_model, load_processor, pick_device, pixel_values, route
from .sinks import Sink, open_sink

if TYPE_CHECKING:  # --help needs none of these
    import numpy as np
    import torch
    from PIL.Image import Image


IMAGES, PARQUET = "images", "Parquet files"
SUFFIXES = {  # what a folder is searched for
    IMAGES: frozenset(
        ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
    ),
    PARQUET: frozenset([".parquet"]),
}
ONLY_RAY = (
    "ray_address",
    "ray_actors",
    "part_size",
    "image_column",
    "id_column",
)  # arguments, None if not given


def run(args: Namespace) -> int:
    """The subcommand: embeds `args.paths` into `args.out` and returns the exit status."""
    if args.ray:
        from .integrations import ray

        return ray.run(args)
    if given := [name for name in ONLY_RAY if getattr(args, name) is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is for --ray")
    paths, repeated = find_files(args.paths)
    with open_sink(Path(args.out), args.force) as sink:  # first: a refusal should not take a minute
        encoder = Encoder(args)
        start = time.perf_counter()
        skipped = embed(paths, encoder, sink, args.batch_size, args.workers)
        seconds = time.perf_counter() - start
        embedded = len(paths) - skipped
        if not embedded:
            raise UserError(f"none of the {skipped} images could be used; {args.out} is not written")
    notes = f", {skipped} skipped" * bool(skipped) + f", {repeated} repeated paths left out" * bool(repeated)
    print(f"{embedded} images embedded{notes}; {embedded / seconds:.1f} images/s with decoding")
    print(f"written: {args.out}")
    print(f"ran on: {encoder.route} ({encoder.metadata['dtype']} on {encoder.device})")
    return 1 if skipped else 0


def find_files(patterns: Iterable[str], kind: str = IMAGES) -> tuple[list[str], int]:
    """The files that names, folders and globs stand for, each once, in order; and the number of repeats.

    Of a folder only files of the `kind`, IMAGES or PARQUET, are taken.

    Raises:
        UserError: one of them matches nothing, or a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:  # os.walk leaves such folders out silently
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

    def files_in(folder: str) -> Iterator[str]:
        for parent, folders, names in os.walk(folder, onerror=unreadable):
            folders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in SUFFIXES[kind]:
                    yield os.path.join(parent, name)

    found: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files: list[str] = []
        for match in matches:
            files += files_in(match) if os.path.isdir(match) else [match]
        if not files:
            reason = f"no {kind} in this folder" if matches else "no such file or folder"
            raise UserError(f"{pattern}: {reason}")
        found += files
    unique: dict[str, str] = {}
    for path in found:
        unique.setdefault(os.path.abspath(path), path)
    return list(unique.values()), len(found) - len(unique)


def read_image(source: str | bytes) -> "Image":
    """The image in a file or in encoded bytes, as RGB, upright.

    Raises whatever Pillow raises on what is no whole image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not source:
        raise ValueError("empty")
    if isinstance(source, str):
        source.encode()  # neither kind of output can name a file whose name is not UTF-8
        if os.path.exists(source) and not os.path.isfile(source):
            raise ValueError("not a regular file")  # opening a FIFO would wait for ever
    try:
        opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError:  # its text has an address in memory where the source is bytes
        raise ValueError("cannot identify an image in it") from None
    with opened as image:
        return to_rgb(ImageOps.exif_transpose(image), image.format)


def to_rgb(image: "Image", format: str | None = None) -> "Image":
    """`image.convert("RGB")`, but 16-bit gray is scaled to 8 bits, where Pillow would clip it to white."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"Pillow mode {image.mode}: pixels without a defined white")
    return image.convert("RGB")


def decode_ahead(
    items: Iterable[Any], decode: Callable[[Any], Any], workers: int, ahead: int
) -> Iterator[tuple[Any, Any]]:
    """(item, `decode(item)` or the exception it raised), in order; at most `ahead` are held in advance."""
    pool = ThreadPoolExecutor(workers)
    queue: deque[tuple[Any, Future]] = deque()

    def settled(item: Any, future: Future) -> tuple[Any, Any]:
        return item, future.exception() or future.result()

    try:
        for item in items:
            queue.append((item, pool.submit(decode, item)))
            if len(queue) > ahead:
                yield settled(*queue.popleft())
        while queue:
            yield settled(*queue.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def embed(paths: list[str], encoder: "Encoder", sink: "Sink", batch_size: int, workers: int) -> int:
    """Writes the embeddings to `sink`. Images that have none are named on stderr; returns their number."""
    from tqdm import tqdm

    skipped = 0

    def skip(path: str, reason: str) -> None:
        nonlocal skipped
        skipped += 1
        bar.update()
        name = path if path.isprintable() else repr(path)
        bar.write(f"siglip-fast: skipped {name}: {reason}", file=sys.stderr)

    def accepted() -> Iterator[tuple[str, str]]:
        for path in paths:
            if reason := sink.refuses(path):
                skip(path, reason)
            else:
                yield path, path

    with (
        tqdm(total=len(paths), unit="image", smoothing=0.1) as bar,
        contextlib.closing(embeddings(accepted(), encoder, batch_size, workers, skip)) as batches,
    ):
        for names, rows in batches:
            bar.update(len(names))
            sink.write(names, rows, encoder.metadata)
    return skipped


def embeddings(
    images: Iterable[tuple[Any, str | bytes]],
    encoder: "Encoder",
    batch_size: int,
    workers: int,
    skip: Callable[[Any, str], None],
) -> Iterator[tuple[list[Any], "np.ndarray"]]:
    """A batch at a time, the names of images and their embeddings, float32 [batch, hidden_size], in order.

    `images` are (name, file or encoded bytes). Those that have no embedding are told to `skip(name, reason)`.
    """
    import numpy as np
    import torch

    def usable(decoded: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, "torch.Tensor"]]:
        for (name, _), result in decoded:
            if isinstance(result, Exception):
                skip(name, first_line(result))
            else:
                yield name, result

    def decode(image: tuple[Any, str | bytes]) -> "torch.Tensor":
        return encoder.decode(image[1])

    with contextlib.closing(decode_ahead(images, decode, workers, ahead=batch_size)) as decoded:
        good = usable(decoded)
        while batch := list(itertools.islice(good, batch_size)):
            names, pixel_values = zip(*batch, strict=True)
            rows = encoder(torch.stack(pixel_values))
            finite = np.isfinite(rows).all(axis=1)
            for i in np.flatnonzero(~finite):
                skip(names[i], "its embedding is not finite; try --dtype float32")
            yield [names[i] for i in np.flatnonzero(finite)], rows[finite]


class Encoder:
    """The model and image processor that the arguments ask for, from an image to its embedding."""

    def __init__(self, args: Namespace):
        import PIL
        import torch
        import transformers

        import siglip_fast

        self.device = pick_device(args.device)
        dtype = args.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.model = load_model(args, self.device, getattr(torch, dtype))
        config = self.model.config
        if args.pool == "head" and not getattr(config, "vision_use_head", True):
            raise UserError(f"{args.model} has no pooling head: use --pool mean")
        self._processor = load_processor(args.model, config.image_size)
        self._pool, self._normalize = args.pool, args.normalize
        self.route = ""  # known from the first batch on
        versions = {module.__name__: module.__version__ for module in (siglip_fast, torch, transformers, PIL)}
        self.metadata = {
            "model": args.model or args.random_weights,
            "random_weights": f"seed {args.seed}" if args.random_weights else "no",
            "revision": getattr(config, "_commit_hash", None) or "",
            "dtype": dtype,
            "pool": args.pool,
            "normalized": "yes" if args.normalize else "no",
            "versions": json.dumps(versions),
        }

    def decode(self, source: str | bytes) -> "torch.Tensor":
        return pixel_values(self._processor, read_image(source))

    def __call__(self, pixel_values: "torch.Tensor") -> "np.ndarray":
        import torch

        with torch.inference_mode():
            pixel_values = pixel_values.to(self.device)
            if not self.route:
                self.route = self.metadata["backend"] = route(self.model, pixel_values)
            try:
                output = self.model(pixel_values)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{first_line(error)} Try a smaller --batch-size.") from error
            if self._pool == "head":
                embedding = output.pooler_output.float()
            else:
                embedding = output.last_hidden_state.float().mean(dim=1)
            if self._normalize:
                embedding = torch.nn.functional.normalize(embedding, dim=-1)
            return embedding.cpu().numpy()
