"""What is measured: models, batch sizes, dtypes and which compiled peers, by SIGLIP_FAST_BENCH: quick, second, full or robots."""

import os
from typing import NamedTuple

from environment import IMITATED
from transformers import SiglipVisionConfig

from siglip_fast.models.variants import config_for


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
_IMITATED = bool(
    os.environ.get("SIGLIP_FAST_IMITATED_GPU")
)  # nothing is measured then: as little as shows that it runs
_ROUNDS = 2 if _IMITATED else 7  # of a short run
# The most telling first, should the time not do
_QUICK = [("base-patch16-224", 64), ("base-patch16-224", 1), ("base-patch16-224", 8)]
_SECOND = [("so400m-patch14-384", 64), ("base-patch16-224", 64), ("so400m-patch14-384", 1), ("base-patch16-224", 1)]
_CPU = [
    ("base-patch16-224", 1, 20),
    ("base-patch16-224", 8, 10),
    ("base-patch16-512", 1, 8),
    ("so400m-patch14-384", 1, 5),
]
CASES = {
    ("cuda", "full"): [Case(v, b, d) for v in _VARIANTS for b in (1, 8, 64, 256) for d in ("bfloat16", "float16")],
    ("cuda", "quick"): [Case(v, b, "bfloat16", _ROUNDS) for v, b in _QUICK],
    ("cuda", "robots"): [Case("so400m-patch14-224", views, "bfloat16") for views in (1, 2, 3)],  # docs/robots.md
    ("cuda", "second"): [Case(v, b, "bfloat16", _ROUNDS) for v, b in _SECOND],
    ("cpu", "full"): [Case(v, b, d, rounds) for v, b, rounds in _CPU for d in ("float32", "bfloat16")],
    ("cpu", "quick"): [Case("base-patch16-224", 1, "float32", rounds=3)],
    ("cpu", "robots"): [Case("so400m-patch14-224", views, "bfloat16", rounds=7) for views in (1, 2, 3)],
    ("cpu", "second"): [Case("base-patch16-224", 1, "float32", rounds=3)],
}
# The torch.compile modes on a GPU, by extent and model; on a CPU only a full run has any.
_MODES = {("quick", "base-patch16-224"): ("default",), ("second", "base-patch16-224"): ("max-autotune",)}
COMPILE_SECONDS = {"quick": 45, "second": 90}  # altogether, after which no further compilation is started


def config_of(case: Case) -> SiglipVisionConfig:
    config = config_for(case.variant)
    if IMITATED:
        config.num_hidden_layers = 2
    return config


def extent() -> str:
    """Of this session: quick, second, full or robots."""
    chosen = os.environ.get("SIGLIP_FAST_BENCH", "quick")
    if chosen not in ("quick", "second", "full", "robots"):
        raise ValueError(f"SIGLIP_FAST_BENCH: expected quick, second, full or robots, got {chosen!r}")
    return chosen


def left_out(case: Case, device: str, peer: str, compile_seconds: float) -> str | None:
    """Why a session does without this peer, if it does; `compile_seconds` have gone into torch.compile before."""
    kind, _, mode = peer.partition(", ")
    if extent() in ("full", "robots") or kind != "torch.compile":
        return None
    if device == "cpu" or mode not in _MODES.get((extent(), case.variant), ()):
        return f"a {extent()} run leaves it out"
    if compile_seconds > COMPILE_SECONDS[extent()]:
        return f"the {COMPILE_SECONDS[extent()]} s that a {extent()} run compiles for are used up"
    return None
