"""What is measured: models, batch sizes, dtypes and, in a quick run, which compiled peers. SIGLIP_FAST_BENCH=full: all."""

import os
from typing import NamedTuple


class Case(NamedTuple):
    variant: str
    batch_size: int
    dtype: str
    rounds: int = 10

    def __str__(self) -> str:
        return f"{self.variant}-{self.batch_size}-{self.dtype}"


_VARIANTS = [
    "base-patch16-224", "base-patch16-384", "large-patch16-384",
    "so400m-patch14-224", "so400m-patch14-384", "so400m-patch14-896",
]  # fmt: skip
# The most telling first, should the time not do; last the one that torch.compile takes part in.
_QUICK = [
    ("so400m-patch14-384", 64), ("base-patch16-224", 64), ("base-patch16-224", 1),
    ("so400m-patch14-384", 1), ("so400m-patch14-384", 8), ("base-patch16-224", 8),
]  # fmt: skip
_CPU = [
    ("base-patch16-224", 1, 20),
    ("base-patch16-224", 8, 10),
    ("base-patch16-512", 1, 8),
    ("so400m-patch14-384", 1, 5),
]
CASES = {
    ("cuda", "full"): [Case(v, b, d) for v in _VARIANTS for b in (1, 8, 64, 256) for d in ("bfloat16", "float16")],
    ("cuda", "quick"): [Case(v, b, "bfloat16") for v, b in _QUICK],
    ("cpu", "full"): [Case(v, b, d, rounds) for v, b, rounds in _CPU for d in ("float32", "bfloat16")],
    ("cpu", "quick"): [Case("base-patch16-224", 1, "float32", rounds=3)],
}
# The torch.compile modes of a quick run on a GPU; on a CPU it has none.
_QUICK_MODES = {("base-patch16-224", 8): ("default", "max-autotune")}
QUICK_COMPILE_SECONDS = 80  # altogether


def extent() -> str:
    """Of this session: quick or full."""
    chosen = os.environ.get("SIGLIP_FAST_BENCH", "quick")
    if chosen not in ("quick", "full"):
        raise ValueError(f"SIGLIP_FAST_BENCH: expected quick or full, got {chosen!r}")
    return chosen


def left_out(case: Case, device: str, peer: str, compile_seconds: float) -> str | None:
    """Why a quick run does without this peer, if it does; `compile_seconds` have gone into torch.compile before."""
    kind, _, mode = peer.partition(", ")
    if extent() == "full" or kind != "torch.compile":
        return None
    if device == "cpu" or mode not in _QUICK_MODES.get((case.variant, case.batch_size), ()):
        return "a quick run leaves it out"
    if compile_seconds > QUICK_COMPILE_SECONDS:
        return f"the {QUICK_COMPILE_SECONDS} s that a quick run compiles for are used up"
    return None
