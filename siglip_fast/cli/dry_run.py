"""`siglip-fast embed --dry-run`: the feed alone. Decodes and batches as for the model, and says how fast that is."""

import math
import time
from argparse import Namespace

from ..errors import UserError
from ..feed.parts import total_of
from ..feed.server import start_server
from .feeding import Progress, are_many, images_of, workers_for


def measure(args: Namespace, parts: list[dict]) -> int:
    """Returns the exit status: 1 if images could not be read. Of the model only config and image processor are loaded."""
    if args.out:
        raise UserError("--dry-run writes nothing: leave out --out")
    start = time.perf_counter()
    if are_many(parts):
        start_server()
    from ..feed.encoder import prepare_of
    from ..feed.kinds import batch_of
    from ..models.variants import load_config

    workers = workers_for(args, parts, prepare_of(args, load_config(args)))
    with Progress(total_of(parts)) as progress:
        batch, images, first = [], 0, None
        for name, result in workers.prepared(images_of(parts, lambda name: None)):
            images += 1
            first = first or time.perf_counter()
            if isinstance(result, str):
                progress.skip(name, result)
                continue
            progress.advance(1)
            batch.append(result)
            if len(batch) == args.batch_size:
                batch_of(batch)
                batch = []
    seconds = time.perf_counter() - first
    kind = type(workers).__name__.lower()
    if images == progress.skipped:
        raise UserError(f"none of the {images} images could be used")
    print(f"{images} images prepared" + f", {progress.skipped} of them could not be" * bool(progress.skipped))
    # the first image ends the start; it is none of those that took `seconds`
    if rate := (images - 1) / seconds:
        each = rate / workers.number
        print(
            f"{rate:.1f} images/s by {workers.number} {kind}, {each:.1f} each, behind the first after {first - start:.1f} s"
        )
        print(f"1,000 images/s would take {math.ceil(1000 / each)} cores like these")
    return 1 if progress.skipped else 0
