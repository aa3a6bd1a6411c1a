"""The operations of a forward at a model's shapes, by the tuner's own cases: candidates, FLOPs, and what is right."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from cases import Case
from environment import DEVICE
from peers import NOT_TUNED, Missing, configurations, is_tuned, tuning_cases
from torch import Tensor
from torch.utils._pytree import tree_map

from siglip_fast.backends import select
from siglip_fast.backends.choice import Choice
from siglip_fast.cli.info import packed
from siglip_fast.models.variants import config_for
from siglip_fast.tuning import cases as tuning
from siglip_fast.tuning.cache import Selection
from siglip_fast.tuning.cases import inputs, plain_result

BACKEND = {"cuda": "triton", "cpu": "cpu"}[DEVICE]
# Those of tuning.cases, in its order; the head's GEMMs, of a row an image, are left out.
OPERATIONS = ("fc1", "fc2", "qkv", "out_proj", "patch_embed", "layernorm", "attention", "attention_pool")


class Call(NamedTuple):
    function: Callable
    arguments: Iterable

    def __call__(self) -> Tensor:
        out = self.function(*self.arguments)
        return out[0] if isinstance(out, tuple) else out  # without the moments


def tuning_case(case: Case, operation: str) -> tuning.Case:
    found = tuning_cases(config_for(case.variant), getattr(torch, case.dtype), case.batch_size)
    return found[OPERATIONS.index(operation)]


def candidates(case: Case, operation: str) -> dict[str, Callable[[], Call]]:
    """By name, what makes it; on a GPU the vendor's routes too, which leave row moments as the kernels do."""
    wanted = tuning_case(case, operation)
    arguments = inputs(wanted, torch.device(DEVICE))
    name = wanted.operation.name

    def ours(tuned: bool) -> Call:
        if tuned and not is_tuned([wanted], torch.device(DEVICE)):
            raise Missing(NOT_TUNED)
        backend = select.load(BACKEND, Selection.load)
        call = Call(getattr(backend, name), packed(arguments, backend, tokens=wanted.rows // case.batch_size))
        with configurations("tuned" if tuned else "built-in"):  # settled at the first call
            call()
        return call

    def plain() -> Call:
        return Call(getattr(select.load("torch"), name), arguments)

    found = {"siglip_fast": functools.partial(ours, False), "torch": plain}
    if DEVICE == "cuda":
        from siglip_fast.backends import vendor
        from siglip_fast.tuning.candidates import run

        found["siglip_fast, tuned"] = functools.partial(ours, True)
        for route in vendor.routes(name):
            call = Call(functools.partial(run, wanted, Choice(route)), (arguments,))
            found[f"vendor: {route}"] = lambda call=call: call
    return found


def flops(case: Case, operation: str) -> int:
    """Multiplications and additions; 0 for layernorm, which is none of a matmul's business."""
    (name, dims, _), rows = tuning_case(case, operation)
    if name == "attention":
        N, H, d = dims
        return 4 * rows * N * N * H * d
    if name == "attention_pool":
        N, D, H = dims
        return 4 * rows * H * N * D + 2 * rows * D * D
    return 2 * rows * dims[0] * dims[1] if len(dims) > 1 else 0


def ends(tensor: Tensor, case: Case) -> Tensor:
    """What belongs to the first and the last image, of a tensor whose first dimension is that of images or of rows."""
    return tensor.unflatten(0, (case.batch_size, -1))[:: max(1, case.batch_size - 1)].flatten(0, 1)


def expected(case: Case, operation: str) -> Tensor:
    """What is right for the first and the last image, in float64."""
    wanted = tuning_case(case, operation)
    arguments = list(inputs(wanted, torch.device(DEVICE)))
    for i in (0, 2) if wanted.operation.name == "linear_residual" else (0,):
        arguments[i] = ends(arguments[i], case)
    return plain_result(wanted, tree_map(lambda x: x.double() if isinstance(x, Tensor) else x, tuple(arguments)))
