"""`siglip-fast embed`: images in, one embedding each out, as Parquet or .npy.

find_files → embeddings (decode_ahead: threads; Encoder: batches) → a sink, whose file appears whole or not at all
"""

import contextlib
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..errors import UserError, first_line
from ..feed.paths import find_files
from ..feed.sinks import Sink, open_sink

if TYPE_CHECKING:
    from ..feed.encoder import Encoder

ONLY_RAY = ("ray_address", "ray_actors", "part_size", "image_column", "id_column")  # arguments, None if not given


def run(args: Namespace) -> int:
    """The subcommand: embeds `args.paths` into `args.out` and returns the exit status."""
    if args.ray:
        from ..integrations import ray_run

        return ray_run.run(args)
    if given := [name for name in ONLY_RAY if getattr(args, name) is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is for --ray")
    paths, repeated = find_files(args.paths)
    with open_sink(Path(args.out), args.force) as sink:  # first: a refusal should not take a minute
        from ..feed.encoder import Encoder  # nor torch

        encoder = Encoder(args)
        start = time.perf_counter()
        skipped = embed(paths, encoder, sink, args.batch_size, args.workers)
        seconds = time.perf_counter() - start
        embedded = len(paths) - skipped
        if not embedded:
            raise UserError(f"none of the {skipped} images could be used; {args.out} is not written")
    notes = f", {skipped} skipped" * bool(skipped) + f", {repeated} repeated paths left out" * bool(repeated)
    print(f"{embedded} images embedded{notes}; {embedded / seconds:.1f} images/s with decoding")
    print(f"written: {args.out}")
    print(f"ran on: {encoder.route} ({encoder.metadata['dtype']} on {encoder.device})")
    return 1 if skipped else 0


def embed(paths: list[str], encoder: "Encoder", sink: Sink, batch_size: int, workers: int) -> int:
    """Writes the embeddings to `sink`. Images that have none are named on stderr; returns their number."""
    skipped = 0

    def skip(path: str, reason: str) -> None:
        nonlocal skipped
        skipped += 1
        bar.update()
        name = path if path.isprintable() else repr(path)
        bar.write(f"siglip-fast: skipped {name}: {reason}", file=sys.stderr)

    def accepted() -> Iterator[tuple[str, str]]:
        for path in paths:
            if reason := sink.refuses(path):
                skip(path, reason)
            else:
                yield path, path

    def warn(message: Warning | str, category: type[Warning], *_) -> None:
        bar.write(f"siglip-fast: {category.__name__}: {first_line(message)}", file=sys.stderr)

    with (
        tqdm(total=len(paths), unit="image", smoothing=0.1) as bar,
        warnings.catch_warnings(),
        contextlib.closing(encoder.embeddings(accepted(), batch_size, workers, skip)) as batches,
    ):
        warnings.showwarning = warn  # Pillow's would break the bar
        for names, rows in batches:
            bar.update(len(names))
            sink.write(names, rows, encoder.metadata)
    return skipped
