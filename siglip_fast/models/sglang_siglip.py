"""SGLang's SigLIP vision tower, its encoder on the fused operations.

SGLang builds pi0.5's with SigLIP's activation and Gemma 3's with QuickGELU, whatever the checkpoint says.
"""

from collections.abc import Iterator
from types import SimpleNamespace

from sglang.srt.layers.activation import QuickGELU
from sglang.srt.layers.conv import Conv2dLayer
from sglang.srt.models import siglip
from torch import Tensor, nn

from .anatomy import Unsupported, check_position_ids, layer_view
from .server_tower import siglip_anatomy, size_reasons
from .sglang_tower import SglangTower, check_tanh, checks
from .weights import Derived

_KNOWN = (
    *(siglip.SiglipVisionEmbeddings, Conv2dLayer, siglip.SiglipEncoder, nn.ModuleList),
    *(siglip.SiglipEncoderLayer, nn.LayerNorm, siglip.SiglipMLP, QuickGELU),
)


def _layer(layer: nn.Module) -> SimpleNamespace:
    own, norms = layer.self_attn, (layer.layer_norm1, layer.layer_norm2)
    return layer_view(norms, own.qkv_proj, own.proj, own.num_attention_heads_per_partition, layer.mlp)


def _check(tower: nn.Module) -> None:
    check_position_ids(tower.embeddings.position_ids)
    if len({type(layer.mlp.act) for layer in tower.encoder.layers}) > 1:
        raise Unsupported("its layers have different activations")


def _activation(tower: nn.Module) -> str:
    return "quick" if type(tower.encoder.layers[0].mlp.act) is QuickGELU else "tanh"


def _positions(embeddings: nn.Module) -> Tensor:
    """Without the rows that pad the table."""
    return embeddings.position_embedding.weight.detach()[: embeddings.num_positions]


class SiglipVisionTransformer(SglangTower, siglip.SiglipVisionTransformer):
    anatomy = siglip_anatomy(
        lambda tower: None, {**checks(_KNOWN), nn.GELU: check_tanh}, _layer, (nn.Parameter,), _check, _activation
    )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`pixel_values [B, C, H, W]` → as SGLang's, `[B, N, D]` behind post_layernorm."""
        pixel_values, rows = pixel_values.to(self.device), len(pixel_values) * self.embeddings.num_patches

        def encoded(derived: Derived) -> Tensor:
            last, _ = derived.run(pixel_values, derived.kept(_positions, self.embeddings))
            return last

        last = self._fused(encoded, rows, pixel_values)
        return super().forward(pixel_values) if last is None else self.post_layernorm(last)

    def _call_reasons(self, pixel_values: Tensor) -> Iterator[str]:
        yield from super()._call_reasons(pixel_values)
        yield from size_reasons(self, pixel_values)
