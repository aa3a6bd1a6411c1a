"""What was measured on this GPU, by `siglip-fast tune` or in a race: the cache file, and the choice it holds for an operation.

One JSON file a key (GPU, driver, libraries, kernel sources), written whole or not at all, which people can ship: a file
whose key is not this machine's is ignored. Tables go by operation, fixed shape and dtype, then by the number of rows,
rounded up to a power of two, then by how the operation is launched: eagerly, or from a CUDA graph. An entry of a race
(`siglip_fast.tuning.race`) says so: tuning replaces it, and goes before it.
"""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from ..backends.choice import DEFAULT, Choice
from ..files import atomic

logger = logging.getLogger("siglip_fast")

FORMAT = 1
MODES = ("off", "cached", "auto")


class Operation(NamedTuple):
    """An operation of `siglip_fast.ops` on a fixed shape: what a table is about.

    dims: patch_embed (D, K, patch_size, tokens); layernorm_linear (out, in, activation); attention (tokens, heads, head_dim);
    linear_residual (out, in, with residual); layernorm (D); attention_pool (tokens, D, heads). Of packed images:
    patch_embed_rows (D, K, taps); layernorm_linear also (…, rows side by side, head_dim of a rotation or 0); linear (out, in, activation);
    attention_segments (heads, head_dim); layernorm of some rows (D, 1); attention_pool_segments (D, heads). dtype: where its
    tensors are of several, their names, which nobody tunes for.
    """

    name: str
    dims: tuple[int, ...]
    dtype: torch.dtype | str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {'x'.join(str(int(dim)) for dim in self.dims)} {dtype}"


class Key(NamedTuple):
    """What a measurement holds for."""

    gpu: str
    driver: str
    torch: str
    triton: str
    cudnn: str
    flash_attn: str
    kernels: str  # hash of the sources

    @classmethod
    def of(cls, device: torch.device) -> "Key":
        import triton

        return cls(
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            driver=_driver(),
            torch=torch.__version__,
            triton=triton.__version__,
            cudnn=str(torch.backends.cudnn.version()),
            flash_attn=version_of("flash_attn") or "none",
            kernels=source_hash(),
        )

    def path(self) -> Path:
        """Of the cache file, which need not exist."""
        digest = hashlib.sha256("\n".join(self).encode()).hexdigest()[:16]
        return cache_dir() / f"{re.sub(r'[^A-Za-z0-9]+', '-', self.gpu).strip('-')}-{digest}.json"


def mode() -> str:
    """SIGLIP_FAST_TUNE: "off" (built-in defaults), "cached" (what was measured, by tuning or a race; the default) or "auto"
    (tune at the first forward on a GPU whose cache file does not know the model). Raises ValueError where it is something else."""
    value = os.environ.get("SIGLIP_FAST_TUNE") or "cached"
    if value not in MODES:
        raise ValueError(f"SIGLIP_FAST_TUNE: expected one of {', '.join(MODES)}, got {value!r}")
    return value


def cache_dir() -> Path:
    """SIGLIP_FAST_CACHE_DIR, or siglip_fast in the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    if folder := os.environ.get("SIGLIP_FAST_CACHE_DIR"):
        return Path(folder)
    # Not Path.home(), which raises where there is no home: such a user has no cache file, and can run a forward.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "siglip_fast"


def bucket(rows: int) -> int:
    """The next power of two."""
    return 1 << max(rows - 1, 0).bit_length()


LAUNCHES = ("eager", "graph")
FARTHEST = 2  # powers of two that the number of rows may be away from one that was measured
Entries = dict[str, dict[str, dict]]  # str(Operation): {str(bucket): what siglip_fast.tuning.select or race found}
WRITING = 10.0  # seconds to wait for another process that writes the file, which takes it milliseconds


def read(key: Key) -> Entries:
    """The entries of the key's cache file; none if there is no such file, or it is not one that can be used."""
    path = key.path()
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["key"] != key._asdict():
            raise ValueError("it is another version's or another machine's")
        if content["digest"] != _digest(content["operations"]):
            raise ValueError("it was changed")
        return content["operations"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("ignoring the measured configurations in %s: %s", path, error)
        return {}


def write(key: Key, entries: Entries) -> None:
    path = key.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "key": key._asdict(), "digest": _digest(entries), "operations": entries}
    with atomic(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def update(key: Key, found: Entries, replace: bool = True) -> Entries:
    """Add entries to the cache file, whatever others added meanwhile; without `replace` only where it has none. Returns
    what it then holds. Raises OSError or UserError where it cannot be written."""
    path = key.path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".write.lock"), timeout=WRITING):
        entries = merged(read(key), found, replace)
        write(key, entries)
    return entries


def merged(entries: Entries, others: Entries, replace: bool) -> Entries:
    """Both, those of `others` going before if they are to replace."""
    both = dict(entries)
    for operation, buckets in others.items():
        known = entries.get(operation, {})
        both[operation] = known | buckets if replace else buckets | known
    return both


