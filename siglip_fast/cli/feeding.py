"""What `embed` does with and without its model: the parts' images through threads or processes, a progress bar beside."""

import multiprocessing
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import first_line
from ..feed.cores import usable_cores
from ..feed.parts import Source, file_of, read_part

if TYPE_CHECKING:
    from ..feed.meter import Workers
    from ..feed.prepare import Prepare

Name = tuple[int, str]  # the index of an image's part, and the image's own name

FEW = 512  # images that threads have decoded by the time at which processes would begin (docs/embedding.md)
SHARD_IMAGE = 1 << 17  # bytes of a shard that are taken for an image, where only reading it would tell


def are_many(parts: list[dict]) -> bool:
    """Whether processes are worth their start."""
    images = (os.path.getsize(file_of(part)) // SHARD_IMAGE if part["rows"] is None else part["rows"] for part in parts)
    return "forkserver" in multiprocessing.get_all_start_methods() and sum(images) >= FEW


def workers_for(args: Namespace, parts: list[dict], prepare: "Prepare") -> "Workers":
    number = args.workers or usable_cores()
    if are_many(parts):
        from ..feed.processes import Processes

        return Processes(prepare, number)
    from ..feed.workers import Threads

    return Threads(prepare, number, ahead=args.batch_size)


def images_of(parts: list[dict], refuses: Callable[[str], str | None]) -> Iterator[tuple[Name, Source]]:
    """Of all parts, in order. Those whose name the output `refuses` are not read, and the reason is their source."""
    root = os.getcwd()
    for part in parts:
        for name, source in read_part(part, root):
            reason = refuses(name)
            yield (part["index"], name), ValueError(reason) if reason else source


class Progress:
    """A bar on stderr with what limits the run; skipped images and warnings are told above it."""

    def __init__(self, total: int | None):
        self.skipped = 0
        self._bar = tqdm(total=total, unit="image", smoothing=0.1)
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> "Progress":
        self._warnings.__enter__()
        warnings.showwarning = self._warn  # Pillow's would break the bar
        return self

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        self._bar.close()

    def advance(self, images: int, limit: str = "") -> None:
        if limit:
            self._bar.set_postfix_str(limit, refresh=False)
        self._bar.update(images)

    def skip(self, name: Name, reason: str) -> None:
        self.skipped += 1
        self._bar.update()
        path = name[1] if name[1].isprintable() else repr(name[1])
        self._bar.write(f"siglip-fast: skipped {path}: {reason}", file=sys.stderr)

    def _warn(self, message: Warning | str, category: type[Warning], *_) -> None:
        self._bar.write(f"siglip-fast: {category.__name__}: {first_line(message)}", file=sys.stderr)
