"""What all fast towers have in common: a stock class whose forward runs on the fused operations, or says why not.

A fast class is `class Fast(Fused, Stock)`. It answers for its own forward: which reasons lie in the call, what the
position embedding is, what the output looks like. Here is the rest: weights derived, kept and dropped, and the reasons
that lie in the tower, the device and the circumstances.
"""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError:  # transformers before 5.2
    from transformers.utils.generic import _CAN_RECORD_REGISTRY

from .anatomy import Anatomy, descendant
from .backends.select import NAMES, backend_for, is_capturing
from .weights import Derived

logger = logging.getLogger("siglip_fast")


class Fused(nn.Module):
    """To be mixed into a stock tower class, before it in the order of bases.

    A stock instance may become a fast one by having its `__class__` set; `become_fast` then makes what `__init__`
    would have made.
    """

    anatomy: ClassVar[Anatomy]

    # Of the class, for instances that `become_fast` has not met: vLLM's, and models pickled by an earlier version
    backend = "auto"
    strict = False
    _derived: Derived | None = None

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        # transformers looks up by its name what a class records, which only a constructor notes; instances that were
        # swapped or unpickled have met none.
        if recorded := getattr(cls, "_can_record_outputs", None):
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), recorded)

    def become_fast(self, backend: str | None, strict: bool) -> None:
        """Raises ValueError where the backend's name is unknown."""
        self.backend = checked_backend(backend)
        self.strict = strict
        self._derived = None

    def forget_fast(self) -> None:
        """Removes what `become_fast` and later calls made, for an instance that is to be stock's again."""
        for name in ("backend", "strict", "_derived"):
            vars(self).pop(name, None)

    def why_not(self, pixel_values: Tensor, *args, **kwargs) -> str | None:
        """Every reason, joined by "; ", for which `forward(...)` would run the stock code here and now, or None.

        It reads the weights as the fused forward would, so the first call takes that forward's time to derive them.
        Under torch.export the stock code is traced in any case.
        """
        reasons = [*self._call_reasons(pixel_values, *args, **kwargs)]
        if _NOT_DERIVED not in reasons:
            reasons.append(self._current().reason(owner=self))
        return "; ".join(filter(None, reasons)) or None

    def backend_for(self, device: torch.device | str) -> str | None:
        """The backend that runs for tensors on `device`: "triton", "cpu", "torch", or None where there is none."""
        return backend_for(self.backend, torch.device(device))[0]

    def derived_bytes(self) -> int:
        """Memory that the derived weights take beside the parameters, in bytes; 0 before the first fused forward."""
        return self._derived.memory() if self._derived else 0

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers 5 renames the keys of older checkpoints only for classes that it takes for its own; without
        # that, a composite model around a fast tower loads them as random weights.
        return not cls.__module__.startswith(f"{__package__}.") and super().is_custom_code()

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
        derived = self._derived  # once: another thread may drop it
        weight = self._patch_weight()
        backend = (self.backend_for(weight.device) if weight is not None else None) or "torch"
        if derived is None or derived.ops.backend != backend or not derived.source.is_unchanged():
            derived = self._derived = None  # the old copies go before the new ones are made
            derived = self._derived = Derived(self._tower, self.anatomy, backend)
        return derived

    def _is_derived(self) -> bool:
        derived = self._derived
        return derived is not None and derived.weights is not None and derived.source.is_unchanged()

    def _route(self, pixel_values: Tensor, *args, **kwargs) -> tuple[Derived | None, str | None]:
        """The derived weights to run on, or the reason for running stock's code."""
        reason = next(self._call_reasons(pixel_values, *args, **kwargs), None)
        if reason is not None:
            return None, reason
        derived = self._current()
        return derived, derived.reason(owner=self)

    def _delegate(self, reason: str) -> None:
        """To be called before stock's code runs, for `reason`. Raises RuntimeError where `strict` is set."""
        if reason is _GRADIENTS:
            self.forget_derived()  # the weights are about to change, perhaps in ways that torch does not count
        if self.strict:
            raise RuntimeError(f"the fused forward does not apply: {reason}")
        _log_once(type(self).__name__, reason)

    def _call_reasons(self, pixel_values: Tensor, *args, **kwargs) -> Iterator[str]:
        """The reasons that lie in the call and its circumstances, not in the tower."""
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values: expected a torch.Tensor, got {type(pixel_values).__name__}")
        if torch.is_grad_enabled() and (
            pixel_values.requires_grad or any(p.requires_grad for p in self.parameters())
        ):
            yield _GRADIENTS
        if reason := _patched_reason(type(self)):
            yield reason
        if getattr(self, "_is_replica", False):
            yield "this is a replica of torch.nn.DataParallel"
        if type(pixel_values) not in (Tensor, nn.Parameter, nn.Buffer):
            yield f"pixel_values are a {type(pixel_values).__name__}, not a plain tensor"
        elif pixel_values.ndim > 0 and pixel_values.shape[0] == 0:
            yield "the batch is empty"
        if reason := _mode_reason(pixel_values.device):
            yield reason
        yield from self._request_reasons(*args, **kwargs)
        weight = self._patch_weight()
        if weight is not None and pixel_values.device != weight.device:
            yield f"pixel_values are on {pixel_values.device}, the parameters on {weight.device}"
        elif reason := _backend_reason(self.backend, pixel_values.device):
            yield reason
        elif is_capturing(pixel_values) and not self._is_derived():
            yield _NOT_DERIVED

    def train(self, mode: bool = True) -> "Fused":
        if mode != self.training:
            self.forget_derived()  # training needs the memory, and is about to change the weights
        return super().train(mode)

    def _apply(self, fn: Callable, *args, **kwargs) -> "Fused":
        self.forget_derived()  # moved or cast: do not keep the old copies until the next forward
        return super()._apply(fn, *args, **kwargs)

    def forget_derived(self) -> None:
        """Lets go of the derived weights: the next forward reads the parameters again. For edits that torch does not count."""
        self._derived = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_derived": None}  # copies and pickles make their own


