"""SGLang's SigLIP 2 vision tower (LFM2-VL, Cosmos 3 Edge), made fast."""

from types import SimpleNamespace

from sglang.srt.models import siglip2
from torch import nn

from .anatomy import layer_view
from .server_siglip2 import Siglip2Tower
from .server_tower import siglip_anatomy
from .sglang_tower import SglangTower, check_tanh, checks

_KNOWN = (
    *(siglip2.Siglip2VisionEmbeddings, nn.Linear, nn.Embedding, siglip2.Siglip2Encoder, nn.ModuleList),
    *(siglip2.Siglip2EncoderLayer, nn.LayerNorm, siglip2.Siglip2Attention, siglip2.Siglip2MLP),
)


def _layer(layer: nn.Module) -> SimpleNamespace:
    own, norms = layer.self_attn.attn, (layer.layer_norm1, layer.layer_norm2)
    return layer_view(norms, own.qkv_proj, own.proj, own.num_attention_heads_per_partition, layer.mlp)


class Siglip2VisionTransformer(Siglip2Tower, SglangTower, siglip2.Siglip2VisionTransformer):
    anatomy = siglip_anatomy(lambda tower: None, {**checks(_KNOWN), nn.GELU: check_tanh}, _layer, (nn.Parameter,))
    resolve = staticmethod(siglip2.resolve_visual_encoder_outputs)
