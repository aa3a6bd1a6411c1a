"""What runs on Ray's workers: `Embedder` for a pipeline of one's own, and the actor of `siglip-fast embed --ray`."""

import contextlib
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import transformers

from ..errors import UserError
from ..feed.cores import usable_cores
from ..feed.encoder import Encoder
from ..feed.folder import Folder, open_part
from ..feed.parts import file_of, read_part
from ..feed.tables import encoded
from ..feed.workers import Threads

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
    "cuda" or "cpu", by default what the actor has; `backend` and `batch_invariant` are the model's; `pool` is "head" or "mean";
    `decoder` and `draft` are those of the command; `workers` are threads that decode.

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
        batch_invariant: bool | None = None,
        pool: str = "head",
        normalize: bool = False,
        decoder: str = "pillow",
        draft: bool = False,
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
                batch_invariant=batch_invariant,
                pool=pool,
                normalize=normalize,
                decoder=decoder,
                draft=draft,
            )
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        for name in (self._image_column, self._id_column):
            if name not in batch:
                raise ValueError(f"no column {name!r} in the batch, which has {sorted(batch)}")
        images = [encoded(value) for value in batch[self._image_column]]
        rows: list[np.ndarray | None] = [None] * len(images)
        errors: list[str | None] = [None] * len(images)
        threads = Threads(self._encoder.prepare, self._workers, ahead=len(images))
        embedded = self._encoder.embeddings(threads.prepared(enumerate(images)), len(images), errors.__setitem__)
        for positions, batch_rows in embedded:
            for position, row in zip(positions, batch_rows, strict=True):
                rows[position] = row
        embedding = pa.list_(pa.float32(), self._encoder.model.config.hidden_size)
        return pa.table(
            {
                "path": pa.array([None if id is None else str(id) for id in batch[self._id_column]], pa.string()),
                "embedding": pa.array(rows, embedding),
                "error": pa.array(errors, pa.string()),
            }
        )


class PartWriter:
    """The actor of the command: of a batch of one part as JSON it writes the files, and returns how that went."""

    def __init__(self, args: Namespace, root: str):
        self._args, self._root, self._out = args, root, Path(args.out)
        self._encoder, self._failure = None, ""
        transformers.utils.logging.disable_progress_bar()  # Ray would show one of each worker
        try:
            self._encoder = Encoder(args)
        except (UserError, OSError) as error:  # told by the first part: Ray would wrap it, and try again
            self._failure = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        part = json.loads(batch["part"][0])
        failure, rows = self._failure, part["rows"]
        try:
            # a worker that died after the last step may have finished it
            if not failure and not (self._out / Folder.name(part)).exists():
                rows = self._write(part)
        except (UserError, OSError) as error:
            failure = str(error)
        route = self._encoder.route if self._encoder else ""
        return {"rows": [rows or 0], "route": [route], "failure": [failure]}

    def _write(self, part: dict) -> int:
        """Writes the files of a part; how many images it has."""
        name, args = Folder.name(part), self._args
        if len(list(self._out.glob(f".{name}.*.part"))) >= ATTEMPTS:  # a worker that dies leaves its file
            what = file_of(part) or f"{part['images'][0]} to {part['images'][-1]}"
            raise UserError(f"{ATTEMPTS} workers died of part {part['index']} ({what}); Ray's logs may tell why")
        threads = Threads(self._encoder.prepare, args.workers or min(8, usable_cores()), ahead=args.batch_size)
        with open_part(self._out, part, self._encoder) as sink, contextlib.ExitStack() as stack:
            prepared = stack.enter_context(contextlib.closing(threads.prepared(read_part(part, self._root))))
            batches = self._encoder.embeddings(prepared, args.batch_size, lambda *error: sink.errors.append(error))
            rows = 0
            for paths, embeddings in stack.enter_context(contextlib.closing(batches)):
                sink.write(paths, embeddings, self._encoder.metadata)
                rows += len(paths)
            return rows + len(sink.errors)
