"""Where embeddings go: Parquet or .npy files that appear whole or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import UserError
from ..files import atomic

if TYPE_CHECKING:
    import numpy as np

ROW_GROUP = 4096  # rows a Parquet row group: large enough to read fast, small enough to hold


@contextlib.contextmanager
def open_sink(out: Path, force: bool) -> Iterator["Sink"]:
    """What `--out` asks for. Its files appear when the block ends; if that raises, nothing does. Raises UserError
    where the suffix is neither .parquet nor .npy, or a file exists and `force` is not set."""
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

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written, so that there are no columns yet."""
        return self._writer is None

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
