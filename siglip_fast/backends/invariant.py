"""One configuration an operation, whatever the batch: what a batch-invariant triton backend runs by.

A kernel computes a row of its output from that row of its input in an order that its configuration sets: how K is cut
into blocks, tokens into splits, keys into tiles. With one configuration for every number of rows, and neither a sum in
parts (SPLIT_K) nor another tile for the last rows (TAIL), a row has the same bits in every batch. Without tensor
descriptors (TMA) no operand's address changes the kernel either. Nothing is measured, and the vendor's routes, whose
libraries choose by shape, are out.
"""

from typing import Any

import torch

from siglip_fast.kernels.attention_pool import attention_pool_config
from siglip_fast.kernels.gemm import gpu_arch
from siglip_fast.kernels.layernorm import CONFIG
from siglip_fast.kernels.tiles import Config, attention_default, attention_segments_default, gemm_default

from .choice import Choice

# What the configurations suit best: by `bench/predict.py` one that suits a batch of 1 loses more at 64 than it wins.
IMAGES, ROWS, TOKENS = 8, 2048, 256  # tokens: of images of any size


class Invariant:
    """As `siglip_fast.tuning.cache.Selection`, for one device. By the architecture alone: not by its number of SMs."""

    digest = "batch-invariant"  # equal for equal choices

    def __init__(self, device: torch.device):
        with torch.cuda.device(device if device.type == "cuda" else -1):
            self._arch = gpu_arch()
        self._memo: dict[tuple, Choice] = {}

    def settle(self, *_: Any) -> None:
        """Nothing races here."""

    def choice(
        self, name: str, dims: tuple[int, ...], dtype: torch.dtype | str, rows: int = 0, launch: str = "eager"
    ) -> Choice:
        """That of any number of rows, however it is launched; of several dtypes, joined by "+", the first one's."""
        key = (name, dims, dtype)
        found = self._memo.get(key)
        if found is None:
            first = getattr(torch, dtype.split("+")[0]) if isinstance(dtype, str) else dtype
            found = self._memo[key] = Choice("triton", _config(name, dims, first, self._arch))
        return found

    def reason(self, operation: Any, rows: int, launch: str) -> str:
        return "built-in, the same for every batch"


def _config(name: str, dims: tuple[int, ...], dtype: torch.dtype, arch: str) -> Config | dict[str, Config]:
    if name == "attention":
        return attention_default(dtype, arch, IMAGES, *dims)
    if name == "attention_segments":
        return attention_segments_default(dtype, arch, ROWS, TOKENS, *dims)
    if name == "attention_pool_segments":
        return attention_pool_config(dtype, arch, IMAGES, TOKENS)
    if name == "attention_pool":
        return attention_pool_config(dtype, arch, IMAGES, dims[0])
    return CONFIG if name == "layernorm" else gemm_default(dtype, arch, ROWS, *dims[:2])
