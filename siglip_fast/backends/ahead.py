"""Kernels compiled and loaded before they are needed: when an operation is first called, those of every batch size.

Triton compiles a kernel at its first launch, which takes a second, and loads it then, which is an error while a user
captures a CUDA graph. Which kernel a call launches depends on how many rows it has; which ones there can be does not.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from siglip_fast.kernels.attention_pool import attention_pool_config
from siglip_fast.kernels.gemm import device_guard
from siglip_fast.kernels.tiles import attention_default, attention_segments_default, gemm_defaults

from .choice import Choice
from .select import is_capturing

logger = logging.getLogger("siglip_fast")

BATCH_SIZES = [*range(1, 257), 512, 1024]  # between which attention changes its tiles
PATCHES = 1024  # of an image of any size, with which every tile of the pool's appears
# Operation: configurations of its defaults, of `siglip_fast.tuning.cache.Operation`'s dims, dtype and architecture.
DEFAULTS: dict[str, Callable[[tuple, torch.dtype, str], Iterable[dict]]] = {
    "patch_embed": lambda dims, dtype, arch: gemm_defaults(dtype, arch, dims[1]),
    "patch_embed_rows": lambda dims, dtype, arch: gemm_defaults(dtype, arch, dims[1]),
    "layernorm_linear": lambda dims, dtype, arch: gemm_defaults(dtype, arch, dims[1], tma=True),
    "linear": lambda dims, dtype, arch: gemm_defaults(dtype, arch, dims[1], tma=True),
    "linear_residual": lambda dims, dtype, arch: gemm_defaults(dtype, arch, dims[1], tma=True, split=True),
    "attention": lambda dims, dtype, arch: [attention_default(dtype, arch, B, *dims) for B in BATCH_SIZES],
    "attention_segments": lambda dims, dtype, arch: [
        attention_segments_default(dtype, arch, M, longest, *dims) for M in (1, 1 << 20) for longest in (1, 64)
    ],
    "attention_pool": lambda dims, dtype, arch: [attention_pool_config(dtype, arch, B, dims[0]) for B in BATCH_SIZES],
    "attention_pool_segments": lambda dims, dtype, arch: [
        attention_pool_config(dtype, arch, B, PATCHES) for B in BATCH_SIZES
    ],
    "layernorm": lambda dims, dtype, arch: [],
}


class Loader:
    """Remembers for which operations everything is loaded."""

    def __init__(self):
        self._loaded: set[tuple] = set()
        self._lock = threading.Lock()

    def load(self, key: tuple, tensor: torch.Tensor, choices: Callable[[], Iterable[Choice]], run: Callable) -> None:
        """Once for a key: `run(choice)`, on inputs as small as can be, for each of `choices()`."""
        if key in self._loaded or not applies(tensor) or is_capturing(tensor):
            return
        with self._lock:
            if key in self._loaded:
                return
            with device_guard(tensor):
                distinct = list({str(choice): choice for choice in choices()}.values())
            logger.debug("compiling or loading %d kernels of %s", len(distinct), key[0])
            # A library keeps workspaces for each thread; and a kernel's first launch makes what the others fill.
            alone = [choice for choice in distinct if choice.route != "triton" or choice is distinct[0]]
            for choice in alone:
                _attempt(run, choice)
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                list(pool.map(lambda choice: _attempt(run, choice), [c for c in distinct if c not in alone]))
            self._loaded.add(key)


def applies(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _attempt(run: Callable[[Choice], Any], choice: Choice) -> None:
    try:
        with torch.no_grad():
            run(choice)
    except Exception as error:  # it is no error before somebody needs this one: then it is raised again
        logger.debug("%s does not run here: %s", choice, error)
