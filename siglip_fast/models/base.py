"""What all fast towers have in common: a stock class whose forward runs on the fused operations, or says why not.

A fast class is `class Fast(Fused, Stock)`. It answers for its own forward: which reasons lie in the call, what the
position embedding is, what the output looks like. Here is the rest: weights derived, kept and dropped, and the reasons
that lie in the tower, the device and the circumstances.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError:  # transformers before 5.2
    from transformers.utils.generic import _CAN_RECORD_REGISTRY

from ..backends.select import NAMES, backend_for, is_capturing
from .anatomy import Anatomy
from .reasons import GRADIENTS, NOT_DERIVED, autocast_dtype, autocast_reason, backend_reason, circumstances
from .weights import Derived

logger = logging.getLogger("siglip_fast")

MADE = ("_derived", "_to_capture", "_handle")  # what copies and pickles of a fast tower make anew


class Fused(nn.Module):
    """To be mixed into a stock tower class, before it in the order of bases.

    A stock instance may become a fast one by having its `__class__` set; `become_fast` then makes what `__init__`
    would have made.
    """

    anatomy: ClassVar[Anatomy]

    # Of the class, for instances that `become_fast` has not met: vLLM's
    backend = "auto"
    strict = False
    batch_invariant = False
    # By the dtype of torch.autocast, None outside of it. Replaced, never edited: threads may share a model.
    _derived: Mapping[torch.dtype | None, Derived] = {}

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        # transformers looks up by its name what a class records, which only a constructor notes; instances that were
        # swapped or unpickled have met none, nor have those of stock's class that were built as ours.
        if recorded := getattr(cls, "_can_record_outputs", None):
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), recorded)
            dict.setdefault(_CAN_RECORD_REGISTRY, str(stock_class(cls)), recorded)

    def become_fast(self, backend: str | None, strict: bool, batch_invariant: bool | None) -> None:
        """Raises what `checked_backend` and `checked_batch_invariant` do."""
        self.backend = checked_backend(backend)
        self.strict = strict
        self.batch_invariant = checked_batch_invariant(batch_invariant)
        self._derived = {}

    def forget_fast(self) -> None:
        """Removes what `become_fast` and later calls made, for an instance that is to be stock's again."""
        for name in ("backend", "strict", "batch_invariant", *MADE):
            vars(self).pop(name, None)

    def why_not(self, pixel_values: Tensor, *args, **kwargs) -> str | None:
        """Every reason, joined by "; ", for which `forward(...)` would run the stock code here and now, or None.

        It reads the weights as the fused forward would, so the first call takes that forward's time to derive them.
        Under torch.export the stock code is traced in any case.
        """
        reasons = [*self._call_reasons(pixel_values, *args, **kwargs)]
        if NOT_DERIVED not in reasons:
            reasons.append(self._current().reason(owner=self))
        return "; ".join(filter(None, reasons)) or None

    def backend_for(self, device: torch.device | str) -> str | None:
        """The backend that runs for tensors on `device`: "triton", "cpu", "torch", or None where there is none."""
        return backend_for(self.backend, torch.device(device))[0]

    def derived_bytes(self) -> int:
        """Memory that the derived weights take beside the parameters, in bytes; 0 before the first fused forward."""
        return sum(derived.memory() for derived in self._derived.values())

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers 5 renames the keys of older checkpoints only for classes that it takes for its own; without
        # that, a composite model around a fast tower loads them as random weights.
        return not cls.__module__.startswith(f"{__package__}.") and super().is_custom_code()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks in the file of the class; and in the config it may find one, of what stock was built from
        return stock_class(cls)._can_set_experts_implementation()

    @classmethod
    def declines(cls, tower: nn.Module) -> str | None:
        """Why `tower`, of the stock class, is not to become one of this class at all, if it is not."""
        return None

    def _request_reasons(self, *args, **kwargs) -> Iterator[str]:
        """The reasons that lie in the arguments of `forward` and in the tower's settings."""
        raise NotImplementedError

    @property
    def _tower(self) -> nn.Module:
        """The module that has the anatomy."""
        return self

    def _patch_weight(self) -> Tensor | None:
        # None where the module was replaced by one that has no such parameter
        conv = self.anatomy.patch_embedding(self._tower)
        return None if conv is None else conv._parameters.get("weight")

    def _current(self) -> Derived:
        """The derived weights for the device, the backend and the autocast region of this call."""
        weight = self._patch_weight()
        backend = (self.backend_for(weight.device) if weight is not None else None) or "torch"
        dtype = None if weight is None else autocast_dtype(weight.device)
        if dtype and autocast_reason(weight.device, weight.dtype, False):
            dtype = None  # stock's code runs in that region
        derived = self._derived.get(dtype)
        kind = backend, self.batch_invariant
        if derived and (
            (derived.ops.backend, derived.ops.batch_invariant) != kind or not derived.source.is_unchanged()
        ):
            derived = None
            self._derived = {}  # the old copies go before the new ones are made
        if not derived:
            derived = Derived(self._tower, self.anatomy, *kind, dtype)
            others = {key: other for key, other in self._derived.items() if other.source.is_unchanged()}
            self._derived = {**others, dtype: derived}
        return derived

    def _is_derived(self, device: torch.device) -> bool:
        derived = self._derived.get(autocast_dtype(device))
        return derived is not None and derived.weights is not None and derived.source.is_unchanged()

    def _route(self, pixel_values: Tensor, *args, **kwargs) -> tuple[Derived | None, str | None]:
        """The derived weights to run on, or the reason for running stock's code."""
        reason = next(self._call_reasons(pixel_values, *args, **kwargs), None)
        return (None, reason) if reason is not None else self._checked()

    def _checked(self) -> tuple[Derived, str | None]:
        """The derived weights, of the tower as it is now, and the reason that lies in it for running stock's code."""
        derived = self._current()
        reason = derived.reason(owner=self)
        derived.is_trusted = reason is None
        return derived, reason

    def _delegate(self, reason: str) -> None:
        """To be called before stock's code runs, for `reason`. Raises RuntimeError where `strict` is set."""
        if reason is GRADIENTS:
            self.forget_derived()  # the weights are about to change, perhaps in ways that torch does not count
        if self.strict:
            raise RuntimeError(f"the fused forward does not apply: {reason}")
        log_once(type(self).__name__, reason, self.batch_invariant)

    def _call_reasons(self, pixel_values: Tensor, *args, **kwargs) -> Iterator[str]:
        """The reasons that lie in the call and its circumstances, not in the tower."""
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values: expected a torch.Tensor, got {type(pixel_values).__name__}")
        if torch.is_grad_enabled() and (pixel_values.requires_grad or any(p.requires_grad for p in self.parameters())):
            yield GRADIENTS
        weight, device = self._patch_weight(), pixel_values.device
        yield from filter(None, circumstances(self, stock_class(type(self)), weight, pixel_values))
        yield from self._request_reasons(*args, **kwargs)
        if weight is not None and device != weight.device:
            yield f"pixel_values are on {device}, the parameters on {weight.device}"
        elif reason := backend_reason(self.backend, device):
            yield reason
        elif is_capturing(pixel_values) and not self._is_derived(device):
            yield NOT_DERIVED

    def train(self, mode: bool = True) -> "Fused":
        if mode != self.training:
            self.forget_derived()  # training needs the memory, and is about to change the weights
        return super().train(mode)

    def _apply(self, fn: Callable, *args, **kwargs) -> "Fused":
        self.forget_derived()  # moved or cast: do not keep the old copies until the next forward
        return super()._apply(fn, *args, **kwargs)

    def forget_derived(self) -> None:
        """Lets go of the derived weights: the next forward reads the parameters again. For edits that torch does not count."""
        self._derived = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in MADE}


