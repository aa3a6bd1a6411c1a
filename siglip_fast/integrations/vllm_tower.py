"""vLLM's SigLIP vision tower, its encoder on the fused operations. Written against vLLM 0.33.0.

Only what is behind `embeddings` and `encoder` is vLLM's own: post_layernorm, head and the selection of features.
"""

import logging
import os
from collections.abc import Iterable, Iterator

import torch
import vllm.envs
from torch import Tensor, nn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.conv import Conv2dLayer
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.models import siglip

from ..anatomy import MAX_HEAD_DIM
from ..backends.select import backend_for, is_capturing
from ..ops import DTYPES, Ops, PatchEmbedding
from ..weights import LayerWeights, _fold, _linear, _plain

logger = logging.getLogger("siglip_fast")

_LINEARS = (QKVParallelLinear, ColumnParallelLinear, RowParallelLinear)
# Of embeddings and encoder. What LoRA, quantization or another plugin puts in their place is not among them.
_KNOWN = (
    *(siglip.SiglipVisionEmbeddings, Conv2dLayer, nn.Embedding),
    *(
        siglip.SiglipEncoder,
        nn.ModuleList,
        siglip.SiglipEncoderLayer,
        siglip.SiglipAttention,
        siglip.SiglipMLP,
    ),
    *(*_LINEARS, LayerNorm, MMEncoderAttention),
)


