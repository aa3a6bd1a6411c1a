"""Measure, on this GPU, how each operation of a model runs fastest: `siglip-fast tune`, `model.tune()`.

Every configuration of our kernels and every vendor route with the same contract is run in a process of its own,
verified, and timed in turns (`child`, `worker`, `select`); what won goes into the cache (`siglip_fast.tuning.cache`) at once.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import PretrainedConfig

from ..backends.select import backend_for
from ..errors import check_counts, typed_line
from . import cache
from .cache import Entries, Key
from .cases import Case, encode
from .child import PREPARATION, WORKER, WorkerDied, events_of
from .packed_cases import cases_of, usual_tokens
from .select import unmeasured

logger = logging.getLogger("siglip_fast")

FIRST_CONTACT_BUDGET = 300.0  # seconds
NO_TIME = "there was no time for it"
STALL = 120.0  # seconds that one candidate may take, compilation included, before it counts as hanging


class Report(NamedTuple):
    """What a tuning run did. `entries` are those of `cases`, without the ones that are `left` for want of time."""

    entries: dict[Case, dict]
    left: list[Case]
    path: Path


def tune(
    config: PretrainedConfig,
    dtype: torch.dtype,
    batch_sizes: Sequence[int],
    device: torch.device,
    *,
    tokens: int | None = None,
    budget: float = 900.0,
    force: bool = False,
    worker: Sequence[str] = WORKER,
    stall: float = STALL,
) -> Report:
    """Measure the operations of a model on a device and write the cache; what it holds is measured again if `force`.

    Args:
        config: the vision model's; its weights do not matter.
        batch_sizes: images a forward.
        tokens: patches an image. Default: those of the config's image_size; of images of any size, which are measured in a mix
            of sizes with as many patches in all, those of its num_patches, or 1024.
        budget: seconds after which no further candidate is started.
        worker: the command that runs candidates.
        stall: seconds without news after which a candidate is taken to hang.

    Raises:
        ValueError: a batch size is no positive integer.
        RuntimeError: the Triton kernels cannot run on the device, or the worker does not start.
    """
    check_counts(batch_sizes=[*batch_sizes])
    device = _with_index(device)
    backend_for("triton", device)  # raises where it cannot run
    if tokens is None:
        tokens = usual_tokens(config)
    todo = cases_of(config, tokens, dtype, batch_sizes)
    key = Key.of(device)
    with _lock(key):
        return _tune(todo, key, device, budget, force, worker, stall)


def first_contact(
    config: PretrainedConfig, dtype: torch.dtype, batch_size: int, tokens: int, device: torch.device
) -> None:
    """With SIGLIP_FAST_TUNE=auto: measure what the cache holds nothing about, once. Never fails; says what it does."""
    if cache.mode() != "auto":
        return
    device = _with_index(device)
    key = Key.of(device)
    wanted = cases_of(config, tokens, dtype, [batch_size])
    try:
        if _all_known(wanted, key):
            return
        with _lock(key):
            if _all_known(wanted, key):  # by another process, while this one waited
                return
            logger.warning("measuring kernel configurations for %s, once (SIGLIP_FAST_TUNE=auto)", key.gpu)
            report = _tune(wanted, key, device, FIRST_CONTACT_BUDGET, False, WORKER, STALL)
            known = cache.read(key)
            for case in report.left:  # or every process would try again what there was no time for
                entry = _find(known, case) or unmeasured(NO_TIME)
                entry["dropped"]["all"] = NO_TIME
                cache.update(key, {str(case.operation): {_bucket(case): entry}})
    except Exception as error:
        logger.warning("measuring failed, the built-in configurations stay in force: %s", typed_line(error))


def _all_known(wanted: list[Case], key: Key) -> bool:
    known = cache.read(key)

    def sought(entry: dict) -> bool:
        return not cache.is_raced(entry) or "all" in entry["dropped"]

    return all(any(map(sought, known.get(str(case.operation), {}).values())) for case in wanted)


def _tune(
    todo: list[Case], key: Key, device: torch.device, budget: float, force: bool, worker: Sequence[str], stall: float
) -> Report:
    entries = cache.read(key)
    wanted = [case for case in todo if force or not cache.is_tuned(_find(entries, case))]
    _measure(wanted, entries, key, device, time.monotonic() + budget, worker, stall)
    found = {case: entry for case in todo if (entry := _find(entries, case)) and not cache.is_raced(entry)}
    return Report(found, [case for case in todo if case not in found], key.path())


def _measure(
    wanted: list[Case],
    entries: Entries,
    key: Key,
    device: torch.device,
    deadline: float,
    command: Sequence[str],
    stall: float,
) -> None:
    """Fill `entries`, starting the worker again without the candidate that ended it."""
    skipped: dict[Case, dict[str, str]] = {case: {} for case in wanted}
    names = {str(case): case for case in wanted}

    def done(case: Case, entry: dict) -> None:
        entries.setdefault(str(case.operation), {})[_bucket(case)] = entry
        cache.update(key, {str(case.operation): {_bucket(case): entry}})
        del skipped[case]
        bar.update()

    with tqdm(total=len(wanted), unit="case", desc="tuning", disable=None) as bar:
        while skipped and time.monotonic() < deadline:
            case, candidate, started = None, None, False
            request = {
                "device": str(device),
                "seconds": deadline - time.monotonic(),
                "cases": [(encode(case), reasons) for case, reasons in skipped.items()],
            }
            try:
                for event in events_of(command, request, stall):
                    case, candidate, started = names[event["case"]], event.get("candidate"), True
                    if candidate is None:
                        done(case, event["entry"])
                    else:
                        bar.set_postfix_str(f"{case.operation.name}: {candidate}", refresh=False)
                return  # all done, or out of time
            except WorkerDied as death:
                if not started:
                    raise RuntimeError(f"the tuning process failed before it began: {death}") from death
                if candidate is not None:
                    logger.warning("tuning %s: %s %s", case, candidate, death)
                    skipped[case][candidate] = str(death)
                    if candidate == PREPARATION:
                        done(case, unmeasured(str(death)))


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _find(entries: Entries, case: Case) -> dict | None:
    return entries.get(str(case.operation), {}).get(_bucket(case))


def _bucket(case: Case) -> str:
    return str(cache.bucket(case.rows))


def _lock(key: Key) -> FileLock:
    """Of the key: two processes do not measure the same thing, nor beside each other."""
    path = key.path().with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        logger.warning("another process is tuning for %s: waiting for it", key.gpu)
    return lock
