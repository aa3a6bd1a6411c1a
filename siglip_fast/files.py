"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `path` when the block ends, or vanishes if that raises. Raises UserError where
    `path` is a folder, or its folder does not exist."""
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
