"""`siglip-fast embed`: images in, one embedding each out, as Parquet or .npy.

find_images → decode_ahead (threads) → Encoder (batches) → a sink, whose file appears whole or not at all
"""

import contextlib
import glob
import itertools
import json
import os
import secrets
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .variants import config_for

if TYPE_CHECKING:  # --help needs none of these
    import numpy as np
    import torch
    from PIL.Image import Image

    from .model import SiglipVisionModel

IMAGE_SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
ROW_GROUP = 4096  # rows a Parquet row group: large enough to read fast, small enough to hold


class UserError(Exception):
    """What the user can put right: printed as one line, exit status 2."""


def run(args: Namespace) -> int:
    """The subcommand: embeds `args.paths` into `args.out` and returns the exit status."""
    paths, repeated = find_images(args.paths)
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


def find_images(patterns: Iterable[str]) -> tuple[list[str], int]:
    """The images that files, folders and globs stand for, each once, in order; and the number of repeats.

    Raises:
        UserError: one of them matches nothing, or a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:  # os.walk leaves such folders out silently
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

    def images_in(folder: str) -> Iterator[str]:
        for parent, folders, names in os.walk(folder, onerror=unreadable):
            folders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                    yield os.path.join(parent, name)

    found: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files: list[str] = []
        for match in matches:
            files += images_in(match) if os.path.isdir(match) else [match]
        if not files:
            reason = "no images in this folder" if matches else "no such file or folder"
            raise UserError(f"{pattern}: {reason}")
        found += files
    unique: dict[str, str] = {}
    for path in found:
        unique.setdefault(os.path.abspath(path), path)
    return list(unique.values()), len(found) - len(unique)


def read_image(path: str) -> "Image":
    """The image as RGB, upright. Raises whatever Pillow raises on files that are no whole image."""
    from PIL import Image, ImageOps

    path.encode()  # neither kind of output can name a file whose name is not UTF-8
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a regular file")  # opening a FIFO would wait for ever
    with Image.open(path) as image:
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
    paths: Iterable[str], decode: Callable[[str], Any], workers: int, ahead: int
) -> Iterator[tuple[str, Any]]:
    """(path, `decode(path)` or the exception it raised), in order; at most `ahead` are held in advance."""
    pool = ThreadPoolExecutor(workers)
    queue: deque[tuple[str, Future]] = deque()

    def settled(path: str, future: Future) -> tuple[str, Any]:
        return path, future.exception() or future.result()

    try:
        for path in paths:
            queue.append((path, pool.submit(decode, path)))
            if len(queue) > ahead:
                yield settled(*queue.popleft())
        while queue:
            yield settled(*queue.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def embed(paths: list[str], encoder: "Encoder", sink: "Sink", batch_size: int, workers: int) -> int:
    """Writes the embeddings to `sink`. Images that have none are named on stderr; returns their number."""
    import numpy as np
    import torch
    from tqdm import tqdm

    skipped = 0

    def skip(path: str, reason: str) -> None:
        nonlocal skipped
        skipped += 1
        bar.update()
        name = path if path.isprintable() else repr(path)
        bar.write(f"siglip-fast: skipped {name}: {reason}", file=sys.stderr)

    def usable(decoded: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for path, result in decoded:
            if isinstance(result, Exception):
                skip(path, _first_line(result))
            elif reason := sink.refuses(path):
                skip(path, reason)
            else:
                yield path, result

    with (
        tqdm(total=len(paths), unit="image", smoothing=0.1) as bar,
        contextlib.closing(decode_ahead(paths, encoder.decode, workers, ahead=batch_size)) as decoded,
    ):
        images = usable(decoded)
        while batch := list(itertools.islice(images, batch_size)):
            rows = encoder(torch.stack([pixel_values for _, pixel_values in batch]))
            kept = []
            for i, (path, _) in enumerate(batch):
                if np.isfinite(rows[i]).all():
                    kept.append(i)
                    bar.update()
                else:
                    skip(path, "its embedding is not finite; try --dtype float32")
            sink.write([batch[i][0] for i in kept], rows[kept], encoder.metadata)
    return skipped


class Encoder:
    """The model and image processor that the arguments ask for, from a path to its embedding."""

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

    def decode(self, path: str) -> "torch.Tensor":
        return pixel_values(self._processor, read_image(path))

    def __call__(self, pixel_values: "torch.Tensor") -> "np.ndarray":
        import torch

        with torch.inference_mode():
            pixel_values = pixel_values.to(self.device)
            if not self.route:
                self.route = self.metadata["backend"] = route(self.model, pixel_values)
            try:
                output = self.model(pixel_values)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{_first_line(error)} Try a smaller --batch-size.") from error
            if self._pool == "head":
                embedding = output.pooler_output.float()
            else:
                embedding = output.last_hidden_state.float().mean(dim=1)
            if self._normalize:
                embedding = torch.nn.functional.normalize(embedding, dim=-1)
            return embedding.cpu().numpy()


def pick_device(name: str | None) -> "torch.device":
    """The device called `name`, or the one that there is."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise UserError(f"--device {name}: {_first_line(error)}") from error
    return device


