"""Images in WebDataset's tar shards: where each lies is read from the headers, its bytes by whoever decodes it."""

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from .paths import IMAGES, SUFFIXES


class Slice(NamedTuple):
    """Bytes in the midst of a file, read where they are needed: a description travels to a process, not the image."""

    file: str
    start: int
    length: int

    def read(self) -> bytes:
        """Raises ValueError where the file ends before the slice does."""
        with open(self.file, "rb") as file:
            file.seek(self.start)
            data = file.read(self.length)
        if len(data) < self.length:
            raise ValueError(f"cut short: {len(data)} of {self.length} bytes")
        return data


def read_shard(part: dict, root: str) -> Iterator[tuple[str, Slice | ValueError]]:
    """(SHARD.tar/MEMBER, its bytes) of the images of a shard, in order, and (SHARD.tar, what is wrong) where it is cut
    short or has none.

    WebDataset splits the last part of a member's name at the first dot into key and extension. Taken are members with
    the extension `part["image"]`, or, where that is None, any that is an image's alone: KEY.jpg, but not KEY.mask.png.
    """
    shard, path = part["shard"], os.path.join(root, part["shard"])
    taken, wrong = 0, None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # which it would keep, of all members
                if member.isreg() and not member.issparse() and _is_wanted(member.name, part["image"]):
                    name = member.name.encode(errors="backslashreplace").decode()  # which outputs can hold
                    taken += 1
                    yield f"{shard}/{name}", Slice(path, member.offset_data, member.size)
            archive.fileobj.seek(archive.offset)  # tarfile takes a header that is broken or cut for the end
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                wrong = "no end mark"
    except (tarfile.TarError, EOFError) as error:
        wrong = str(error)
    if wrong:
        yield shard, ValueError(f"cut short or damaged behind {taken} images: {wrong}")
    elif not taken:
        yield shard, ValueError(f"no member {part['image'] or 'that is an image'} in it")


def _is_wanted(name: str, extension: str | None) -> bool:
    own = os.path.basename(name).partition(".")[2].lower()
    return own == extension.lower() if extension else f".{own}" in SUFFIXES[IMAGES]
