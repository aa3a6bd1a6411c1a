"""On Ray Data: `Embedder` for a pipeline of one's own, and `siglip-fast embed --ray` for a folder of Parquet parts.

The command cuts the work into parts whose bounds depend on the inputs alone, leaves out those that the folder holds
already, and gives the others to a pool of actors. Each loads the model once, reads a part's images itself, and writes
its file under a temporary name before it takes its own. Only descriptions of parts travel through Ray. So a part that
is begun again, because a worker died or the command was started anew, ends as the same file with the same rows:
nothing is lost, nothing doubled, and no state is kept but the files. Nor are there read tasks, which would wait for
ever where the actors hold every CPU.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..embed import IMAGES, PARQUET, Encoder, embeddings, find_files
from ..loading import UserError, first_line, load_config
from ..sinks import ROW_GROUP, ParquetSink, atomic

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SETTINGS, ERRORS = "_settings.json", "_errors"  # in the output folder; Parquet readers pass over names with _
READ_ROWS = 64  # of encoded images, held at a time
ATTEMPTS = 4  # at a part: what kills every worker must not be tried for ever, as Ray would


class Embedder:
    """Embeds images in `ray.data.Dataset.map_batches`; each actor loads the model once.

        images = ray.data.read_binary_files("photos/", include_paths=True)
        settings = {"model": "google/siglip-base-patch16-224", "image_column": "bytes"}
        rows = images.map_batches(Embedder, fn_constructor_kwargs=settings, batch_size=64, num_gpus=1, concurrency=1)

    A batch (of the default format, "numpy") needs two columns: `image_column`, whose values are encoded images (bytes
    of JPEG, PNG, …) or Hugging Face's {bytes, path}, and `id_column`, whose values tell rows apart. What comes out:

        path: string, the id as text
        embedding: float32 [hidden_size], null where there is none
        error: string, why there is none, null where there is one

    A batch is one forward of the model. `dtype` is a name, by default bfloat16 on a GPU, else float32; `device` is
    "cuda" or "cpu", by default what the actor has; `pool` is "head" or "mean"; `workers` are threads that decode.

    Raises:
        UserError: the model cannot be loaded, or a forward ran out of memory.
        ValueError: the batch lacks a column.
        TypeError: the image column holds something else.
    """

    def __init__(
        self,
        model: str,
        *,
        image_column: str = "image",
        id_column: str = "path",
        dtype: str | None = None,
        device: str | None = None,
        backend: str | None = None,
        pool: str = "head",
        normalize: bool = False,
        workers: int = 4,
    ):
        self._image_column, self._id_column, self._workers = image_column, id_column, workers
        self._encoder = Encoder(
            Namespace(
                model=model,
                random_weights=None,
                dtype=dtype,
                device=device,
                backend=backend,
                pool=pool,
                normalize=normalize,
            )
        )

    def __call__(self, batch: dict[str, "np.ndarray"]) -> "pa.Table":
        import pyarrow as pa

        for name in (self._image_column, self._id_column):
            if name not in batch:
                raise ValueError(f"no column {name!r} in the batch, which has {sorted(batch)}")
        images = [encoded(value) for value in batch[self._image_column]]
        rows: list[np.ndarray | None] = [None] * len(images)
        errors: list[str | None] = [None] * len(images)
        embedded = embeddings(
            enumerate(images), self._encoder, len(images), self._workers, errors.__setitem__
        )
        for positions, batch_rows in embedded:
            for position, row in zip(positions, batch_rows, strict=True):
                rows[position] = row
        embedding = pa.list_(pa.float32(), self._encoder.model.config.hidden_size)
        return pa.table(
            {
                "path": pa.array([_text(value) for value in batch[self._id_column]], pa.string()),
                "embedding": pa.array(rows, embedding),
                "error": pa.array(errors, pa.string()),
            }
        )


def encoded(value: Any) -> bytes:
    """The bytes in a cell of an image column; none for null, which is then told as no image.

    Raises:
        TypeError: it is neither bytes nor Hugging Face's {bytes, path}.
    """
    if isinstance(value, dict) and "bytes" in value:
        value = value["bytes"]
    if value is None:
        return b""
    if not isinstance(value, bytes):
        raise TypeError(f"an image column holds {type(value).__name__}, expected bytes or {{bytes, path}}")
    return value


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def run(args: Namespace) -> int:
    """The subcommand with --ray: embeds `args.paths` into the folder `args.out`, and returns the exit status."""
    ray = _import_ray()
    parts, repeated = find_parts(args)
    args = _for_workers(args)
    folder = Folder(Path(args.out), parts)
    folder.refuse_if_foreign()
    with _session(args.ray_address):
        resources = _place(args)
        folder.prepare(_settings(args, parts), args.force)
        finished = set(os.listdir(folder.path))
        todo = [part for part in parts if folder.name(part) not in finished]
        start = time.perf_counter()
        try:
            routes = _process(ray, args, todo, folder, resources)
        finally:
            folder.remove_temporaries()
        seconds = time.perf_counter() - start
    embedded, skipped = folder.count()
    if not embedded:
        raise UserError(f"none of the {skipped} images could be used; {folder.path / ERRORS} tells why")
    notes = f", {skipped} skipped" * bool(skipped) + f", {repeated} repeated paths left out" * bool(repeated)
    now = sum(part["rows"] for part in todo)
    print(f"{embedded} images embedded{notes}; {now} of them in this run, {now / seconds:.1f} images/s")
    print(f"written: {folder.path}" + f"; skipped ones: {folder.path / ERRORS}" * bool(skipped))
    for route in sorted(routes):
        print(f"ran on: {route} ({args.dtype} on {args.device}, {resources['actors']} workers)")
    return 1 if skipped else 0


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UserError(f"--ray: {first_line(error)}; pip install 'siglip-fast[ray]'") from error
    return ray


def find_parts(args: Namespace) -> tuple[list[dict], int]:
    """The work in parts, JSON each, as numbered in the names of their files; and the number of repeated paths.

    Of image files a part has `part_size`. Of a Parquet file it has whole row groups, at least one and as many as have
    no more than `part_size` rows, because a row group cannot be read from its middle.

    Raises:
        UserError: a path stands for nothing, both kinds are asked for, or a Parquet file lacks a column.
    """
    size = args.part_size or ROW_GROUP
    tables = {str(path).rstrip("/").endswith(".parquet") for path in args.paths}
    if len(tables) > 1:
        raise UserError("expected images or Parquet files, got both")
    if tables == {True}:
        files, repeated = find_files(args.paths, PARQUET)
        parts = [part for file in files for part in _parts_of_table(file, size, args)]
    else:
        files, repeated = find_files(args.paths, IMAGES)
        parts = [{"images": files[i : i + size]} for i in range(0, len(files), size)]
        for part in parts:
            part["rows"] = len(part["images"])
    if tables != {True} and (args.image_column or args.id_column):
        raise UserError("--image-column and --id-column are for Parquet files, and the paths are images")
    return [{"index": index, **part} for index, part in enumerate(parts)], repeated


def _parts_of_table(file: str, size: int, args: Namespace) -> Iterator[dict]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            columns = _columns(file, opened.schema_arrow, args)
            rows = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: {first_line(error)}") from error
    first, start = 0, 0  # of the part: its first row group and row
    for group in range(1, len(rows) + 1):
        count = sum(rows[first:group])
        if group == len(rows) or count + rows[group] > size:
            if count:
                yield {"file": file, "groups": [first, group], "start": start, "rows": count} | columns
            first, start = group, start + count


def _columns(file: str, schema: "pa.Schema", args: Namespace) -> dict[str, str | None]:
    """The names of the columns to read; no `id` where Hugging Face's image column has the paths."""
    from pyarrow import types

    image = args.image_column or "image"
    if image not in schema.names:
        raise UserError(f"{file}: no column {image!r} among {schema.names}; --image-column names another")
    kind = schema.field(image).type
    nested = types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}
    if not (nested or _is_bytes(kind)):
        raise UserError(f"{file}: column {image!r} is {kind}, expected binary or struct<bytes, path>")
    name = args.id_column or "path"
    if name in schema.names:
        if types.is_nested(schema.field(name).type) or _is_bytes(schema.field(name).type):
            raise UserError(f"{file}: column {name!r} is {schema.field(name).type}, expected text or numbers")
        return {"image": image, "id": name}
    if nested and not args.id_column:
        return {"image": image, "id": None}
    raise UserError(
        f"{file}: no column {name!r} among {schema.names}; --id-column names what tells rows apart"
    )


