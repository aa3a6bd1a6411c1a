"""Small towers for images of any size, and calls of them, for tests."""

import importlib

import pytest
import torch
import transformers
from stock_towers import without_neutral_values
from torch import Tensor, nn

from siglip_fast.models import minicpm, qwen3_vl

NAFLEX_K = 3 * 8 * 8  # of zoo.SIGLIP2_VISION
QWEN3_VL = {"depth": 3, "hidden_size": 64, "intermediate_size": 100, "num_heads": 2, "out_hidden_size": 48}
QWEN3_VL |= {"patch_size": 4, "num_position_embeddings": 100}
QWEN3_VL_K = 3 * 2 * 4 * 4
MIXED = [(1, 4, 6), (1, 2, 2), (2, 8, 4)]


def naflex_inputs(shapes: list[tuple[int, int]], rows: int, patch: int = NAFLEX_K) -> dict[str, Tensor]:
    """Each of a different scale, so that what leaks from one to another shows."""
    generator = torch.Generator().manual_seed(len(shapes) + rows)
    pixel_values, mask = torch.zeros(len(shapes), rows, patch), torch.zeros(len(shapes), rows, dtype=torch.int32)
    for i, (height, width) in enumerate(shapes):
        pixel_values[i, : height * width] = torch.randn(height * width, patch, generator=generator) * 10 ** (i % 3 - 1)
        mask[i, : height * width] = 1
    return {"pixel_values": pixel_values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}


def qwen3_vl_tower(name="Qwen3VLVisionModel", dtype=torch.float32, **values):
    """A stock tower with nothing at its neutral value."""
    part = qwen3_vl.MODULES[name]
    stock = getattr(importlib.import_module(f"transformers.models.{part}.modeling_{part}"), name)
    if "deepstack_visual_indexes" in stock.config_class().to_dict():
        values = {"deepstack_visual_indexes": [0, 2]} | values
    torch.manual_seed(0)
    config = stock.config_class(**QWEN3_VL | values)
    config._attn_implementation = "sdpa"
    return without_neutral_values(stock(config), scores=("qkv",)).to(dtype)


def qwen3_vl_inputs(grids=MIXED, dtype=torch.float32, width=QWEN3_VL_K):
    """Rows of pixels, a few of whose columns dwarf the others, and grid_thw."""
    rows = torch.randn(sum(t * h * w for t, h, w in grids), width, generator=torch.Generator().manual_seed(1))
    rows[:, :: width // 3] *= 30
    return rows.to(dtype), torch.tensor(grids)


PADDED = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
PADDED |= {"image_size": 32, "patch_size": 8}
PADDED_IN = {  # classes → the part of transformers that they are in
    "Idefics2VisionTransformer": "idefics2",
    "Idefics3VisionTransformer": "idefics3",
    "SmolVLMVisionTransformer": "smolvlm",
    "Phi4MultimodalVisionModel": "phi4_multimodal",
}


def padded_tower(name: str, **values) -> nn.Module:
    """A stock tower for images padded under a mask, with nothing at its neutral value."""
    stock = getattr(importlib.import_module(f"transformers.models.{PADDED_IN[name]}.modeling_{PADDED_IN[name]}"), name)
    torch.manual_seed(0)
    config = stock.config_class(**PADDED | values)
    config._attn_implementation = "sdpa"
    return without_neutral_values(stock(config))


def padded_inputs(shapes: list[tuple[int, int]], grid: tuple[int, int], fill: float | None = 0.0) -> dict[str, Tensor]:
    """Images of so many patches, each of a different scale, padded to `grid` of them with pixels that are `fill`, or all others."""
    pixels = torch.randn(len(shapes), 3, 8 * grid[0], 8 * grid[1], generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(len(shapes), *grid, dtype=torch.bool)
    for i, (height, width) in enumerate(shapes):
        mask[i, :height, :width] = True
        pixels[i] *= 10.0 ** (i % 3 - 1)
    if fill is not None:
        pixels = torch.where(mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None], pixels, fill)
    return {"pixel_values": pixels, "patch_attention_mask": mask}


MINICPM = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 2}
MINICPM |= {"image_size": 32, "patch_size": 8, "insert_layer_id": 1}


def minicpm_tower(name: str = "MiniCPMV4_6VisionModel", **values) -> nn.Module:
    """Stock's, with nothing at its neutral value."""
    try:
        home = importlib.import_module(f"transformers.models.{minicpm.MODULES[name]}.modeling_{minicpm.MODULES[name]}")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    config = getattr(home, name).config_class(**MINICPM | values)
    config._attn_implementation = "sdpa"
    return without_neutral_values(getattr(home, name)(config))


def minicpm_strip(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Images each of a different scale."""
    generator = torch.Generator().manual_seed(1)
    images = [
        torch.randn(1, 3, 8, 8 * h * w, generator=generator) * 10.0 ** (i % 3 - 1) for i, (h, w) in enumerate(sizes)
    ]
    return {"pixel_values": torch.cat(images, -1), "target_sizes": torch.tensor(sizes, dtype=torch.int32)}
