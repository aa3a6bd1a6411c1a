"""What the fast towers of vLLM have in common: how they come up in a server, and what their linears have to be.

Written against vLLM 0.33.0; 0.32.0's are the same.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import TypeVar

import torch
import vllm.envs
from torch import Tensor, nn
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.platforms import current_platform

from ..errors import typed_line
from .anatomy import Anatomy, Unsupported, check_head_dim, check_tensors, layer_view
from .base import Fused, checked_backend, checked_batch_invariant
from .reasons import autocast_dtype
from .weights import Derived

logger = logging.getLogger("siglip_fast")

PARAMETERS = (nn.Parameter, ModelWeightParameter)  # the latter adds only how it is loaded
LINEARS = (
    *(linear.QKVParallelLinear, linear.ColumnParallelLinear),
    *(linear.RowParallelLinear, linear.ReplicatedLinear),
)

T = TypeVar("T")


def check_parts(tower: nn.Module, parts: Iterable[str], known: Iterable[type], head_dim: int) -> None:
    """Raise Unsupported where a module of these parts is of no known class, or a linear or an attention not a plain one.

    What LoRA, quantization or another plugin puts in their place is not among the known.
    """
    known = (*known, MMEncoderAttention, *LINEARS)
    for part in parts:
        for name, module in getattr(tower, part).named_modules(prefix=part):
            if type(module) not in known:
                raise Unsupported(f"{name} is a {type(module).__name__}")
            if type(module) in LINEARS:
                _check_linear(name, module)
            if type(module) is MMEncoderAttention and (module.fp8_enabled or module.scale != head_dim**-0.5):
                raise Unsupported(f"{name} computes in fp8 or has another scale than head_dim ** -0.5")


def _check_linear(name: str, module: nn.Module) -> None:
    shape, expected = list(module.weight.shape), [module.output_size, module.input_size]
    if type(module.quant_method) is not linear.UnquantizedLinearMethod:
        raise Unsupported(f"{name} is quantized ({type(module.quant_method).__name__})")
    if (tp_size := getattr(module, "tp_size", 1)) != 1:
        remedy = "mm_encoder_tp_mode='data' keeps towers whole"
        raise Unsupported(f"{name} is tensor-parallel over {tp_size} ({remedy})")
    if shape != expected or module.bias is None or module.skip_bias_add:
        raise Unsupported(f"{name} has a weight of shape {shape}, expected {expected} and an added bias")


def siglip_anatomy(known: Iterable[type], check_position: Callable[[nn.Module], None] = lambda tower: None) -> Anatomy:
    """Of a tower whose `embeddings` and `encoder` have the names of transformers' SigLIP, and modules of known classes."""

    def check(tower: nn.Module) -> None:
        config = tower.config
        if config.hidden_act != "gelu_pytorch_tanh":
            raise Unsupported(f"hidden_act is {config.hidden_act!r}, not 'gelu_pytorch_tanh'")
        head_dim = config.hidden_size // config.num_attention_heads
        check_head_dim(head_dim)
        check_parts(tower, ("embeddings", "encoder"), (*known, type(get_act_fn(config.hidden_act))), head_dim)
        check_tensors(tower, tower.embeddings.patch_embedding.weight, PARAMETERS)
        check_position(tower)

    def view(tower: nn.Module) -> SimpleNamespace:
        encoder = SimpleNamespace(layers=[_layer(layer) for layer in tower.encoder.layers])
        return SimpleNamespace(embeddings=tower.embeddings, encoder=encoder, post_layernorm=None)

    return Anatomy(check, view, lambda tower: tower.embeddings.patch_embedding, ("config",), PARAMETERS)


def _layer(layer: nn.Module) -> SimpleNamespace:
    own, norms = layer.self_attn, (layer.layer_norm1, layer.layer_norm2)
    return layer_view(norms, own.qkv_proj, own.out_proj, own.num_heads, layer.mlp)


class VllmTower(Fused):
    """Mixed into a tower of vLLM's; where the operations do not apply its own forward runs, and the reason is logged once."""

    # here, so that an unknown value stops the plugin and not the server
    backend = checked_backend(None)
    batch_invariant = checked_batch_invariant(None)
    _failure: str | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not type(self).__module__.startswith(
            f"{__package__}."
        ):  # Cosmos3's and Bailing's: nobody here knows what they change
            self._failure = f"{type(self).__name__} is a subclass of a fast class"
        elif current_platform.is_cpu():
            self._keep_weights()

    def _keep_weights(self) -> None:
        """vLLM on a CPU packs linears for kernels of its own and leaves parameters without elements, unless told not to."""
        try:
            self.anatomy.check(self)
        except Unsupported as unsupported:
            self._failure = str(unsupported)
            return
        for module in self.modules():
            if isinstance(module, LINEARS):
                module._cpu_skip_gemm_dispatch = True

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.forget_derived()  # vLLM's loaders write through `.data`, which torch does not count as an edit
        return super().load_weights(weights)

    def _fused(self, run: Callable[[Derived], T], rows: int, pixel_values: Tensor, *args, **kwargs) -> T | None:
        """What `run` gives on the derived weights; None if vLLM's forward is to run. `rows`: of the residual stream."""
        if torch.compiler.is_compiling():
            return self._delegate("torch.compile traces vLLM's code")
        try:
            derived, reason = self._route(pixel_values, *args, **kwargs)
            if reason is None:
                outputs = run(derived)
                derived.is_new = False
                _say(f"{type(self).__name__} runs fused, on the {derived.ops.backend} backend", rows)
                return outputs
        except Exception as error:  # a server has to come up, whatever happens on a GPU that nobody has tried
            if any(not derived.is_new for derived in self._derived.values()):
                raise
            self.forget_derived()
            reason = self._failure = f"the first fused forward failed: {typed_line(error)}"
        return self._delegate(reason)

    def _request_reasons(self, *args, **kwargs) -> Iterator[str]:
        if self._failure:
            yield self._failure
        if vllm.envs.VLLM_BATCH_INVARIANT and not self.batch_invariant:
            yield "VLLM_BATCH_INVARIANT is set (and SIGLIP_FAST_BATCH_INVARIANT=1 is not)"
        weight = self._patch_weight()
        if weight is not None and autocast_dtype(weight.device):
            yield "autocast is active"


def _say(what: str, rows: int) -> None:
    if what not in _said:
        _said.add(what)
        logger.warning("vLLM: %s (its first forward: %d rows)", what, rows)  # vLLM shows no other logger's info


_said: set[str] = set()
