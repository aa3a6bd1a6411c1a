"""What may run an operation: the configurations of our kernels, and the vendor's routes."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from siglip_fast.kernels.attention import attention_configs
from siglip_fast.kernels.attention_pool import attention_pool_configs
from siglip_fast.kernels.attention_segments import attention_segments_configs
from siglip_fast.kernels.gemm import gpu_arch
from siglip_fast.kernels.layernorm import layernorm_configs
from siglip_fast.kernels.layernorm_linear import layernorm_linear_configs
from siglip_fast.kernels.linear_residual import linear_residual_configs
from siglip_fast.kernels.patch_embed import patch_embed_configs

from ..backends import vendor
from ..backends.choice import DEFAULT, Choice
from ..backends.triton import Backend
from .cases import Case
from .packed_cases import PATCHES


def candidates(case: Case) -> list[Choice]:
    """The default first, then the kernel's other configurations, then the vendor's routes."""
    (name, dims, dtype), rows = case
    arch = gpu_arch()
    configs = {
        "patch_embed": lambda: patch_embed_configs(dtype, arch, rows, *dims[:2]),
        "patch_embed_rows": lambda: patch_embed_configs(dtype, arch, rows, *dims[:2]),
        "layernorm_linear": lambda: layernorm_linear_configs(dtype, arch, rows, *dims[:2]),
        "linear": lambda: layernorm_linear_configs(dtype, arch, rows, *dims[:2]),
        "attention": lambda: attention_configs(dtype, arch, rows, *dims),
        "attention_segments": lambda: attention_segments_configs(dtype, arch, rows, *dims),
        "linear_residual": lambda: linear_residual_configs(dtype, arch, rows, *dims[:2]),
        "layernorm": layernorm_configs,
        "attention_pool": lambda: attention_pool_configs(dtype, arch, rows, dims[0]),
        "attention_pool_segments": lambda: attention_pool_configs(dtype, arch, rows, PATCHES),
    }[name]()
    # The default as such, not its figures: the cache then says that it won.
    return [DEFAULT, *(Choice("triton", config) for config in configs[1:]), *map(Choice, vendor.routes(name))]


def run(case: Case, choice: Choice, args: tuple) -> Any:
    """The operation's outputs: a tensor, or hidden_states and their moments."""
    return getattr(Backend.fixed(choice), case.operation.name)(*args)


def compile_ahead(case: Case, choices: Iterable[Choice], args: tuple) -> None:
    """Compile the kernels that the choices would launch, on all cores. What fails will fail again when it is run."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        _nothing_is_launched(),
    ):
        for choice in choices:
            if choice.route == "triton":
                with contextlib.suppress(Exception):
                    run(case, choice, args)


@contextlib.contextmanager
def _nothing_is_launched() -> Iterator[None]:
    run = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: run(self, *args, **kwargs | {"warmup": True})
    try:
        yield
    finally:
        JITFunction.run = run
