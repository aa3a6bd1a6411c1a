"""What the fast towers of SGLang have in common: what their linears, attention and embeddings have to be.

Written against SGLang 0.5.23.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping

from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
from sglang.srt.layers import linear
from sglang.srt.layers.attention.vision import QKV_BACKEND_IMPL, VisionAttention
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.utils import use_intel_amx_backend
from torch import nn

from .anatomy import Unsupported
from .base import stock_class
from .server_tower import Check, ServerTower, check_linear

_WHOLE = "--mm-enable-dp-encoder keeps some models' towers whole"
_check_plain_linear = check_linear(
    UnquantizedLinearMethod, lambda module: linear.get_group_rank_size(module.tp_group)[1], _WHOLE
)


def _check_unpacked(name: str, module: nn.Module) -> None:
    if use_intel_amx_backend(module):
        raise Unsupported(f"{name} is packed for AMX")


def _check_linear(name: str, module: nn.Module) -> None:
    _check_unpacked(name, module)
    _check_plain_linear(name, module)


def _check_qkv(name: str, module: nn.Module) -> None:
    _check_linear(name, module)
    if module.output_size != 3 * module.input_size:
        raise Unsupported(f"{name} makes {module.output_size} channels of {module.input_size}, not three times as many")


def _check_whole(name: str, module: nn.Module) -> None:
    if module.tp_size != 1:
        raise Unsupported(f"{name} is tensor-parallel over {module.tp_size} ({_WHOLE})")


def _check_embedding(name: str, module: nn.Module) -> None:
    _check_whole(name, module)
    if type(module.quant_method) is not UnquantizedEmbeddingMethod:
        raise Unsupported(f"{name} is quantized ({type(module.quant_method).__name__})")


def _check_attention(name: str, module: nn.Module) -> None:
    """Of the many settings for other models' towers all have to be off."""
    _check_whole(name, module)
    is_plain = (
        module.use_qkv_parallel
        and not module.qk_normalization
        and not module.qk_normalization_by_head_size
        and module.customized_position_embedding_applier is None
        and module.softmax_scale in (None, module.head_size**-0.5)
        and module.sinks is None
        and not module.dropout  # which one of the backends applies in inference too
        and module.num_attention_kv_heads_per_partition == module.num_attention_heads_per_partition
    )
    if not is_plain:
        raise Unsupported(f"{name} is not plain softmax attention")


_CHECKS: dict[type, Check] = {
    linear.QKVParallelLinear: _check_qkv,
    linear.ColumnParallelLinear: _check_linear,
    linear.RowParallelLinear: _check_linear,
    VisionAttention: _check_attention,
    VocabParallelEmbedding: _check_embedding,
}


def checks(known: Iterable[type]) -> Mapping[type, Check]:
    """Those of a tower whose other modules are of the `known` classes."""
    return dict.fromkeys((*known, *QKV_BACKEND_IMPL.values()), _check_unpacked) | _CHECKS


def check_tanh(name: str, module: nn.GELU) -> None:
    if module.approximate != "tanh":
        raise Unsupported(f"{name} is {module!r}, not GELU by tanh")


class SglangTower(ServerTower):
    server = "SGLang"

    @classmethod
    def declines(cls, tower: nn.Module) -> str | None:
        takes, expected = ([*inspect.signature(each.forward).parameters] for each in (stock_class(cls), cls))
        if takes != expected:  # another version's
            return f"its forward takes {takes}, expected {expected}"
        try:
            cls.anatomy.check(tower)
        except Unsupported as unsupported:
            return str(unsupported)
        return None

    def _request_reasons(self, *args, **kwargs) -> Iterator[str]:
        yield from super()._request_reasons(*args, **kwargs)
        if is_batch_invariant_mode_enabled() and not self.batch_invariant:
            yield "SGLang's deterministic inference is on (and SIGLIP_FAST_BATCH_INVARIANT=1 is not)"