def checked_backend(backend: str | None) -> str:
    """`backend`, or what SIGLIP_FAST_BACKEND says, or "auto". Raises ValueError where the name is unknown."""
    backend = backend or os.environ.get("SIGLIP_FAST_BACKEND", "auto")
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    return backend


def stock_class(fast: type[Fused]) -> type[nn.Module]:
    """The class whose instances become those of `fast`."""
    return fast.__mro__[fast.__mro__.index(Fused) + 1]  # FSDP puts a class of its own before ours


def keyword_reasons(config: Any, kwargs: dict[str, Any], ignored: tuple[str, ...] = ()) -> Iterator[str]:
    """Why a tower of transformers, called with `kwargs`, has to run as stock's. `output_hidden_states` is not looked at."""
    if asked_for("output_attentions", config, kwargs):
        yield "output_attentions was asked for"
    known = ("return_dict", "output_attentions", "output_hidden_states", *ignored)
    if extra := [name for name, value in kwargs.items() if name not in known and value is not None]:
        yield f"the stock code takes the keyword arguments {', '.join(extra)}"
    if kwargs.get("return_dict", True) is None and config.return_dict is False:
        yield "return_dict is None, which means different things to different versions of transformers"


def asked_for(name: str, config: Any, kwargs: dict[str, Any]) -> Any:
    """output_attentions or output_hidden_states, of the call or else of the config."""
    return kwargs.get(name, getattr(config, name, False))


def in_asked_form(output: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """`output`, a ModelOutput, or the tuple of its values where return_dict is False."""
    return (
        output.to_tuple()
        if kwargs.get("return_dict", getattr(config, "return_dict", True)) is False
        else output
    )


def attention_reasons(tower: nn.Module) -> Iterator[str]:
    """Why the attention of transformers' encoder layers has to run as stock's: its implementation, or dropout."""
    layers = descendant(tower, "encoder", "layers")
    attentions = [layer._modules.get("self_attn") for layer in layers or ()]
    for name in sorted({m.config._attn_implementation for m in attentions if hasattr(m, "config")}):
        if name not in _EXACT_ATTENTION:
            yield f"attention implementation {name!r} was asked for"
        elif not _is_transformers_own(ALL_ATTENTION_FUNCTIONS.get(name)):
            yield f"attention implementation {name!r} is not transformers' own"
    if any(m is not None and m.training and getattr(m, "dropout", 0) for m in attentions):
        yield "attention dropout is active"


_GRADIENTS = "gradients are needed (use torch.no_grad or torch.inference_mode for inference)"
_NOT_DERIVED = "a CUDA graph is being captured before the weights were derived (run one forward before)"
# Names of implementations of the same softmax attention, not of something that a caller could observe
_EXACT_ATTENTION = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


# These ask what torch.compile cannot trace. It calls them as it traces, and what they answer is part of the graph.
@torch.compiler.assume_constant_result
def _mode_reason(device: torch.device) -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return "autocast is active"
    if torch.jit.is_tracing() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return "the operations are traced or intercepted (torch.jit.trace, make_fx, a TorchDispatchMode)"
    return None


@torch.compiler.assume_constant_result
def _patched_reason(fast: type[Fused]) -> str | None:
    stock = stock_class(fast)
    if stock.forward.__module__ != stock.__module__:
        return f"the forward of {stock.__name__} is patched"
    return None


@torch.compiler.assume_constant_result
def _backend_reason(backend: str, device: torch.device) -> str | None:
    return backend_for(backend, device)[1]


@torch.compiler.assume_constant_result
def _log_once(name: str, reason: str) -> None:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.warning("running the stock %s forward: %s", name, reason)


_logged: set[tuple[str, str]] = set()


def _is_transformers_own(attention: Callable | None) -> bool:
    return getattr(attention, "__module__", "").startswith("transformers.integrations.")
