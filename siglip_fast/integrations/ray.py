"""On Ray Data: `Embedder` for a pipeline of one's own, and `siglip-fast embed --ray` for a folder of Parquet parts.

The command cuts the work into parts whose bounds depend on the inputs alone, leaves out those that the folder holds
already, and gives the others to a pool of actors. Each loads the model once, reads a part's images itself, and writes
its file under a temporary name before it takes its own. Only descriptions of parts travel through Ray. So a part that
is begun again, because a worker died or the command was started anew, ends as the same file with the same rows:
nothing is lost, nothing doubled, and no state is kept but the files. Nor are there read tasks, which would wait for
ever where the actors hold every CPU.
"""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, first_line
from ..feed.encoder import Encoder, embeddings
from ..feed.loading import warn_of_random_weights
from ..feed.sinks import ParquetSink
from ..files import atomic
from .parts import ERRORS, Folder, encoded, find_parts, read_rows, settings_of

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

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


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def run(args: Namespace) -> int:
    """The subcommand with --ray: embeds `args.paths` into the folder `args.out`, and returns the exit status."""
    parts, repeated = find_parts(args)
    args = _for_workers(args)
    folder = Folder(Path(args.out), parts)
    folder.refuse_if_foreign()
    notes = f", {repeated} repeated paths left out" * bool(repeated)
    if not (args.force or folder.todo()):
        folder.refuse_if_of(settings_of(args, parts))  # but for a dtype that only Ray's devices would decide
        return _told(folder, f"{notes}; nothing was left to do")
    ray = _import_ray()
    if args.random_weights:
        warn_of_random_weights(args.random_weights, args.seed)
    with _session(args.ray_address):
        resources = _place(args)
        folder.prepare(settings_of(args, parts), args.force)
        todo = folder.todo()
        start = time.perf_counter()
        try:
            routes = _process(ray, args, todo, folder, resources)
        finally:
            folder.remove_temporaries()
        seconds = time.perf_counter() - start
    now = sum(part["rows"] for part in todo)
    status = _told(folder, f"{notes}; {now} of them in this run, {now / seconds:.1f} images/s")
    for route in sorted(routes):
        print(f"ran on: {route} ({args.dtype} on {args.device}, {resources['actors']} workers)")
    return status


def _told(folder: Folder, notes: str) -> int:
    """Prints what the folder holds, and returns the exit status."""
    embedded, skipped = folder.count()
    if not embedded:
        raise UserError(f"none of the {skipped} images could be used; {folder.path / ERRORS} tells why")
    print(f"{embedded} images embedded" + f", {skipped} skipped" * bool(skipped) + notes)
    print(f"written: {folder.path}" + f"; skipped ones: {folder.path / ERRORS}" * bool(skipped))
    return 1 if skipped else 0


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UserError(f"--ray: {first_line(error)}; pip install -e '.[ray]' in the checkout") from error
    return ray


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
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else stderr gets its remarks about itself
        own = {"include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, logging_level="error", log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot start or join Ray at {address}: {first_line(error)}") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # which Ray replaced by one that exits without a word
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


def _process(ray: Any, args: Namespace, todo: list[dict], folder: Folder, resources: dict) -> set[str]:
    """Has the parts written, and shows how far it is. Returns what code ran the model."""
    from ray.data import ActorPoolStrategy, DataContext
    from tqdm import tqdm

    for handler in logging.getLogger("ray.data").handlers:
        # what prints, and is Ray's own; its log file keeps everything
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
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