def _is_bytes(kind: "pa.DataType") -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def read_rows(part: dict, root: str) -> Iterator[tuple[str, bytes]]:
    """(id, encoded image) of the rows of a part of a Parquet file. A null id is replaced by FILE:ROW."""
    import pyarrow as pa
    from pyarrow import parquet

    row, columns = part["start"], [name for name in (part["image"], part["id"]) if name]
    try:  # a buffer and no pre-buffering: a column of images is read piece by piece
        with parquet.ParquetFile(
            os.path.join(root, part["file"]), buffer_size=1 << 20, pre_buffer=False
        ) as file:
            for batch in file.iter_batches(READ_ROWS, range(*part["groups"]), columns):
                images = batch[part["image"]].to_pylist()
                if part["id"]:
                    ids = batch[part["id"]].to_pylist()
                else:
                    ids = [image and image["path"] for image in images]
                for image, id in zip(images, ids, strict=True):
                    yield f"{part['file']}:{row}" if id is None else str(id), encoded(image)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{part['file']}: {first_line(error)}") from error


def _for_workers(args: Namespace) -> Namespace:
    """What a worker needs, wherever its working directory is."""
    model = os.path.abspath(args.model) if args.model and os.path.isdir(args.model) else args.model
    kept = {key: value for key, value in vars(args).items() if key not in ("run", "paths")}
    return Namespace(**kept | {"out": os.path.abspath(args.out), "model": model})


