"""vLLM's vision tower of Qwen3-VL and Qwen3.5, made fast."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.conv import Conv3dLayer
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.model_executor.models import qwen2_5_vl, qwen3_vl

from .server_qwen3_vl import Own, Qwen3VLTower, anatomy_of, grids_of
from .vllm_tower import GELU, PARAMETERS, VllmTower, checks
from .weights import Derived

_KNOWN = (
    *(qwen3_vl.Qwen3_VisionPatchEmbed, Conv3dLayer, nn.Embedding, nn.ModuleList, qwen3_vl.Qwen3_VisionBlock),
    *(nn.LayerNorm, qwen2_5_vl.Qwen2_5_VisionAttention, ApplyRotaryEmb, qwen3_vl.Qwen3_VisionMLP),
    *(qwen3_vl.Qwen3_VisionPatchMerger, nn.GELU),
)


class Qwen3_VisionTransformer(Qwen3VLTower, VllmTower, qwen3_vl.Qwen3_VisionTransformer):  # noqa: N801, as vLLM spells it
    anatomy = anatomy_of(
        Own(
            checks(_KNOWN),
            PARAMETERS,
            rotary=RotaryEmbedding,
            gelu=GELU,
            activation="act_fn",
            qkv="qkv",
            taps=lambda tower: zip(tower.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True),
        )
    )

    def forward(
        self, x: Tensor, grid_thw: Tensor | list[list[int]], *, encoder_metadata: dict[str, Tensor] | None = None
    ) -> Tensor:
        """`x [M, K]`, pixels of the patches of all images and videos, `grid_thw [B, 3]` → `[M / 4, out · (1 + taps)]`, as
        vLLM's: the merged rows and beside them those of the taps."""
        x = x.to(self.device, non_blocking=True)

        def merged(derived: Derived) -> Tensor:
            return self._run(derived, self.input_norm(x, self.dtype), grids_of(grid_thw))

        out = self._fused(merged, len(x), x, grid_thw, encoder_metadata)
        return super().forward(x, grid_thw, encoder_metadata=encoder_metadata) if out is None else out

    def _call_reasons(self, x: Tensor, grid_thw: Any, encoder_metadata: Any) -> Iterator[str]:
        if encoder_metadata is None:
            yield from super()._call_reasons(x, grid_thw, encoder_metadata)
        else:  # and no grids
            yield "encoder_metadata is given, as inside of vLLM's CUDA graphs of encoders"
