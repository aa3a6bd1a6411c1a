"""Batches of images of any size, as users have them: which towers, which sizes, what they are given."""

from typing import NamedTuple

import torch
from environment import DEVICE, IMITATED
from torch import Tensor
from transformers import PretrainedConfig, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

Grid = tuple[int, int, int]  # frames, and patches by height and width

MIXES: dict[str, list[Grid]] = {
    # What NaFlex's processor makes, with 256 patches at most, of photographs of eight common aspect ratios
    "album-256": [(1, *hw) for hw in ((14, 18), (18, 14), (13, 19), (12, 21), (21, 12), (16, 16), (9, 28), (22, 11))],
    # Eight images that it was told not to enlarge
    "mixed-256": [(1, *hw) for hw in ((16, 16), (12, 21), (20, 12), (10, 10), (14, 18), (8, 30), (16, 12), (9, 14))],
    "album": [(1, *hw) for hw in ((32, 24), (24, 32), (18, 32), (16, 16), (28, 28), (40, 18))],
    "pages": [(1, *hw) for hw in ((32, 32), (44, 32), (64, 46), (90, 64), (128, 128))],  # 1,024 to 16,384 patches
    "video": [(16, 18, 32)],
}


class PackedCase(NamedTuple):
    tower: str
    mix: str
    dtype: str
    rounds: int = 10

    @property
    def variant(self) -> str:
        return f"{self.tower}, {self.mix}"

    @property
    def batch_size(self) -> int:
        return len(MIXES[self.mix])

    def __str__(self) -> str:
        return f"{self.tower}-{self.mix}-{self.dtype}"


TOWERS = {"siglip2-base-naflex": Siglip2VisionModel, "qwen3-vl-1024": Qwen3VLVisionModel}
_LAYERS = 2 if IMITATED else 4 if DEVICE == "cpu" else None  # None: all. A layer is as fast as any other
_BATCHES = {
    "cpu": [("siglip2-base-naflex", "album-256"), ("siglip2-base-naflex", "mixed-256"), ("qwen3-vl-1024", "album")],
    "cuda": [
        *(("siglip2-base-naflex", mix) for mix in ("album-256", "mixed-256")),
        *(("qwen3-vl-1024", mix) for mix in ("album", "pages", "video")),
    ],
}
_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
PACKED_CASES = [PackedCase(*batch, dtype) for batch in _BATCHES[DEVICE] for dtype in _DTYPES[DEVICE]]


def config_of(tower: str) -> PretrainedConfig:
    if tower == "siglip2-base-naflex":
        config = Siglip2VisionConfig()
        config.num_hidden_layers = _LAYERS or config.num_hidden_layers
        return config
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "depth": 24, "out_hidden_size": 2560}
    config = Qwen3VLVisionConfig(**sizes, deepstack_visual_indexes=[5, 11, 17])
    if _LAYERS:
        config.depth, config.deepstack_visual_indexes = _LAYERS, [0, 1]
    return config


def inputs(case: PackedCase, config: PretrainedConfig) -> dict[str, Tensor]:
    """Arguments of the tower's forward, pixels in float32."""
    grids = torch.tensor(MIXES[case.mix], device=DEVICE)
    lengths = grids.prod(1)
    if case.tower != "siglip2-base-naflex":
        K = config.in_channels * config.temporal_patch_size * config.patch_size**2
        return {"hidden_states": torch.randn(int(lengths.sum()), K, device=DEVICE), "grid_thw": grids}
    rows = 256
    mask = (torch.arange(rows, device=DEVICE) < lengths[:, None]).int()
    pixels = torch.randn(len(grids), rows, config.num_channels * config.patch_size**2, device=DEVICE) * mask[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids[:, 1:]}


def flops(case: PackedCase, config: PretrainedConfig) -> int:
    """Of the layers, on what is no padding."""
    D, F = config.hidden_size, config.intermediate_size
    layers = getattr(config, "num_hidden_layers", None) or config.depth
    segments = [h * w for t, h, w in MIXES[case.mix] for _ in range(t)]
    return layers * (2 * sum(segments) * (4 * D * D + 2 * D * F) + 4 * D * sum(n * n for n in segments))