def load_model(args: Namespace, device: "torch.device", dtype: "torch.dtype") -> "SiglipVisionModel":
    """The model of `args.model` or `args.random_weights`, for inference.

    Raises:
        UserError: there is no such model, it is not whole, or the backend cannot run on the device.
    """
    import torch

    from .model import SiglipVisionModel

    try:
        if args.model:
            model = _from_pretrained(args.model, args.backend)
        else:
            config = config_for(args.random_weights)
            _warn_of_random_weights(args.random_weights, args.seed)
            torch.manual_seed(args.seed)
            model = SiglipVisionModel(config, backend=args.backend)
        model.backend_for(device)
    except (ValueError, RuntimeError) as error:  # unknown variant or backend; a backend that cannot run here
        raise UserError(_first_line(error)) from error
    return model.eval().to(device, dtype)


def _from_pretrained(name: str, backend: str | None) -> "SiglipVisionModel":
    import transformers

    from .model import SiglipVisionModel

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it lists the whole text tower as "unexpected"
    try:
        model, report = SiglipVisionModel.from_pretrained(name, backend=backend, output_loading_info=True)
    except Exception as error:  # a wrong name, no network, a broken file: a type each
        raise UserError(f"cannot load {name}: {_first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{name} is no SigLIP vision model: lacks {len(missing)} weights such as {missing[0]}"
        )
    return model


def _warn_of_random_weights(variant: str, seed: int) -> None:
    text = f"!!!  RANDOM WEIGHTS: {variant}, seed {seed}, not trained. Its embeddings mean nothing.  !!!"
    print("!" * len(text), text, "!" * len(text), sep="\n", file=sys.stderr)


def load_processor(model: str | None, image_size: int) -> Any:
    """Hugging Face's image processor on Pillow, as the model's files configure it.

    Raises:
        UserError: it cannot be loaded, is of another kind, or makes images of another size than the model's.
    """
    import transformers
    from PIL import Image

    # Transformers 5 gave the plain name to the one that needs torchvision.
    kind = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    if model is None or _has_no_processor(model):
        settings = {"size": {"height": image_size, "width": image_size}}
    else:
        try:
            settings, _ = kind.get_image_processor_dict(model)
        except Exception as error:
            raise UserError(f"cannot load the image processor of {model}: {_first_line(error)}") from error
    name = settings.get("image_processor_type", "SiglipImageProcessor")
    if name.removesuffix("Fast").removesuffix("Pil") != "SiglipImageProcessor":
        raise UserError(f"{model} wants the image processor {name}, not SigLIP's")
    processor = kind.from_dict(settings)
    made = list(pixel_values(processor, Image.new("RGB", (8, 9))).shape[1:])
    if made != [image_size, image_size]:
        raise UserError(f"{model}: its image processor makes {made} pixels, the model takes {image_size}²")
    return processor


def _has_no_processor(model: str) -> bool:
    files = ("preprocessor_config.json", "processor_config.json")
    if not os.path.isdir(model) or any(os.path.exists(os.path.join(model, file)) for file in files):
        return False
    print(f"siglip-fast: {model} has no {files[0]}: using SigLIP's defaults", file=sys.stderr)
    return True


