"""What the fast towers of servers have in common, vLLM's and SGLang's own: how they come up, and what they have to be.

A server's towers are built on linears and attention of its own, whose classes and settings its file here names. A tower tells
by a log line when it first ran fused; until then nothing is claimed.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..errors import typed_line
from .anatomy import Anatomy, Unsupported, check_head_dim, check_tensors
from .base import Fused
from .reasons import autocast_dtype
from .weights import Derived

logger = logging.getLogger("siglip_fast")

Check = Callable[[str, nn.Module], None]  # of a module by its name; raises Unsupported
T = TypeVar("T")


def nothing_more(name: str, module: nn.Module) -> None:
    """The check of a module whose class says it all."""


def check_parts(tower: nn.Module, parts: Iterable[str], known: Mapping[type, Check]) -> None:
    """Raise Unsupported where a module of these parts is of no known class, or its check raises.

    What LoRA, quantization or another plugin puts in their place is not among the known.
    """
    for part in parts:
        for name, module in getattr(tower, part).named_modules(prefix=part):
            if type(module) not in known:
                raise Unsupported(f"{name} is a {type(module).__name__}")
            known[type(module)](name, module)


def check_linear(unquantized: type, parts: Callable[[nn.Module], int], remedy: str) -> Check:
    """That of a server's linears: plain, whole, with a bias. `parts` is over how many processes one is spread, and `remedy`
    what keeps a tower's linears whole."""

    def check(name: str, module: nn.Module) -> None:
        shape, expected = list(module.weight.shape), [module.output_size, module.input_size]
        if type(module.quant_method) is not unquantized:
            raise Unsupported(f"{name} is quantized ({type(module.quant_method).__name__})")
        if (tp_size := parts(module)) != 1:
            raise Unsupported(f"{name} is tensor-parallel over {tp_size} ({remedy})")
        if shape != expected or module.bias is None or module.skip_bias_add:
            raise Unsupported(f"{name} has a weight of shape {shape}, expected {expected} and an added bias")

    return check


def siglip_anatomy(
    check_first: Callable[[nn.Module], None],
    known: Mapping[type, Check],
    layer: Callable[[nn.Module], SimpleNamespace],
    parameters: tuple[type, ...],
    check_last: Callable[[nn.Module], None] = lambda tower: None,
    activation: Callable[[nn.Module], str] = lambda tower: "tanh",
) -> Anatomy:
    """Of a tower whose `embeddings` and `encoder` have the names of transformers' SigLIP; `layer` is the view of one, and
    `activation` tells GELU's form."""

    def check(tower: nn.Module) -> None:
        check_first(tower)
        check_head_dim(tower.config.hidden_size // tower.config.num_attention_heads)
        check_parts(tower, ("embeddings", "encoder"), known)
        check_tensors(tower, tower.embeddings.patch_embedding.weight, parameters)
        check_last(tower)

    def view(tower: nn.Module) -> SimpleNamespace:
        encoder = SimpleNamespace(layers=[*map(layer, tower.encoder.layers)])
        embeddings, form = tower.embeddings, activation(tower)
        return SimpleNamespace(embeddings=embeddings, encoder=encoder, post_layernorm=None, activation=form)

    return Anatomy(check, view, lambda tower: tower.embeddings.patch_embedding, ("config",), parameters)


def size_reasons(tower: nn.Module, pixel_values: Tensor) -> Iterator[str]:
    """Of a tower for images of one size, why these are none of its."""
    size, C = tower.embeddings.image_size, tower.config.num_channels
    if not pixel_values.is_floating_point() or tuple(pixel_values.shape[1:]) != (C, size, size):
        own = f"{pixel_values.dtype} and have shape [batch, {', '.join(map(str, pixel_values.shape[1:]))}]"
        yield f"pixel_values are {own}, not [batch, {C}, {size}, {size}] of a floating dtype"


class ServerTower(Fused):
    """Mixed into a server's tower; where the operations do not apply its own forward runs, and the reason is logged once."""

    server: ClassVar[str]
    _failure: str | None = None

    def forget_fast(self) -> None:
        super().forget_fast()
        vars(self).pop("_failure", None)

    def _fused(self, run: Callable[[Derived], T], rows: int, pixel_values: Tensor, *args, **kwargs) -> T | None:
        """What `run` gives on the derived weights; None if the server's forward is to run. `rows`: of the residual stream."""
        if torch.compiler.is_compiling():
            return self._delegate(f"torch.compile traces {self.server}'s code")
        try:
            derived, reason = self._route(pixel_values, *args, **kwargs)
            if reason is None:
                outputs = run(derived)
                derived.is_new = False
                self._say(derived, rows)
                return outputs
        except Exception as error:  # a server has to come up, whatever happens on a GPU that nobody has tried
            if self.strict or any(not derived.is_new for derived in self._derived.values()):
                raise
            self.forget_derived()
            reason = self._failure = f"the first fused forward failed: {typed_line(error)}"
        return self._delegate(reason)

    def _say(self, derived: Derived, rows: int) -> None:
        what = f"{self.server}: {type(self).__name__} runs fused, on the {derived.ops.backend} backend"
        if what not in _said:
            _said.add(what)
            logger.warning("%s (its first forward: %d rows)", what, rows)  # servers show no other logger's info

    def _request_reasons(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        if self._failure:
            yield self._failure
        weight = self._patch_weight()
        if weight is not None and autocast_dtype(weight.device):
            yield "autocast is active"


_said: set[str] = set()
