"""Measure, on this GPU, how each operation of a model runs fastest: `siglip-fast tune`, `model.tune()`.

Every configuration of our kernels and every vendor route with the same contract is run in a process of its own,
verified, and timed in turns (`worker`, `select`); what won goes into the cache (`siglip_fast.selection`) at once.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm
from transformers import SiglipVisionConfig

from .. import selection
from ..backends.select import backend_for
from ..loading import UserError, first_line
from ..selection import Entries, Key
from .cases import Case, cases, encode
from .select import unmeasured

logger = logging.getLogger("siglip_fast")

WORKER = [sys.executable, "-m", "siglip_fast.tuning.worker"]
FIRST_CONTACT_BUDGET = 300.0  # seconds
STALL = 120.0  # seconds that one candidate may take, compilation included, before it counts as hanging


class Report(NamedTuple):
    """What a tuning run did. `entries` are those of `cases`, without the ones that are `left` for want of time."""

    entries: dict[Case, dict]
    left: list[Case]
    path: Path


def tune(
    config: SiglipVisionConfig,
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
        config: the model's SiglipVisionConfig; its weights do not matter.
        batch_sizes: images a forward.
        tokens: patches an image. Default: those of the config's image_size.
        budget: seconds after which no further candidate is started.
        worker: the command that runs candidates.
        stall: seconds without news after which a candidate is taken to hang.

    Raises:
        ValueError: a batch size is no positive integer.
        RuntimeError: the Triton kernels cannot run on the device, or the worker does not start.
    """
    for size in batch_sizes:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_sizes: expected positive integers, got {size!r}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    backend_for("triton", device)  # raises where it cannot run
    key = Key.of(device)
    if tokens is None:
        tokens = (config.image_size // config.patch_size) ** 2
    todo = cases(config, tokens, dtype, batch_sizes)
    with _lock(key):
        entries = selection.read(key)
        wanted = [case for case in todo if force or not _is_measured(_find(entries, case))]
        try:
            _measure(wanted, entries, key, device, time.monotonic() + budget, worker, stall)
        finally:
            selection.write(key, entries)
    found = {case: entry for case in todo if (entry := _find(entries, case))}
    return Report(found, [case for case in todo if case not in found], key.path())


def first_contact(
    config: SiglipVisionConfig, dtype: torch.dtype, batch_size: int, tokens: int, device: torch.device
) -> None:
    """With SIGLIP_FAST_TUNE=auto: measure what the cache holds nothing about, once. Never fails; says what it does."""
    if selection.mode() != "auto":
        return
    key = Key.of(device)
    wanted = cases(config, tokens, dtype, [batch_size])
    known = selection.read(key)
    if all(str(case.operation) in known for case in wanted):
        return
    logger.warning("measuring kernel configurations for %s, once (SIGLIP_FAST_TUNE=auto)", key.gpu)
    reason = "there was no time for it"
    try:
        tune(config, dtype, [batch_size], device, tokens=tokens, budget=FIRST_CONTACT_BUDGET)
    except Exception as error:
        reason = _say_failed(error)
    try:
        with _lock(key):
            entries = selection.read(key)
            for case in wanted:  # what was not measured is noted, or every process would try it again
                entries.setdefault(str(case.operation), {}).setdefault(_bucket(case), unmeasured(reason))
            selection.write(key, entries)
    except (OSError, UserError) as error:  # a cache folder that may not be written to
        _say_failed(error)


def _say_failed(error: Exception) -> str:
    reason = f"{type(error).__name__}: {first_line(error)}"
    logger.warning("measuring failed, the built-in configurations stay in force: %s", reason)
    return reason


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
    with tqdm(total=len(wanted), unit="case", desc="tuning", disable=None) as bar:
        while skipped and time.monotonic() < deadline:
            current, candidate = None, None
            request = {
                "device": str(device),
                "seconds": deadline - time.monotonic(),
                "cases": [(encode(case), reasons) for case, reasons in skipped.items()],
            }
            try:
                for event in _events(command, request, stall):
                    current = names[event["case"]]
                    if "entry" in event:
                        entries.setdefault(str(current.operation), {})[_bucket(current)] = event["entry"]
                        selection.write(key, entries)
                        del skipped[current]
                        current = None
                        bar.update()
                    else:
                        candidate = event["candidate"]
                        bar.set_postfix_str(f"{current.operation.name}: {candidate}")
            except WorkerDied as death:
                if current is None:
                    raise RuntimeError(
                        f"the tuning process failed before any candidate ran: {death}"
                    ) from death
                logger.warning("tuning %s: %s %s", current, candidate, death)
                skipped[current][candidate] = str(death)
            else:
                return  # all done, or out of time


class WorkerDied(Exception):
    """The worker ended by a crash, or had to be ended because it hung."""


def _events(command: Sequence[str], request: dict, stall: float) -> Iterator[dict]:
    """The worker's events, until it ends by itself with exit status 0."""
    # Not "auto" in there: the worker measures, it does not ask for measurements.
    environment = os.environ | {"SIGLIP_FAST_TUNE": "off"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []

    def pump() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threads = [threading.Thread(target=pump, daemon=True)]
    threads += [threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)]
    for thread in threads:
        thread.start()
    try:
        with process.stdin as stdin:
            json.dump(request, stdin)
        while (line := lines.get(timeout=stall)) is not None:
            yield json.loads(line)
        if status := process.wait():
            threads[1].join(timeout=1)
            last = errors[-1].strip() if errors else "no message"
            raise WorkerDied(f"ended the process (exit status {status}: {last})")
    except BrokenPipeError:
        raise WorkerDied(f"did not read its request (exit status {process.wait()})") from None
    except queue.Empty:
        raise WorkerDied(f"gave no result in {stall:.0f} s") from None
    finally:
        process.kill()
        process.wait()


def _find(entries: Entries, case: Case) -> dict | None:
    return entries.get(str(case.operation), {}).get(_bucket(case))


def _is_measured(entry: dict | None) -> bool:
    return bool(entry and entry["microseconds"])


def _bucket(case: Case) -> str:
    return str(selection.bucket(case.rows))


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
