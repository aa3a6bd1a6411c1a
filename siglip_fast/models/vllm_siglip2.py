"""vLLM's SigLIP 2 vision tower (LFM2-VL), made fast."""

from torch import nn
from vllm.model_executor.models import lfm2_siglip2

from .server_siglip2 import Siglip2Tower
from .vllm_tower import VllmTower, siglip_anatomy

_KNOWN = (
    *(lfm2_siglip2.Siglip2VisionEmbeddings, nn.Embedding, lfm2_siglip2.Siglip2Encoder, nn.ModuleList),
    *(lfm2_siglip2.Siglip2EncoderLayer, nn.LayerNorm, lfm2_siglip2.Siglip2Attention, lfm2_siglip2.Siglip2MLP),
)


class Siglip2VisionTransformer(Siglip2Tower, VllmTower, lfm2_siglip2.Siglip2VisionTransformer):
    anatomy = siglip_anatomy(_KNOWN)
    resolve = staticmethod(lfm2_siglip2.resolve_visual_encoder_outputs)
