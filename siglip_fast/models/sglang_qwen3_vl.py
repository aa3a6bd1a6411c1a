"""SGLang's vision tower of Qwen3-VL and Qwen3.5, made fast."""

from collections.abc import Iterator
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.layers.conv import Conv3dLayer
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.models import qwen3_vl
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .anatomy import Unsupported
from .server_qwen3_vl import Own, Qwen3VLTower, anatomy_of, grids_of
from .sglang_tower import SglangTower, checks
from .weights import Derived

_GELU = type(ACT2FN["gelu_pytorch_tanh"])
_KNOWN = (
    *(qwen3_vl.Qwen3VLVisionPatchEmbed, Conv3dLayer, nn.ModuleList, qwen3_vl.Qwen3_VisionBlock),
    *(nn.LayerNorm, qwen3_vl.Qwen3_VisionMLP, _GELU, nn.GELU),
)


def _check_merger(name: str, module: nn.Module) -> None:
    if module.disable_merger_proj:
        raise Unsupported(f"{name} has no projection")


def _taps(tower: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """In the order in which layers come SGLang takes the mergers, whatever the order of the indexes."""
    tapped = [i for i in range(len(tower.blocks)) if i in tower.deepstack_visual_indexes]
    return zip(tapped, tower.deepstack_merger_list, strict=False)


class Qwen3VLMoeVisionModel(Qwen3VLTower, SglangTower, qwen3_vl.Qwen3VLMoeVisionModel):
    anatomy = anatomy_of(
        Own(
            {**checks(_KNOWN), qwen3_vl.Qwen3VLMoeVisionPatchMerger: _check_merger},
            (nn.Parameter,),
            rotary=RotaryEmbedding,
            gelu=_GELU,
            activation="act",
            qkv="qkv_proj",
            taps=_taps,
        )
    )

    def forward(self, x: Tensor, grid_thw: Tensor | list[list[int]]) -> Tensor:
        """`x [M, K]`, pixels of the patches of all images and videos, `grid_thw [B, 3]` → `[M / 4, out · (1 + taps)]`, as
        SGLang's: the merged rows and beside them those of the taps."""
        x = x.to(self.device, non_blocking=True)

        def merged(derived: Derived) -> Tensor:
            return self._run(derived, x, grids_of(grid_thw))

        out = self._fused(merged, len(x), x, grid_thw)
        return super().forward(x, grid_thw) if out is None else out

    def _request_reasons(self, *args: Any) -> Iterator[str]:
        yield from super()._request_reasons(*args)
        if envs.SGLANG_VIT_ENABLE_CUDA_GRAPH.get():
            yield "SGLANG_VIT_ENABLE_CUDA_GRAPH is set"
