"""Whether an operation's outputs are right: the accuracy rule, on inputs that make mistakes visible."""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case, plain_result, row_moments, upcast

RUINED = 3  # exit status where the CUDA context did not survive a candidate


class Verifier:
    """Whether what a function returns for a case is right, and the same twice.

    Right: an error against the reference in higher precision of at most twice that of plain torch in the same dtype,
    plus 1e-6, as relative Frobenius norm; and row moments that are those of the result.
    """

    def __init__(self, case: Case, device: torch.device, args: tuple):
        self._dtype, self._device = case.operation.dtype, device
        self._expected = plain_result(case, upcast(args))
        self.allowed = 2 * _error(plain_result(case, args), self._expected) + 1e-6

    def __call__(self, run: Callable[[], Any]) -> str | None:
        """The reason why it is wrong, or None. Raises what `run` raises."""
        try:
            return self._reason(run)
        finally:
            if self._device.type == "cuda":
                end_if_ruined(self._device)

    def _reason(self, run: Callable[[], Any]) -> str | None:
        first, second = self._tensors(run), self._tensors(run)
        out, *moments = first
        if out.shape != self._expected.shape or out.dtype != self._dtype:
            return f"wrong: {out.dtype} {list(out.shape)}"
        if not (error := _error(out, self._expected)) <= self.allowed:  # not so for NaN
            return f"wrong: relative error {error:.2g}, allowed {self.allowed:.2g}"
        if moments and not (error := _error(moments[0], row_moments(out.flatten(0, -2)))) <= 1e-4:
            return f"wrong row moments: relative error {error:.2g}"
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return "not the same bits twice"
        return None

    def _tensors(self, run: Callable[[], Any]) -> list[Tensor]:
        # The memory that the outputs will likely get, so that what a kernel does not write is NaN.
        torch.full_like(self._expected, float("nan"), dtype=self._dtype)
        out = run()
        return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.to(expected.dtype) - expected).norm() / expected.norm()).item()


def end_if_ruined(device: torch.device) -> None:
    """Wait for the device; if that fails, end the process."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:  # nothing that runs in this process from here on can be trusted
        print(error, file=sys.stderr, flush=True)
        os._exit(RUINED)
