"""vLLM's SigLIP vision tower (Gemma 3, PaliGemma, LLaVA, …), its encoder on the fused operations.

Only what is behind `embeddings` and `encoder` is vLLM's own: post_layernorm, head and the selection of features.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from vllm.model_executor.layers.conv import Conv2dLayer
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.models import siglip

from .anatomy import check_position_ids
from .outputs import HiddenStates
from .server_tower import size_reasons
from .vllm_tower import VllmTower, siglip_anatomy
from .weights import Derived

_KNOWN = (
    *(siglip.SiglipVisionEmbeddings, Conv2dLayer, nn.Embedding, siglip.SiglipEncoder, nn.ModuleList),
    *(siglip.SiglipEncoderLayer, LayerNorm, siglip.SiglipAttention, siglip.SiglipMLP),
)


class SiglipVisionTransformer(VllmTower, siglip.SiglipVisionTransformer):
    anatomy = siglip_anatomy(_KNOWN, lambda tower: check_position_ids(tower.embeddings.position_ids))

    def forward(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs) -> Tensor:
        """`pixel_values [B, C, H, W]` → as vLLM's: the last hidden state, or the selected ones side by side."""
        every, position = kwargs.get("select_layers") is not None, self.embeddings.position_embedding.weight

        def encoded(derived: Derived) -> Tensor | list[Tensor]:
            """What vLLM's encoder returns: the last of its hidden states `[B, N, D]`, or every one."""
            stream = HiddenStates() if every else None
            last, _ = derived.run(pixel_values, position, stream)
            return stream.kept if every else last

        states = self._fused(encoded, len(pixel_values) * len(position), pixel_values, interpolate_pos_encoding)
        if states is None:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
            return super().forward(pixel_values, **kwargs)
        kwargs |= {"max_possible_layers": self.config.num_hidden_layers, "last_hs_proc": self.last_hs_proc}
        return siglip.resolve_visual_encoder_outputs(states, None, **kwargs)

    def _call_reasons(self, pixel_values: Tensor, *args, **kwargs) -> Iterator[str]:
        yield from super()._call_reasons(pixel_values, *args, **kwargs)
        yield from size_reasons(self, pixel_values)

    def _request_reasons(self, interpolate_pos_encoding: bool = False) -> Iterator[str]:
        yield from super()._request_reasons()
        if interpolate_pos_encoding:
            yield "interpolate_pos_encoding was asked for"
