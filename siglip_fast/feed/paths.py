"""The files that names, folders, globs and lists stand for."""

import contextlib
import glob
import os
import sys
from collections.abc import Iterable, Iterator

from ..errors import UserError

IMAGES, PARQUET, SHARDS = "images", "Parquet files", "tar shards"
SUFFIXES = {  # what a folder is searched for
    IMAGES: frozenset(
        ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
    ),
    PARQUET: frozenset([".parquet"]),
    SHARDS: frozenset([".tar"]),
}


def kind_of_path(path: str) -> str:
    """What a path, folder or glob is taken for, by its ending."""
    suffix = os.path.splitext(path.rstrip("/"))[1]
    return next((kind for kind in (PARQUET, SHARDS) if suffix in SUFFIXES[kind]), IMAGES)


def read_list(name: str) -> list[str]:
    """The paths in a file, or in standard input for "-": ended by NUL if there is one, else one a line. Raises UserError
    where there are none."""
    with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
        data = file.read()
    if b"\0" in data:
        paths = data.split(b"\0")
    else:
        paths = [line.removesuffix(b"\r") for line in data.split(b"\n")]
    if not any(paths):
        raise UserError(f"--from-file {name}: no paths in it")
    return [os.fsdecode(path) for path in paths if path]


def find_files(patterns: Iterable[str], kind: str = IMAGES, literally: bool = False) -> tuple[list[str], int]:
    """The files that names, folders and globs stand for, each once, in order; and the number of repeats.

    Of a folder only files of the `kind`, IMAGES, PARQUET or SHARDS, are taken. `literally`, each is the name of a file,
    and nothing is looked up. Raises UserError where one of them matches nothing, or a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:  # os.walk leaves such folders out silently
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

    def files_in(folder: str) -> Iterator[str]:
        for parent, folders, names in os.walk(folder, onerror=unreadable):
            folders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in SUFFIXES[kind]:
                    yield os.path.join(parent, name)

    found: list[str] = list(patterns) if literally else []
    for pattern in () if literally else patterns:
        matches = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))
        files: list[str] = []
        for match in matches:
            files += files_in(match) if os.path.isdir(match) else [match]
        if not files:
            reason = f"no {kind} in this folder" if matches else "no such file or folder"
            raise UserError(f"{pattern}: {reason}")
        found += files
    unique: dict[str, str] = {}
    for path in found:
        unique.setdefault(os.path.abspath(path), path)
    return list(unique.values()), len(found) - len(unique)