def _digest(entries: Entries) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def is_measured(entry: dict | None) -> bool:
    """Whether an entry tells of a candidate that ran; else the default stays in force, and there is a reason why."""
    return bool(entry and any(entry[launch]["microseconds"] for launch in LAUNCHES))


def is_raced(entry: dict) -> bool:
    """Whether it tells of a race, and not of a search."""
    return entry.get("raced", False)


def is_tuned(entry: dict | None) -> bool:
    """Whether it tells of a search in which a candidate ran."""
    return is_measured(entry) and not is_raced(entry)


class Selection:
    """The choices for one device. Operations that nobody measured there run on their defaults."""

    def __init__(self, entries: Entries):
        self.entries = entries
        self.digest = _digest(entries)  # equal for equal choices
        self._memo: dict[tuple, Choice] = {}

    @classmethod
    def load(cls, device: torch.device) -> "Selection":
        """As SIGLIP_FAST_TUNE says, from the cache."""
        if mode() == "off":
            return cls({})
        key = Key.of(device)
        entries = read(key)
        tuned = any(is_tuned(entry) for buckets in entries.values() for entry in buckets.values())
        if not tuned and device.type == "cuda":
            _say_untuned(key.gpu)
        return cls(entries)

    def settle(
        self, name: str, dims: tuple[int, ...], dtype: torch.dtype | str, rows: int, run: Callable, args: tuple
    ) -> None:
        """To be called before a `choice` is made for an operation that `run(choice, *args)` runs. Here what the file holds
        is all; `siglip_fast.tuning.race.Racing` measures what it does not."""

    def choice(
        self, name: str, dims: tuple[int, ...], dtype: torch.dtype | str, rows: int, launch: str = "eager"
    ) -> Choice:
        """That of the nearest number of rows that was measured, if it is near; else DEFAULT. `launch`: of LAUNCHES."""
        memo, key = self._memo, (name, dims, dtype, bucket(rows), launch)
        found = memo.get(key)
        if found is None:
            found = memo[key] = self._find(Operation(name, dims, dtype), rows, launch)
        return found

    def choices(self, name: str, dims: tuple[int, ...], dtype: torch.dtype | str) -> list[Choice]:
        """Those for any number of rows, however they are launched."""
        entries = self.entries.get(str(Operation(name, dims, dtype)), {}).values()
        found = [entry[launch] for entry in entries for launch in LAUNCHES]
        return [Choice(entry["route"], entry["config"]) for entry in found if entry["route"]]

    def reason(self, operation: Operation, rows: int, launch: str) -> str:
        """Why `choice` answers as it does, in words."""
        entry = self.nearest(operation, rows)
        if entry is None:
            return "built-in, not measured"
        found = entry[launch]
        if not found["route"]:
            return f"built-in, nothing passed: {'; '.join(entry['dropped'].values())}"
        times = found["microseconds"]
        own = times[str(Choice(found["route"], found["config"]))]
        vendor = min((t for name, t in times.items() if not name.startswith(DEFAULT.route)), default=None)
        how = "raced" if is_raced(entry) else "measured"
        return f"{how}: {own} µs" + (f", the vendor's best {vendor} µs" if vendor else "")

    def nearest(self, operation: Operation, rows: int) -> dict | None:
        """The entry that holds for so many rows; a tuned one before a raced one."""
        # Rows are powers of two, so the nearer one is the one with fewer bits of difference; of two, the larger.
        wanted = bucket(rows).bit_length()
        buckets = self.entries.get(str(operation), {})
        near = [b for b in buckets if abs(int(b).bit_length() - wanted) <= FARTHEST]
        order = lambda b: (is_raced(buckets[b]), abs(int(b).bit_length() - wanted), -int(b))  # noqa: E731
        return buckets[min(near, key=order)] if near else None

    def _find(self, operation: Operation, rows: int, launch: str) -> Choice:
        entry = self.nearest(operation, rows)
        found = entry and entry[launch]
        return Choice(found["route"], found["config"]) if found and found["route"] else DEFAULT


@functools.cache
def source_hash() -> str:
    """Of all that decides how an operation runs: kernels and routes."""
    from siglip_fast import backends, kernels

    files = [*Path(kernels.__file__).parent.glob("*.py"), *Path(backends.__file__).parent.glob("*.py")]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.parent.name, file.name)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        if version := re.search(r"\d+\.\d+(\.\d+)*", lines[0] if lines else ""):
            return version.group()
    return "unknown"


@functools.cache
def _say_untuned(gpu: str) -> None:
    logger.warning(
        "nothing is tuned for %s: each operation runs by its built-in configuration or the vendor's route; "
        "`siglip-fast tune` searches all",
        gpu,
    )
