"""A folder of Parquet parts, which a run that was stopped goes on with: what is whole is there, the rest is to do."""

import contextlib
import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import parquet

from ..errors import UserError, first_line
from ..files import atomic
from ..models.variants import load_config
from .parts import file_of
from .sinks import ROW_GROUP, ParquetSink

if TYPE_CHECKING:
    from .encoder import Encoder

SETTINGS, ERRORS = "_settings.json", "_errors"  # in the output folder; Parquet readers pass over names with _


def settings_of(args: Namespace, parts: list[dict]) -> dict[str, Any]:
    """What two runs must agree in to share a folder."""
    config = load_config(args)
    root = os.getcwd()
    digest = hashlib.sha256()
    for part in parts:
        files = part.get("images") or [file_of(part)]
        places = [os.path.join(root, file) for file in files]
        sizes = [os.path.getsize(file_of(part))] if file_of(part) else []
        digest.update(json.dumps([part, places, sizes], sort_keys=True).encode())
    return {
        "model": args.model or args.random_weights,
        "random_weights": f"seed {args.seed}" if args.random_weights else "no",
        "revision": getattr(config, "_commit_hash", None) or "",
        "dtype": args.dtype,
        "pool": args.pool,
        "normalize": args.normalize,
        "decoder": args.decoder,
        "draft": args.draft,
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
        """Raises UserError if the path is a file, looks like one, or is a folder with something else in it."""
        if self.path.suffix in (".parquet", ".npy"):
            raise UserError(f"--out {self.path.name}: with --ray it names a folder, so without {self.path.suffix}")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; --out names a folder here")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / SETTINGS).exists():
            raise UserError(f"{self.path} is not empty, and not of an earlier run")

    def prepare(self, settings: dict[str, Any], force: bool) -> None:
        """Makes the folder, or goes on with one; with `force`, empties it of an earlier run's files. Raises UserError
        where the earlier run had other settings or inputs."""
        earlier = self.path / SETTINGS
        if force and earlier.exists():
            for file in [*self.path.glob("part-*.parquet"), *(self.path / ERRORS).glob("part-*.parquet")]:
                file.unlink()
        if not force:
            self.refuse_if_of(settings)
        (self.path / ERRORS).mkdir(parents=True, exist_ok=True)
        self.remove_temporaries()
        with atomic(earlier) as file:
            file.write(json.dumps(settings, indent=2).encode())

    def refuse_if_of(self, settings: dict[str, Any]) -> None:
        """Raises UserError if there was an earlier run with other settings or inputs; one that is None may be any."""
        if not (self.path / SETTINGS).exists():
            return
        before = json.loads((self.path / SETTINGS).read_text())
        for key, value in settings.items():
            if value is not None and value != before.get(key):
                change = "other inputs" if key == "inputs" else f"{key} {before.get(key)!r}, not {value!r}"
                raise UserError(f"{self.path} is of a run with {change}; name another folder, or --force")

    def todo(self) -> list[dict]:
        """The parts that are not there."""
        return [part for part in self.parts if not (self.path / self.name(part)).exists()]

    def rows_done(self, todo: list[dict]) -> int:
        """How many images the other parts have, 0 where only reading them would tell."""
        left = {part["index"] for part in todo}
        return sum(part["rows"] or 0 for part in self.parts if part["index"] not in left)

    def remove_temporaries(self) -> None:
        """What was left by who was killed."""
        for folder in (self.path, self.path / ERRORS):
            for file in folder.glob(".part-*.part"):
                file.unlink(missing_ok=True)

    def count(self) -> tuple[int, int]:
        """The rows and the errors of all parts. Raises UserError where a part has not as many as it should, or cannot
        be read: its files were changed or cut since."""
        embedded = skipped = 0
        for part in self.parts:
            files = self.path / self.name(part), self.path / ERRORS / self.name(part)
            try:
                rows, errors = (parquet.read_metadata(file).num_rows for file in files)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{files[0]}: {first_line(error)}; delete it and run again") from error
            if part["rows"] is not None and rows + errors != part["rows"]:
                found = f"{rows} rows and {errors} errors, expected {part['rows']} in all"
                raise UserError(f"{files[0]}: {found}; delete it and run again")
            embedded, skipped = embedded + rows, skipped + errors
        return embedded, skipped

    def told(self, notes: str) -> int:
        """Prints what the folder holds, and returns the exit status. Raises as `count`, and UserError where there is no
        embedding at all."""
        embedded, skipped = self.count()
        if not embedded:
            raise UserError(f"none of the {skipped} images could be used; {self.path / ERRORS} tells why")
        print(f"{embedded} images embedded" + f", {skipped} skipped" * bool(skipped) + notes)
        print(f"written: {self.path}" + f"; skipped ones: {self.path / ERRORS}" * bool(skipped))
        return 1 if skipped else 0


@contextlib.contextmanager
def open_part(out: Path, part: dict, encoder: "Encoder") -> Iterator["PartSink"]:
    """Both files of a part. They appear when the block ends, the errors first, so that they are there if the part is;
    if it raises, neither does."""
    import numpy as np

    name = Folder.name(part)
    with contextlib.ExitStack() as stack:
        sink = PartSink(stack.enter_context(atomic(out / name)), stack)
        yield sink
        if sink.is_empty:  # a file without rows, but with columns
            nothing = np.empty((0, encoder.model.config.hidden_size), np.float32)
            sink.write([], nothing, encoder.metadata)
        sink.finish()
        with atomic(out / ERRORS / name) as file:
            columns = {
                "path": [path.encode(errors="backslashreplace").decode() for path, _ in sink.errors],
                "error": [reason for _, reason in sink.errors],
            }
            schema = pa.schema({"path": pa.string(), "error": pa.string()})
            parquet.write_table(pa.table(columns, schema), file)


class PartSink(ParquetSink):
    """As ParquetSink, and the images without embedding: (name, reason)."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.errors: list[tuple[str, str]] = []