class FastSiglipVisionTransformer(siglip.SiglipVisionTransformer):
    """vLLM's tower; where the operations do not apply, vLLM's forward runs, and the reason is logged once."""

    _encoder: "Encoder | None" = None
    _failure: str | None = None

    def forward(
        self,
        pixel_values: Tensor,
        *,
        interpolate_pos_encoding: bool = False,
        select_layers: list[int] | None = None,
        feature_select_strategy: siglip.VisionFeatureSelectStrategy | None = None,
    ) -> Tensor:
        """`pixel_values [B, C, H, W]` → as vLLM's: the last hidden state, or the selected ones side by side."""
        stream = self._run(pixel_values, interpolate_pos_encoding)
        if stream is None:
            return super().forward(
                pixel_values,
                interpolate_pos_encoding=interpolate_pos_encoding,
                select_layers=select_layers,
                feature_select_strategy=feature_select_strategy,
            )
        return siglip.resolve_visual_encoder_outputs(
            stream[-1] if select_layers is None else stream,
            None,
            select_layers=select_layers,
            max_possible_layers=self.config.num_hidden_layers,
            last_hs_proc=self.last_hs_proc,
            feature_select_strategy=feature_select_strategy,
        )

    def why_not(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> str | None:
        """The first reason for which vLLM's own forward would run here and now, or None."""
        reasons = _call_reasons(self, pixel_values, interpolate_pos_encoding)
        return self._failure or next(reasons, None) or next(_tower_reasons(self), None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self._encoder = None  # vLLM's loaders write through `.data`, which torch does not count as an edit
        return super().load_weights(weights)

    def _apply(self, *args, **kwargs) -> "FastSiglipVisionTransformer":
        self._encoder = None
        return super()._apply(*args, **kwargs)

    def _run(self, pixel_values: Tensor, interpolate: bool) -> list[Tensor] | None:
        encoder = self._encoder
        fresh = encoder is None or encoder.state != _state(self)
        reason = self.why_not(pixel_values, interpolate) if fresh else None
        reason = reason or self._failure or next(_call_reasons(self, pixel_values, interpolate), None)
        if reason is None and fresh and is_capturing(pixel_values):
            reason = "a CUDA graph is being captured before the weights were derived"
        if reason is not None:
            _log_once(reason)
            return None
        if not fresh:
            return encoder(pixel_values)
        try:  # a server has to come up, whatever happens on a GPU that nobody has tried
            self._encoder = None  # the old copies go before the new ones are made
            encoder = Encoder(self, backend_for(_backend(), pixel_values.device)[0])
            stream = encoder(pixel_values)
        except Exception as error:
            self._failure = f"the first fused forward failed: {type(error).__name__}: {error}"
            _log_once(self._failure)
            return None
        self._encoder = encoder
        return stream


class Encoder:
    """The weights of a tower's embeddings and encoder as the operations want them, and the forward on them."""

    def __init__(self, tower: nn.Module, backend: str):
        """Copies qkv and fc1, into which LayerNorm is folded; the other weights are vLLM's own memory."""
        self.state = _state(tower)
        self.ops = Ops(backend)
        pack, conv = self.ops.pack_weight, tower.embeddings.patch_embedding
        with torch.inference_mode(False), torch.no_grad():
            weight = pack(_plain(conv.weight).flatten(1))
            self.patch = PatchEmbedding(weight, _plain(conv.bias), tower.embeddings.patch_size)
            self.position = _plain(tower.embeddings.position_embedding.weight)
            self.layers = [
                LayerWeights(
                    qkv=_fold(
                        layer.layer_norm1,
                        layer.self_attn.qkv_proj.weight,
                        layer.self_attn.qkv_proj.bias,
                        pack,
                    ),
                    out_proj=_linear(layer.self_attn.out_proj, pack),
                    fc1=_fold(layer.layer_norm2, layer.mlp.fc1.weight, layer.mlp.fc1.bias, pack),
                    fc2=_linear(layer.mlp.fc2, pack),
                )
                for layer in tower.encoder.layers
            ]
            self.num_heads = tower.config.num_attention_heads
        if weight.is_cuda:
            torch.cuda.current_stream(weight.device).synchronize()  # the next forward may come on another one

    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        """`[B, C, H, W]` → the residual stream `[B, N, D]` before the first layer and after each."""
        ops = self.ops
        x, m = ops.patch_embed(pixel_values, self.patch, self.position)
        stream = [x]
        for layer in self.layers:
            qkv = ops.layernorm_linear(x, m, layer.qkv)
            o = ops.attention(qkv.unflatten(-1, (3, self.num_heads, -1)))
            x, m = ops.linear_residual(o.flatten(2), layer.out_proj, x)
            h = ops.layernorm_linear(x, m, layer.fc1, gelu=True)
            x, m = ops.linear_residual(h, layer.fc2, x)
            stream.append(x)
        return stream


def _call_reasons(tower: nn.Module, pixel_values: Tensor, interpolate: bool) -> Iterator[str]:
    weight, size = tower.embeddings.patch_embedding.weight, tower.embeddings.image_size
    if torch.compiler.is_compiling():
        yield "torch.compile traces the tower"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (pixel_values, *tower.parameters())):
        yield "gradients are needed"
    if torch.is_autocast_enabled(pixel_values.device.type):
        yield "autocast is active"
    if vllm.envs.VLLM_BATCH_INVARIANT:
        yield "VLLM_BATCH_INVARIANT is set"
    if interpolate:
        yield "interpolate_pos_encoding was asked for"
    expected = (weight.shape[1], size, size)
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected or not len(pixel_values):
        yield f"pixel_values have shape {list(pixel_values.shape)}, not [batch, {', '.join(map(str, expected))}]"
    if not pixel_values.is_floating_point() or pixel_values.device != weight.device:
        yield f"pixel_values are {pixel_values.dtype} on {pixel_values.device}, the weights on {weight.device}"
    if reason := backend_for(_backend(), pixel_values.device)[1]:
        yield reason


def _tower_reasons(tower: nn.Module) -> Iterator[str]:
    """Why the operations do not compute what the embeddings and the encoder do."""
    config, dtype = tower.config, tower.embeddings.patch_embedding.weight.dtype
    head_dim = config.hidden_size // config.num_attention_heads
    if config.hidden_act != "gelu_pytorch_tanh":
        yield f"hidden_act is {config.hidden_act!r}, not 'gelu_pytorch_tanh'"
    if head_dim > MAX_HEAD_DIM:
        yield f"head_dim is above {MAX_HEAD_DIM}"
    for part in (tower.embeddings, tower.encoder):
        for name, module in part.named_modules():
            if type(module) not in _KNOWN and not name.endswith("activation_fn"):
                yield f"{name} is a {type(module).__name__}"
            elif module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                yield f"{name} has forward hooks or a forward of its own"
            elif type(module) in _LINEARS:
                yield from _linear_reasons(name, module)
            elif type(module) is MMEncoderAttention and (
                module.fp8_enabled or module.scale != head_dim**-0.5
            ):
                yield f"{name} computes in fp8 or has another scale than head_dim ** -0.5"
        for name, parameter in part.named_parameters():
            if parameter.dtype != dtype or dtype not in DTYPES:
                yield f"{name} is {parameter.dtype}; expected all of one of {DTYPES}"
            if parameter.is_inference():
                yield f"{name} was made under torch.inference_mode, which hides in-place edits"


def _linear_reasons(name: str, linear: nn.Module) -> Iterator[str]:
    shape = (linear.output_size, linear.input_size)
    if type(linear.quant_method) is not UnquantizedLinearMethod:
        yield f"{name} is quantized ({type(linear.quant_method).__name__})"
    elif linear.tp_size != 1:
        yield f"{name} is tensor-parallel over {linear.tp_size} (mm_encoder_tp_mode='data' keeps towers whole)"
    elif tuple(linear.weight.shape) != shape or linear.bias is None or linear.skip_bias_add:
        yield f"{name} has a weight of shape {list(linear.weight.shape)}, expected {list(shape)} and an added bias"


def _state(tower: nn.Module) -> tuple:
    """Whatever the derived weights and `_tower_reasons` depend on; not what is written through `.data`."""
    modules = [*tower.embeddings.modules(), *tower.encoder.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in modules]
    tensors = [(id(p), p.data_ptr(), 0 if p.is_inference() else p._version) for p in tower.parameters()]
    return modules, hooks, tensors


def _backend() -> str:
    return os.environ.get("SIGLIP_FAST_BACKEND", "auto")


_logged: set[str] = set()


def _log_once(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("running vLLM's own SigLIP tower: %s", reason)