@contextlib.contextmanager
def _session(address: str | None) -> Iterator[None]:
    """Ray: the one that this process has joined already, the cluster at `address`, or one of this machine's own."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"include_dashboard": False}
    try:
        ray.init(address, logging_level="error", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot start or join Ray at {address}: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _place(args: Namespace) -> dict[str, Any]:
    """How many actors and what each reserves; decides `args.device` and `args.dtype`, so that all workers agree.

    On GPUs, one actor each. Otherwise one a node with the node's CPUs, or as many as asked for, which share them; Ray
    gives a worker as many OpenMP threads as it reserves CPUs.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    args.device = args.device or ("cuda" if gpus else "cpu")
    if args.device not in ("cuda", "cpu"):
        raise UserError(f"--device {args.device}: Ray picks the GPU of a worker; expected cuda or cpu")
    if args.device == "cuda" and not gpus:
        raise UserError("--device cuda: Ray knows of no GPU")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.device == "cuda":
        return {"actors": args.ray_actors or gpus, "num_gpus": 1}
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cpus = [count for count in cpus if count] or [1]
    actors = args.ray_actors or len(cpus)
    share = min(cpus) / -(-actors // len(cpus))  # of the smallest node, with equally many actors on each
    return {"actors": actors, "num_cpus": int(share) if share >= 1 else share}


def _settings(args: Namespace, parts: list[dict]) -> dict[str, Any]:
    """What two runs must agree in to share a folder."""
    config = load_config(args)
    root = os.getcwd()
    digest = hashlib.sha256()
    for part in parts:
        files = part.get("images") or [part["file"]]
        places = [os.path.join(root, file) for file in files]
        sizes = [os.path.getsize(part["file"])] if "file" in part else []
        digest.update(json.dumps([part, places, sizes], sort_keys=True).encode())
    return {
        "model": args.model or args.random_weights,
        "random_weights": f"seed {args.seed}" if args.random_weights else "no",
        "revision": getattr(config, "_commit_hash", None) or "",
        "dtype": args.dtype,
        "pool": args.pool,
        "normalize": args.normalize,
        "part_size": args.part_size or ROW_GROUP,
        "inputs": f"sha256 {digest.hexdigest()}",
    }


class Folder:
    """The output: part-000000.parquet and so on, each with its errors, and the settings that all share."""

    def __init__(self, path: Path, parts: list[dict]):
        self.path, self.parts = path, parts

    @staticmethod
    def name(part: dict) -> str:
        return f"part-{part['index']:06d}.parquet"

    def refuse_if_foreign(self) -> None:
        """Raises UserError if the path is a file, or a folder with something else in it."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --out with --ray names a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / SETTINGS).exists():
            raise UserError(f"{self.path} is not empty, and not of an earlier run with --ray")

    def prepare(self, settings: dict[str, Any], force: bool) -> None:
        """Makes the folder, or goes on with one; with `force`, empties it of an earlier run's files.

        Raises:
            UserError: the earlier run had other settings or inputs.
        """
        earlier = self.path / SETTINGS
        if force and earlier.exists():
            for file in [*self.path.glob("part-*.parquet"), *(self.path / ERRORS).glob("part-*.parquet")]:
                file.unlink()
        elif earlier.exists():
            before = json.loads(earlier.read_text())
            for key in [key for key in settings if settings[key] != before.get(key)]:
                change = (
                    "other inputs" if key == "inputs" else f"{key} {before.get(key)!r}, not {settings[key]!r}"
                )
                raise UserError(f"{self.path} is of a run with {change}; name another folder, or --force")
        (self.path / ERRORS).mkdir(parents=True, exist_ok=True)
        self.remove_temporaries()
        with atomic(earlier) as file:
            file.write(json.dumps(settings, indent=2).encode())

    def remove_temporaries(self) -> None:
        """What workers left that were killed."""
        for folder in (self.path, self.path / ERRORS):
            for file in folder.glob(".part-*.part"):
                file.unlink(missing_ok=True)

    def count(self) -> tuple[int, int]:
        """The rows and the errors of all parts.

        Raises:
            UserError: a part has not as many as it should, or cannot be read: its files were changed or cut since.
        """
        import pyarrow as pa
        from pyarrow import parquet

        embedded = skipped = 0
        for part in self.parts:
            files = self.path / self.name(part), self.path / ERRORS / self.name(part)
            try:
                rows, errors = (parquet.read_metadata(file).num_rows for file in files)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{files[0]}: {first_line(error)}; delete it and run again") from error
            if rows + errors != part["rows"]:
                found = f"{rows} rows and {errors} errors, expected {part['rows']} in all"
                raise UserError(f"{files[0]}: {found}; delete it and run again")
            embedded, skipped = embedded + rows, skipped + errors
        return embedded, skipped


def _process(ray: Any, args: Namespace, todo: list[dict], folder: Folder, resources: dict) -> set[str]:
    """Has the parts written, and shows how far it is. Returns what code ran the model."""
    from ray.data import ActorPoolStrategy, DataContext
    from tqdm import tqdm

    if not todo:
        return set()
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # its log file keeps everything
            handler.setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    reserved = {key: value for key, value in resources.items() if key != "actors"}
    total = sum(part["rows"] for part in folder.parts)
    routes = set()
    with DataContext.current(context), tqdm(total=total, unit="image", smoothing=0.1) as bar:
        bar.update(total - sum(part["rows"] for part in todo))
        texts = [{"part": json.dumps(part)} for part in todo]
        results = ray.data.from_items(texts, override_num_blocks=len(texts)).map_batches(
            PartWriter,
            fn_constructor_args=(args, os.getcwd()),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(resources["actors"], len(todo))),
            **reserved,
        )
        try:
            for result in results.iter_rows():
                if result["failure"]:
                    raise UserError(result["failure"])
                bar.update(result["rows"])
                routes |= {result["route"]} - {""}
        except ray.exceptions.RayActorError as error:  # workers that die before they could work
            raise UserError(f"Ray: {first_line(error)}") from error
    return routes


class PartWriter:
    """The actor of the command: of a batch of one part as JSON it writes the files, and returns how that went."""

    def __init__(self, args: Namespace, root: str):
        import transformers

        self._args, self._root, self._out = args, root, Path(args.out)
        self._encoder, self._failure = None, ""
        transformers.utils.logging.disable_progress_bar()  # Ray would show one of each worker
        try:
            self._encoder = Encoder(args)
        except (UserError, OSError) as error:  # told by the first part: Ray would wrap it, and try again
            self._failure = str(error)

    def __call__(self, batch: dict[str, "np.ndarray"]) -> dict[str, list]:
        part = json.loads(batch["part"][0])
        failure = self._failure
        try:
            # a worker that died after the last step may have finished it
            if not failure and not (self._out / Folder.name(part)).exists():
                self._write(part)
        except (UserError, OSError) as error:
            failure = str(error)
        route = self._encoder.route if self._encoder else ""
        return {"rows": [part["rows"]], "route": [route], "failure": [failure]}

    def _write(self, part: dict) -> None:
        """Both files of a part; the errors first, so that they are there if the part is."""
        import numpy as np
        import pyarrow as pa
        from pyarrow import parquet

        encoder, name = self._encoder, Folder.name(part)
        if len(list(self._out.glob(f".{name}.*.part"))) >= ATTEMPTS:  # a worker that dies leaves its file
            what = part["file"] if "file" in part else f"{part['images'][0]} to {part['images'][-1]}"
            raise UserError(
                f"{ATTEMPTS} workers died of part {part['index']} ({what}); Ray's logs may tell why"
            )
        if "file" in part:
            images = read_rows(part, self._root)
        else:
            images = ((path, os.path.join(self._root, path)) for path in part["images"])
        errors: list[tuple[str, str]] = []
        with contextlib.ExitStack() as stack:
            sink = ParquetSink(stack.enter_context(atomic(self._out / name)), stack)
            batches = embeddings(
                images,
                encoder,
                self._args.batch_size,
                self._args.workers,
                lambda *error: errors.append(error),
            )
            for paths, rows in stack.enter_context(contextlib.closing(batches)):
                sink.write(paths, rows, encoder.metadata)
            if len(errors) == part["rows"]:  # a file without rows, but with columns
                sink.write([], np.empty((0, encoder.model.config.hidden_size), np.float32), encoder.metadata)
            sink.finish()
            with atomic(self._out / ERRORS / name) as file:
                columns = {
                    "path": [path.encode(errors="backslashreplace").decode() for path, _ in errors],
                    "error": [error for _, error in errors],
                }
                schema = pa.schema({"path": pa.string(), "error": pa.string()})
                parquet.write_table(pa.table(columns, schema), file)
