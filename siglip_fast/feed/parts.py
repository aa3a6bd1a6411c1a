"""The work of `embed`, cut into parts whose bounds depend on the inputs alone, and what a part's images are."""

import os
from argparse import Namespace
from collections.abc import Iterator

from ..errors import UserError
from .paths import IMAGES, PARQUET, SHARDS, find_files, kind_of_path, read_list
from .shards import Slice, read_shard
from .sinks import ROW_GROUP

Source = str | bytes | Slice | Exception  # an image's file, its encoded bytes or where they lie, or why there are none


def find_parts(args: Namespace) -> tuple[list[dict], int]:
    """The work in parts, JSON each, as numbered in the names of their files; and the number of repeated paths.

    `rows` says how many images a part has, None where only reading it would tell. Of image files a part has
    `part_size`, of a Parquet file whole row groups of no more rows, or one; a tar shard is a part. Raises UserError where
    a path stands for nothing, several kinds are asked for, there are no rows, or a Parquet file lacks a column.
    """
    size = args.part_size or ROW_GROUP
    if bool(args.paths) == bool(args.from_file):
        raise UserError("expected either images, folders, globs, Parquet files or tar shards, or --from-file")
    given = read_list(args.from_file) if args.from_file else args.paths
    kinds = sorted({kind_of_path(path) for path in given})
    if len(kinds) != 1:
        raise UserError(f"expected one kind of input, got {' and '.join(kinds)}")
    (kind,) = kinds
    _refuse_foreign_options(args, kind)
    files, repeated = find_files(given, kind, literally=bool(args.from_file))
    if kind == PARQUET:
        from .tables import parts_of_table  # with pyarrow

        parts = [part for file in files for part in parts_of_table(file, size, args)]
    elif kind == SHARDS:
        parts = [{"shard": file, "image": args.image_column, "rows": None} for file in files]
    else:
        chunks = [files[i : i + size] for i in range(0, len(files), size)]
        parts = [{"images": chunk, "rows": len(chunk)} for chunk in chunks]
    if not parts:
        raise UserError(f"no rows in {args.from_file or ', '.join(args.paths)}")
    return [{"index": index, **part} for index, part in enumerate(parts)], repeated


def _refuse_foreign_options(args: Namespace, kind: str) -> None:
    if args.id_column and kind != PARQUET:
        raise UserError(f"--id-column is for Parquet files, and the paths are {kind}")
    if args.image_column and kind == IMAGES:
        raise UserError("--image-column is for Parquet files and tar shards, and the paths are images")


def total_of(parts: list[dict]) -> int | None:
    """How many images they have, None where only reading would tell."""
    rows = [part["rows"] for part in parts]
    return None if None in rows else sum(rows)


def file_of(part: dict) -> str | None:
    """The Parquet file or the shard that the part is of."""
    return part.get("file") or part.get("shard")


def read_part(part: dict, root: str) -> Iterator[tuple[str, Source]]:
    """(name, source) of its images, at least one; relative paths are looked up in `root`. Raises UserError or OSError
    where a Parquet file or a shard cannot be read at all."""
    if "file" in part:
        from .tables import read_rows

        return read_rows(part, root)
    if "shard" in part:
        return read_shard(part, root)
    return ((path, os.path.join(root, path)) for path in part["images"])
