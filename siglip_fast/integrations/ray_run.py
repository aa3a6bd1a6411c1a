"""`siglip-fast embed --ray`: a collection becomes a folder of Parquet parts.

The work is cut into parts whose bounds depend on the inputs alone. Those that the folder holds already are left out, the
others go to a pool of actors. Each loads the model once, reads a part's images itself, and writes its file under a temporary
name before it takes its own. Only descriptions of parts travel through Ray. So a part that is begun again, because a worker
died or the command was started anew, ends as the same file with the same rows: nothing is lost, nothing doubled, and no state
is kept but the files. Nor are there read tasks, which would wait for ever where the actors hold every CPU.
"""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError, first_line
from ..feed.folder import Folder, settings_of
from ..feed.parts import find_parts, total_of


def run(args: Namespace) -> int:
    """The subcommand with --ray: embeds `args.paths` into the folder `args.out`, and returns the exit status."""
    parts, repeated = find_parts(args)
    args = _for_workers(args)
    folder = Folder(Path(args.out), parts)
    folder.refuse_if_foreign()
    settings = settings_of(args, parts)  # but for a dtype that only Ray's devices would decide
    notes = f", {repeated} repeated paths left out" * bool(repeated)
    if not (args.force or folder.todo()):
        folder.refuse_if_of(settings)
        folder.remove_temporaries()
        return folder.told(f"{notes}; nothing was left to do")
    from ..feed.loading import warn_of_random_weights

    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise UserError(f"--ray: {first_line(error)}; pip install -e '.[ray]' in the checkout") from error
    if args.random_weights:
        warn_of_random_weights(args.random_weights, args.seed)
    with _session(args.ray_address):
        resources = _place(args)
        folder.prepare(settings | {"dtype": args.dtype}, args.force)
        todo = folder.todo()
        start = time.perf_counter()
        try:
            now, routes = _process(ray, args, todo, folder, resources)
        finally:
            folder.remove_temporaries()
        seconds = time.perf_counter() - start
    status = folder.told(f"{notes}; {now} of them in this run, {now / seconds:.1f} images/s")
    for route in sorted(routes):
        print(f"ran on: {route} ({args.dtype} on {args.device}, {resources['actors']} workers)")
    return status


def _for_workers(args: Namespace) -> Namespace:
    """What a worker needs, wherever its working directory is."""
    model = os.path.abspath(args.model) if args.model and os.path.isdir(args.model) else args.model
    kept = {key: value for key, value in vars(args).items() if key != "paths"}
    return Namespace(**kept | {"out": os.path.abspath(args.out), "model": model})


@contextlib.contextmanager
def _session(address: str | None) -> Iterator[None]:
    """Ray: the one that this process has joined already, the cluster at `address`, or one of this machine's own."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else stderr gets its remarks about itself
        own = {"include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _silence():
            ray.init(address, logging_level="error", log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot start or join Ray at {address}: {first_line(error)}") from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # which Ray replaced by one that exits without a word
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What Ray's C++ says of itself at the start goes to stderr, past Python's; failures are exceptions."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _place(args: Namespace) -> dict[str, Any]:
    """How many actors and what each reserves; decides `args.device` and `args.dtype`, so that all workers agree.

    On GPUs, one actor each. Otherwise one a node with the node's CPUs, or as many as asked for, which share them; Ray
    gives a worker as many OpenMP threads as it reserves CPUs.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    args.device = args.device or ("cuda" if gpus else "cpu")
    if args.device not in ("cuda", "cpu"):
        raise UserError(f"--device {args.device}: Ray picks the GPU of a worker; expected cuda or cpu")
    if args.device == "cuda" and not gpus:
        raise UserError("--device cuda: Ray knows of no GPU")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.device == "cuda":
        return {"actors": args.ray_actors or gpus, "num_gpus": 1}
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    cpus = [count for count in cpus if count] or [1]
    actors = args.ray_actors or len(cpus)
    share = min(cpus) / -(-actors // len(cpus))  # of the smallest node, with equally many actors on each
    return {"actors": actors, "num_cpus": int(share) if share >= 1 else share}


def _process(ray: Any, args: Namespace, todo: list[dict], folder: Folder, resources: dict) -> tuple[int, set[str]]:
    """Has the parts written, and shows how far it is. Returns how many images that were, and what code ran the model."""
    from ray.data import ActorPoolStrategy, DataContext

    from .ray import PartWriter  # with torch, which takes seconds, like Ray

    for handler in logging.getLogger("ray.data").handlers:
        # what prints, and is Ray's own; its log file keeps everything
        if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    reserved = {key: value for key, value in resources.items() if key != "actors"}
    now, routes = 0, set()
    with DataContext.current(context), tqdm(total=total_of(folder.parts), unit="image", smoothing=0.1) as bar:
        bar.update(folder.rows_done(todo))
        texts = [{"part": json.dumps(part)} for part in todo]
        results = ray.data.from_items(texts, override_num_blocks=len(texts)).map_batches(
            PartWriter,
            fn_constructor_args=(args, os.getcwd()),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(resources["actors"], len(todo))),
            **reserved,
        )
        try:
            for result in results.iter_rows():
                if result["failure"]:
                    raise UserError(result["failure"])
                bar.update(result["rows"])
                now += result["rows"]
                routes |= {result["route"]} - {""}
        except ray.exceptions.RayActorError as error:  # workers that die before they could work
            raise UserError(f"Ray: {first_line(error)}") from error
    return now, routes
