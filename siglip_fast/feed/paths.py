"""The files that names, folders and globs stand for."""

import glob
import os
from collections.abc import Iterable, Iterator

from ..errors import UserError

IMAGES, PARQUET = "images", "Parquet files"
SUFFIXES = {  # what a folder is searched for
    IMAGES: frozenset(
        ".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
    ),
    PARQUET: frozenset([".parquet"]),
}


def find_files(patterns: Iterable[str], kind: str = IMAGES) -> tuple[list[str], int]:
    """The files that names, folders and globs stand for, each once, in order; and the number of repeats.

    Of a folder only files of the `kind`, IMAGES or PARQUET, are taken. Raises UserError where one of them matches
    nothing, or a folder cannot be read.
    """

    def unreadable(error: OSError) -> None:  # os.walk leaves such folders out silently
        raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

    def files_in(folder: str) -> Iterator[str]:
        for parent, folders, names in os.walk(folder, onerror=unreadable):
            folders.sort()
            for name in sorted(names):
                if os.path.splitext(name)[1].lower() in SUFFIXES[kind]:
                    yield os.path.join(parent, name)

    found: list[str] = []
    for pattern in patterns:
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
