"""`siglip-fast embed`: images in, one embedding each out, as Parquet, .npy or a folder of Parquet parts.

find_parts → images_of → Threads or Processes (decoding) → Encoder (batches) → a sink, whose file appears whole or not at all
"""

import contextlib
import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..feed.parts import find_parts, total_of
from ..feed.server import start_server
from ..feed.sinks import open_sink
from .feeding import Progress, are_many, images_of, workers_for

if TYPE_CHECKING:
    import numpy as np

    from ..feed.workers import Prepared

ONLY_RAY = ("ray_address", "ray_actors")  # arguments, None if not given


def run(args: Namespace) -> int:
    """The subcommand: embeds `args.paths` into `args.out` and returns the exit status."""
    if args.ray and args.dry_run:
        raise UserError("--dry-run measures this machine's feed, without --ray")
    if not args.dry_run and not args.out:
        raise UserError("expected --out, which only --dry-run does without")
    if args.ray:
        from ..integrations import ray_run

        return ray_run.run(args)
    if given := [name for name in ONLY_RAY if getattr(args, name) is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is for --ray")
    parts, repeated = find_parts(args)
    if args.dry_run:
        from .dry_run import measure

        return measure(args, parts)
    notes = f", {repeated} repeated paths left out" * bool(repeated)
    if _names_folder(args.out):
        return _into_folder(args, parts, notes)
    if args.part_size:
        raise UserError("--part-size is for a folder as --out")
    return _into_file(args, parts, notes)


def _names_folder(out: str) -> bool:
    path = Path(out)
    if path.suffix in (".parquet", ".npy"):
        return False
    if path.is_dir() or out.endswith("/") or not path.suffix:
        return True
    raise UserError(f"--out {out}: expected a name that ends in .parquet or .npy; a folder's has no dot, or ends in /")


def _into_file(args: Namespace, parts: list[dict], notes: str) -> int:
    with open_sink(Path(args.out), args.force) as sink:  # first: a refusal should not take a minute
        run = Run(args, parts)
        with Progress(total_of(parts)) as progress, run.prepared(parts, sink.refuses) as prepared:
            for names, rows in run.embeddings(prepared, progress, progress.skip):
                sink.write([name for _, name in names], rows, run.encoder.metadata)
        if not (embedded := run.images - progress.skipped):
            raise UserError(f"none of the {progress.skipped} images could be used; {args.out} is not written")
    print(
        f"{embedded} images embedded" + f", {progress.skipped} skipped" * bool(progress.skipped) + notes + run.speed()
    )
    print(f"written: {args.out}")
    run.tell()
    return 1 if progress.skipped else 0


def _into_folder(args: Namespace, parts: list[dict], notes: str) -> int:
    from ..feed.folder import Folder, open_part, settings_of

    folder = Folder(Path(args.out), parts)
    folder.refuse_if_foreign()
    settings = settings_of(args, parts)  # but for a dtype that only the device would decide
    if not args.force:
        folder.refuse_if_of(settings)
    todo = parts if args.force else folder.todo()
    if not todo:
        folder.remove_temporaries()
        return folder.told(f"{notes}; nothing was left to do")
    run = Run(args, todo)
    folder.prepare(settings | {"dtype": run.encoder.metadata["dtype"]}, args.force)
    with Progress(total_of(parts)) as progress, run.prepared(todo) as prepared:
        progress.advance(folder.rows_done(todo))
        for index, images in itertools.groupby(prepared, key=lambda image: image[0][0]):
            with open_part(folder.path, parts[index], run.encoder) as sink:

                def skip(name: tuple[int, str], reason: str, sink=sink) -> None:
                    progress.skip(name, reason)
                    sink.errors.append((name[1], reason))

                for names, rows in run.embeddings(images, progress, skip):
                    sink.write([name for _, name in names], rows, run.encoder.metadata)
    status = folder.told(f"{notes}; {run.images} of them in this run{run.speed()}")
    run.tell()
    return status


class Run:
    """The model, what decodes for it, and how fast they were."""

    def __init__(self, args: Namespace, parts: list[dict]):
        if are_many(parts):
            start_server()  # its imports take as long as those below
        from ..feed.encoder import Encoder
        from ..feed.meter import Meter

        self._batch_size = args.batch_size
        self.encoder = Encoder(args)
        self.workers = workers_for(args, parts, self.encoder.prepare)
        self.meter, self._start = Meter(), time.perf_counter()
        self.images = 0  # that came out, as an embedding or as skipped

    @contextlib.contextmanager
    def prepared(self, parts: list[dict], refuses: Callable[[str], str | None] = lambda name: None) -> Iterator:
        """The parts' images, prepared, and nobody at work behind the block."""
        with contextlib.closing(self.workers.prepared(images_of(parts, refuses))) as prepared:
            yield self._counted(prepared)

    def _counted(self, prepared: "Iterable[Prepared]") -> "Iterator[Prepared]":
        for image in prepared:
            self.images += 1
            yield image

    def embeddings(
        self, prepared: "Iterable[Prepared]", progress: Progress, skip: Callable
    ) -> "Iterator[tuple[list, np.ndarray]]":
        for names, rows in self.encoder.embeddings(prepared, self._batch_size, skip, self.meter):
            progress.advance(len(names), self.meter.limit(self.workers))
            yield names, rows

    def speed(self) -> str:
        return f"; {self.images / (time.perf_counter() - self._start):.1f} images/s with decoding"

    def tell(self) -> None:
        """What ran, and what limits it."""
        print(
            f"ran on: {self.encoder.route} ({self.encoder.metadata['dtype']} on {', '.join(map(str, self.encoder.devices))})"
        )
        if limit := self.meter.limit(self.workers):
            print(f"{limit} ({self.workers.number} {type(self.workers).__name__.lower()} decode)")
