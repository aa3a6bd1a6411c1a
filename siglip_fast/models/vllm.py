"""vLLM's SigLIP vision tower, its encoder on the fused operations. Written against vLLM 0.33.0.

Only what is behind `embeddings` and `encoder` is vLLM's own: post_layernorm, head and the selection of features.
"""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import torch
import vllm.envs
from torch import Tensor, nn
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.conv import Conv2dLayer
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.models import siglip
from vllm.model_executor.parameter import ModelWeightParameter

from ..errors import typed_line
from .anatomy import Anatomy, Unsupported, check_head_dim, check_position_ids, check_tensors, layer_view
from .base import Fused, checked_backend, checked_batch_invariant
from .reasons import autocast_dtype

_PARAMETERS = (nn.Parameter, ModelWeightParameter)  # the latter adds only how it is loaded
_LINEARS = (linear.QKVParallelLinear, linear.ColumnParallelLinear, linear.RowParallelLinear)
# Of embeddings and encoder. What LoRA, quantization or another plugin puts in their place is not among them.
_KNOWN = (
    *(siglip.SiglipVisionEmbeddings, Conv2dLayer, nn.Embedding, siglip.SiglipEncoder, nn.ModuleList),
    *(siglip.SiglipEncoderLayer, LayerNorm, siglip.SiglipAttention, MMEncoderAttention, siglip.SiglipMLP),
    *_LINEARS,
)


def check(tower: nn.Module) -> None:
    """Raise Unsupported unless the operations compute what the embeddings and the encoder do."""
    config = tower.config
    head_dim = config.hidden_size // config.num_attention_heads
    if config.hidden_act != "gelu_pytorch_tanh":
        raise Unsupported(f"hidden_act is {config.hidden_act!r}, not 'gelu_pytorch_tanh'")
    check_head_dim(head_dim)
    known = (*_KNOWN, type(get_act_fn(config.hidden_act)))
    for part in ("embeddings", "encoder"):
        for name, module in getattr(tower, part).named_modules(prefix=part):
            if type(module) not in known:
                raise Unsupported(f"{name} is a {type(module).__name__}")
            if type(module) in _LINEARS:
                _check_linear(name, module)
            if type(module) is MMEncoderAttention and (module.fp8_enabled or module.scale != head_dim**-0.5):
                raise Unsupported(f"{name} computes in fp8 or has another scale than head_dim ** -0.5")
    check_tensors(tower, tower.embeddings.patch_embedding.weight, _PARAMETERS)
    check_position_ids(tower.embeddings.position_ids)


def _check_linear(name: str, module: nn.Module) -> None:
    shape, expected = list(module.weight.shape), [module.output_size, module.input_size]
    if type(module.quant_method) is not linear.UnquantizedLinearMethod:
        raise Unsupported(f"{name} is quantized ({type(module.quant_method).__name__})")
    if module.tp_size != 1:
        remedy = "mm_encoder_tp_mode='data' keeps towers whole"
        raise Unsupported(f"{name} is tensor-parallel over {module.tp_size} ({remedy})")
    if shape != expected or module.bias is None or module.skip_bias_add:
        raise Unsupported(f"{name} has a weight of shape {shape}, expected {expected} and an added bias")


def view(tower: nn.Module) -> SimpleNamespace:
    """The embeddings and the encoder under the names of transformers' SigLIP."""
    encoder = SimpleNamespace(layers=[_layer(layer) for layer in tower.encoder.layers])
    return SimpleNamespace(embeddings=tower.embeddings, encoder=encoder, post_layernorm=None)


def _layer(layer: nn.Module) -> SimpleNamespace:
    own, norms = layer.self_attn, (layer.layer_norm1, layer.layer_norm2)
    return layer_view(norms, own.qkv_proj, own.out_proj, own.num_heads, layer.mlp)


class FastSiglipVisionTransformer(Fused, siglip.SiglipVisionTransformer):
    """vLLM's tower; where the operations do not apply, vLLM's forward runs, and the reason is logged once."""

    anatomy = Anatomy(check, view, lambda tower: tower.embeddings.patch_embedding, ("config",), _PARAMETERS)
    # here, so that an unknown value stops the plugin and not the server
    backend = checked_backend(None)
    batch_invariant = checked_batch_invariant(None)
    _failure: str | None = None

    def forward(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs) -> Tensor:
        """`pixel_values [B, C, H, W]` → as vLLM's: the last hidden state, or the selected ones side by side."""
        states = self._encode(pixel_values, interpolate_pos_encoding, kwargs.get("select_layers") is not None)
        if states is None:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
            return super().forward(pixel_values, **kwargs)
        kwargs |= {"max_possible_layers": self.config.num_hidden_layers, "last_hs_proc": self.last_hs_proc}
        return siglip.resolve_visual_encoder_outputs(states, None, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.forget_derived()  # vLLM's loaders write through `.data`, which torch does not count as an edit
        return super().load_weights(weights)

    def _encode(self, pixel_values: Tensor, interpolate: bool, every: bool) -> Tensor | list[Tensor] | None:
        """What vLLM's encoder returns: the last of its hidden states `[B, N, D]`, or every one; None if it is to run."""
        if torch.compiler.is_compiling():
            return self._delegate("torch.compile traces vLLM's code")
        try:
            derived, reason = self._route(pixel_values, interpolate)
            if reason is None:
                stream, position = [], self.embeddings.position_embedding.weight
                collect = stream.append if every else None
                last, _ = derived.run(pixel_values, position, collect)
                derived.is_new = False
                return stream if every else last
        except Exception as error:  # a server has to come up, whatever happens on a GPU that nobody has tried
            if any(not derived.is_new for derived in self._derived.values()):
                raise
            self.forget_derived()
            reason = self._failure = f"the first fused forward failed: {typed_line(error)}"
        return self._delegate(reason)

    def _call_reasons(self, pixel_values: Tensor, *args, **kwargs) -> Iterator[str]:
        yield from super()._call_reasons(pixel_values, *args, **kwargs)
        size, C = self.embeddings.image_size, self.config.num_channels
        if not pixel_values.is_floating_point() or tuple(pixel_values.shape[1:]) != (C, size, size):
            own = f"{pixel_values.dtype} and have shape [batch, {', '.join(map(str, pixel_values.shape[1:]))}]"
            yield f"pixel_values are {own}, not [batch, {C}, {size}, {size}] of a floating dtype"

    def _request_reasons(self, interpolate_pos_encoding: bool = False) -> Iterator[str]:
        if self._failure:
            yield self._failure
        if vllm.envs.VLLM_BATCH_INVARIANT and not self.batch_invariant:
            yield "VLLM_BATCH_INVARIANT is set (and SIGLIP_FAST_BATCH_INVARIANT=1 is not)"
        if interpolate_pos_encoding:
            yield "interpolate_pos_encoding was asked for"
        if autocast_dtype(self.embeddings.position_embedding.weight.device):
            yield "autocast is active"
