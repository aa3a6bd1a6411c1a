"""Whether an operation's outputs are right: the accuracy rule, on inputs that make mistakes visible."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..errors import typed_line
from .cases import Case, plain_result, row_moments, upcast

RUINED = 3  # exit status where the CUDA context did not survive a candidate
ROW_FACTOR = 4  # of plain torch's worst row; a row's error varies more than that of the whole


class Verifier:
    """Whether what a function returns for a case is right, and the same twice.

    Right: an error against the reference in higher precision of at most twice that of plain torch in the same dtype,
    plus 1e-6, as relative Frobenius norm; no row's of more than ROW_FACTOR times that of plain torch's worst; and row
    moments that are those of the result. Memory that the function allocates and does not write is NaN.
    """

    def __init__(self, case: Case, device: torch.device, args: tuple):
        self._dtype, self._device = case.operation.dtype, device
        self._expected = plain_result(case, upcast(args))
        plain = plain_result(case, args)
        self._allowed = 2 * _error(plain, self._expected) + 1e-6
        self._allowed_row = ROW_FACTOR * _worst_row(plain, self._expected) + 1e-5

    def __call__(self, run: Callable[[], Any]) -> str | None:
        """The reason why it is wrong, or None. Raises what `run` raises."""
        try:
            return self._reason(run)
        finally:
            if self._device.type == "cuda":
                end_if_ruined(self._device)

    def _reason(self, run: Callable[[], Any]) -> str | None:
        with _unwritten_is_nan():
            first, second = _tensors(run()), _tensors(run())
        out, *moments = first
        if out.shape != self._expected.shape or out.dtype != self._dtype:
            return f"wrong: {out.dtype} {list(out.shape)}"
        if not (error := _error(out, self._expected)) <= self._allowed:  # not so for NaN
            return f"wrong: relative error {error:.2g}, allowed {self._allowed:.2g}"
        if not (error := _worst_row(out, self._expected)) <= self._allowed_row:
            return f"wrong: relative error of a row {error:.2g}, allowed {self._allowed_row:.2g}"
        if moments and not (error := _worst_row(moments[0], row_moments(out.flatten(0, -2)))) <= 1e-4:
            return f"wrong row moments: relative error {error:.2g}"
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return "not the same bits twice"
        return None


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.to(expected.dtype) - expected).norm() / expected.norm()).item()


def _worst_row(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.to(expected.dtype) - expected).norm(dim=-1)
    return (difference / expected.norm(dim=-1)).max().item()


@contextlib.contextmanager
def _unwritten_is_nan() -> Iterator[None]:
    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    names = ("empty", "empty_like")
    with mock.patch.multiple(torch, **{name: poisoned(getattr(torch, name)) for name in names}):
        yield


def end_if_ruined(device: torch.device) -> None:
    """Wait for the device; if that fails, end the process."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        end(error)


def end(error: Exception) -> None:
    """Ends the process: nothing that runs in it from here on can be trusted."""
    sys.stdout.flush()
    print(typed_line(error), file=sys.stderr, flush=True)
    os._exit(RUINED)
