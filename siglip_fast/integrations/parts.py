"""What `embed --ray` does, cut into parts, and the folder that holds their files. Ray itself is not needed here."""

import hashlib
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet, types

from ..errors import UserError, first_line
from ..feed.paths import IMAGES, PARQUET, find_files
from ..feed.sinks import ROW_GROUP
from ..files import atomic
from ..models.variants import load_config

SETTINGS, ERRORS = "_settings.json", "_errors"  # in the output folder; Parquet readers pass over names with _
READ_ROWS = 64  # of encoded images, held at a time


def find_parts(args: Namespace) -> tuple[list[dict], int]:
    """The work in parts, JSON each, as numbered in the names of their files; and the number of repeated paths.

    Of image files a part has `part_size`. Of a Parquet file it has whole row groups, at least one and as many as have
    no more than `part_size` rows, because a row group cannot be read from its middle. Raises UserError where a path
    stands for nothing, both kinds are asked for, there are no rows, or a Parquet file lacks a column.
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
        chunks = [files[i : i + size] for i in range(0, len(files), size)]
        parts = [{"images": chunk, "rows": len(chunk)} for chunk in chunks]
    if tables != {True} and (args.image_column or args.id_column):
        raise UserError("--image-column and --id-column are for Parquet files, and the paths are images")
    if not parts:
        raise UserError(f"no rows in {', '.join(args.paths)}")
    return [{"index": index, **part} for index, part in enumerate(parts)], repeated


def _parts_of_table(file: str, size: int, args: Namespace) -> Iterator[dict]:
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


def _columns(file: str, schema: pa.Schema, args: Namespace) -> dict[str, str | None]:
    """The names of the columns to read; no `id` where Hugging Face's image column has the paths."""
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
    raise UserError(f"{file}: no column {name!r} among {schema.names}; --id-column names what tells rows apart")


def _is_bytes(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind)


def read_rows(part: dict, root: str) -> Iterator[tuple[str, bytes]]:
    """(id, encoded image) of the rows of a part of a Parquet file. A null id is replaced by FILE:ROW."""
    row, columns = part["start"], [name for name in (part["image"], part["id"]) if name]
    try:  # a buffer and no pre-buffering: a column of images is read piece by piece
        with parquet.ParquetFile(os.path.join(root, part["file"]), buffer_size=1 << 20, pre_buffer=False) as file:
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


def encoded(value: Any) -> bytes:
    """The bytes in a cell of an image column; none for null, which is then told as no image. Raises TypeError where
    it is neither bytes nor Hugging Face's {bytes, path}."""
    if isinstance(value, dict) and "bytes" in value:
        value = value["bytes"]
    if value is None:
        return b""
    if not isinstance(value, bytes):
        raise TypeError(f"an image column holds {type(value).__name__}, expected bytes or {{bytes, path}}")
    return value


def settings_of(args: Namespace, parts: list[dict]) -> dict[str, Any]:
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
            raise UserError(f"{self.path} is a file; --out with --ray names a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / SETTINGS).exists():
            raise UserError(f"{self.path} is not empty, and not of an earlier run with --ray")

    def prepare(self, settings: dict[str, Any], force: bool) -> None:
        """Makes the folder, or goes on with one; with `force`, empties it of an earlier run's files. Raises UserError
        where the earlier run had other settings or inputs."""
        earlier = self.path / SETTINGS
        if force and earlier.exists():
            for file in [*self.path.glob("part-*.parquet"), *(self.path / ERRORS).glob("part-*.parquet")]:
                file.unlink()
        elif earlier.exists():
            self.refuse_if_of(settings)
        (self.path / ERRORS).mkdir(parents=True, exist_ok=True)
        self.remove_temporaries()
        with atomic(earlier) as file:
            file.write(json.dumps(settings, indent=2).encode())

    def refuse_if_of(self, settings: dict[str, Any]) -> None:
        """Raises UserError if the earlier run had other settings or inputs; one that is None may be any."""
        before = json.loads((self.path / SETTINGS).read_text())
        for key, value in settings.items():
            if value is not None and value != before.get(key):
                change = "other inputs" if key == "inputs" else f"{key} {before.get(key)!r}, not {value!r}"
                raise UserError(f"{self.path} is of a run with {change}; name another folder, or --force")

    def todo(self) -> list[dict]:
        """The parts that are not there."""
        return [part for part in self.parts if not (self.path / self.name(part)).exists()]

    def remove_temporaries(self) -> None:
        """What workers left that were killed."""
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
            if rows + errors != part["rows"]:
                found = f"{rows} rows and {errors} errors, expected {part['rows']} in all"
                raise UserError(f"{files[0]}: {found}; delete it and run again")
            embedded, skipped = embedded + rows, skipped + errors
        return embedded, skipped
