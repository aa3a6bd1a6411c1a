"""Encoded images in Parquet files, cut into whole row groups and read piece by piece."""

import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import parquet, types

from ..errors import UserError, first_line

READ_ROWS = 64  # of encoded images, held at a time


def parts_of_table(file: str, size: int, args: Namespace) -> Iterator[dict]:
    """Whole row groups, at least one and as many as have no more than `size` rows, because a row group cannot be read
    from its middle. Raises UserError where the file cannot be read or lacks a column."""
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