class Built(Fused):
    """A fast class that is built from a config, as transformers builds the stock one."""

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        backend: str | None = None,
        strict: bool = False,
        batch_invariant: bool | None = None,
    ):
        super().__init__(config)
        self.become_fast(backend, strict, batch_invariant)


def checked_backend(backend: str | None) -> str:
    """`backend`, or what SIGLIP_FAST_BACKEND says, or "auto". Raises ValueError where the name is unknown."""
    backend = backend or os.environ.get("SIGLIP_FAST_BACKEND", "auto")
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    return backend


def checked_batch_invariant(batch_invariant: bool | None) -> bool:
    """`batch_invariant`, or what SIGLIP_FAST_BATCH_INVARIANT says, or False. Raises TypeError where it is no bool,
    ValueError where the variable is neither 0 nor 1."""
    if batch_invariant is None:
        value = os.environ.get("SIGLIP_FAST_BATCH_INVARIANT") or "0"
        if value not in ("0", "1"):
            raise ValueError(f"SIGLIP_FAST_BATCH_INVARIANT: expected 0 or 1, got {value!r}")
        return value == "1"
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: expected a bool, got {batch_invariant!r}")
    return batch_invariant


def stock_class(fast: type[Fused]) -> type[nn.Module]:
    """The class whose instances become those of `fast`."""
    return fast.__mro__[fast.__mro__.index(Fused) + 1]  # FSDP puts a class of its own before ours


@torch.compiler.assume_constant_result
def log_once(name: str, reason: str, batch_invariant: bool) -> None:
    """That stock's forward of the class of this name runs, for this reason."""
    if (name, reason, batch_invariant) not in _logged:
        _logged.add((name, reason, batch_invariant))
        but = ", which is not batch invariant" if batch_invariant else ""
        logger.warning("running the stock %s forward%s: %s", name, but, reason)


_logged: set[tuple[str, str, bool]] = set()
