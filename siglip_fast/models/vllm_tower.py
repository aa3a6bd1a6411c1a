"""What the fast towers of vLLM have in common: how they come up in a server, and what their linears have to be.

Written against vLLM 0.33.0; 0.32.0's are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace

import vllm.envs
from torch import Tensor, nn
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.platforms import current_platform

from . import server_tower
from .anatomy import Anatomy, Unsupported, layer_view
from .base import checked_backend, checked_batch_invariant
from .server_tower import Check, ServerTower, check_linear, nothing_more

PARAMETERS = (nn.Parameter, ModelWeightParameter)  # the latter adds only how it is loaded
GELU = type(get_act_fn("gelu_pytorch_tanh"))
LINEARS = (
    *(linear.QKVParallelLinear, linear.ColumnParallelLinear),
    *(linear.RowParallelLinear, linear.ReplicatedLinear),
)


def _check_attention(name: str, module: nn.Module) -> None:
    if module.fp8_enabled or module.scale != module.head_size**-0.5:
        raise Unsupported(f"{name} computes in fp8 or has another scale than head_dim ** -0.5")


_check_linear = check_linear(
    linear.UnquantizedLinearMethod,
    lambda module: getattr(module, "tp_size", 1),
    "mm_encoder_tp_mode='data' keeps towers whole",
)
_CHECKS = dict.fromkeys(LINEARS, _check_linear)
_CHECKS[MMEncoderAttention] = _check_attention


def checks(known: Iterable[type]) -> Mapping[type, Check]:
    """Those of a tower whose other modules are of the `known` classes."""
    return dict.fromkeys((*known, GELU), nothing_more) | _CHECKS


def siglip_anatomy(known: Iterable[type], check_position: Callable[[nn.Module], None] = lambda tower: None) -> Anatomy:
    """Of a tower whose `embeddings` and `encoder` have the names of transformers' SigLIP, and modules of known classes."""
    return server_tower.siglip_anatomy(_check_activation, checks(known), _layer, PARAMETERS, check_position)


def _check_activation(tower: nn.Module) -> None:
    if tower.config.hidden_act != "gelu_pytorch_tanh":
        raise Unsupported(f"hidden_act is {tower.config.hidden_act!r}, not 'gelu_pytorch_tanh'")


def _layer(layer: nn.Module) -> SimpleNamespace:
    own, norms = layer.self_attn, (layer.layer_norm1, layer.layer_norm2)
    return layer_view(norms, own.qkv_proj, own.out_proj, own.num_heads, layer.mlp)


class VllmTower(ServerTower):
    server = "vLLM"
    # here, so that an unknown value stops the plugin and not the server
    backend = checked_backend(None)
    batch_invariant = checked_batch_invariant(None)

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

    def _request_reasons(self, *args, **kwargs) -> Iterator[str]:
        yield from super()._request_reasons(*args, **kwargs)
        if vllm.envs.VLLM_BATCH_INVARIANT and not self.batch_invariant:
            yield "VLLM_BATCH_INVARIANT is set (and SIGLIP_FAST_BATCH_INVARIANT=1 is not)"