def pixel_values(processor: Any, image: "Image") -> "torch.Tensor":
    """One RGB image as the model takes it, `[3, height, width]`."""
    # The format is told because an image 1 or 3 pixels high would be taken for one with its channels first.
    return processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]


def route(model: "SiglipVisionModel", pixel_values: "torch.Tensor") -> str:
    """Which code runs for `pixel_values`, and why if it is the stock code. Call it as the model is called."""
    if reason := model.why_not(pixel_values):
        return f"stock transformers, because {reason}"
    return f"backend {model.backend_for(pixel_values.device)}"


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


@contextlib.contextmanager
def open_sink(out: Path, force: bool) -> Iterator["Sink"]:
    """What `--out` asks for. Its files appear when the block ends; if that raises, nothing does.

    Raises:
        UserError: the suffix is neither .parquet nor .npy, or a file exists and `force` is not set.
    """
    if out.suffix not in (".parquet", ".npy"):
        raise UserError(f"--out {out}: expected a name that ends in .parquet or .npy")
    targets = [out] if out.suffix == ".parquet" else [out, out.with_suffix(".paths.txt")]
    for target in targets:
        if target.exists() and not force:
            raise UserError(f"{target} exists; --force overwrites it")
    with contextlib.ExitStack() as stack:  # closes the last first: where the .npy is, its paths are
        files = [stack.enter_context(atomic(target)) for target in targets]
        sink = ParquetSink(*files, stack) if out.suffix == ".parquet" else NpySink(*files)
        yield sink
        sink.finish()


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` when the block ends, or vanishes if that raises.

    Raises:
        UserError: `path` is a folder, or its folder does not exist.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise UserError(f"{path}: its folder does not exist")
    # in the same folder, because os.replace is atomic only within a file system
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Sink:
    """Takes batches of paths and embeddings, and writes them to its file."""

    def __init__(self):
        self._paths: list[str] = []
        self._rows: list[np.ndarray] = []

    def refuses(self, path: str) -> str | None:
        """Why this output cannot hold `path`, if it cannot."""

    def write(self, paths: list[str], rows: "np.ndarray", metadata: dict[str, str]) -> None:
        self._paths += paths
        self._rows.append(rows)


class ParquetSink(Sink):
    """Columns path and embedding, the metadata in the schema; holds no more than a row group."""

    def __init__(self, file: BinaryIO, stack: contextlib.ExitStack):
        super().__init__()
        self._file, self._stack = file, stack
        self._writer = None

    def write(self, paths: list[str], rows: "np.ndarray", metadata: dict[str, str]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        super().write(paths, rows, metadata)
        if self._writer is None:
            embedding = pa.list_(pa.float32(), rows.shape[1])
            schema = pa.schema({"path": pa.string(), "embedding": embedding}, metadata=metadata)
            # the stack closes it before its file, whatever happens
            self._writer = self._stack.enter_context(parquet.ParquetWriter(self._file, schema))
        if len(self._paths) >= ROW_GROUP:
            self._flush()

    def finish(self) -> None:
        if self._paths:
            self._flush()

    def _flush(self) -> None:
        import numpy as np
        import pyarrow as pa

        schema = self._writer.schema
        values = pa.array(np.concatenate(self._rows).reshape(-1))
        embeddings = pa.FixedSizeListArray.from_arrays(values, type=schema.field("embedding").type)
        self._writer.write_table(pa.table([pa.array(self._paths), embeddings], schema=schema))
        self._paths, self._rows = [], []


class NpySink(Sink):
    """One array, and the paths in a text file beside it."""

    def __init__(self, file: BinaryIO, paths_file: BinaryIO):
        super().__init__()
        self._file, self._paths_file = file, paths_file

    def refuses(self, path: str) -> str | None:
        return "a line break in its name; write Parquet" if "\n" in path or "\r" in path else None

    def finish(self) -> None:
        import numpy as np

        np.save(self._file, np.concatenate(self._rows))
        self._paths_file.write("".join(f"{path}\n" for path in self._paths).encode())
