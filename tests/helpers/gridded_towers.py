"""Small towers that take pixels and grids, one a family, calls of them, and how ours are held to stock's, for tests."""

import copy
import importlib
import importlib.util
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
import zoo
from reference import assert_accurate
from stock_towers import without_neutral_values
from torch import Tensor, nn

from siglip_fast import apply_to
from siglip_fast.running.grids import frames

SIZE = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}
MIXED = [(1, 4, 6), (1, 2, 2), (1, 8, 4)]
Grids = Sequence[tuple[int, int, int]]
Call = dict[str, Tensor]


class Family(NamedTuple):
    name: str  # of the class
    values: Mapping[str, object]  # of its config
    row: tuple[int, ...]  # a patch's pixels
    side: int = 2  # of the squares that a grid has to consist of
    takes_beside: bool = False  # merge_sizes
    images_only: bool = False  # frames of videos are images then
    pixels: str = "pixel_values"  # the argument's name
    drops: bool = True  # whether its layers heed a rate of attention dropout
    adds_tokens: bool = False  # of no patch, behind each image's merged rows and between them

    def call(self, grids: Grids, dtype: torch.dtype = torch.float32, merges: Sequence[int] | None = None) -> Call:
        """The forward's arguments. A few columns of the pixels dwarf the others."""
        if self.images_only:
            grids = [(min(t, 1), h, w) for t, h, w in grids for _ in range(max(t, 1))]
        count = sum(t * h * w for t, h, w in grids)
        rows = torch.randn(count, math.prod(self.row), generator=torch.Generator().manual_seed(1))
        rows[:, ::16] *= 30
        call = {self.pixels: rows.view(count, *self.row).to(dtype), "grid_thw": torch.tensor(grids)}
        if self.takes_beside:
            call["merge_sizes"] = torch.tensor([2 if t > 1 else 1 for t, _, _ in grids] if merges is None else merges)
        if self.name == "PaddleOCRVisionTransformer":
            call["pixel_values"] = call["pixel_values"][None]
            if takes_bounds():
                call["image_grid_thw"] = call.pop("grid_thw")
                bounds = np.cumsum([0, *frames(grids)]) if min(map(min, grids), default=0) > 0 else [0]
                call["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
        return call


BLOCKS = {"depth": 3, "num_heads": 2}  # as some configs call what others call num_hidden_layers, num_attention_heads
GLM_IMAGE = BLOCKS | {"image_size": 40, "spatial_merge_size": 2}
QWEN2_VL = BLOCKS | {"embed_dim": 64, "hidden_size": 48, "mlp_ratio": 2}  # of what it merges into, the latter
FAMILIES = {
    "paddleocr_vl": Family("PaddleOCRVisionTransformer", {"image_size": 40}, (3, 4, 4), side=1),
    "kimi_k25": Family("Kimi_K25VisionModel", {"pos_emb_height": 10, "pos_emb_width": 10}, (3, 4, 4), drops=False),
    "video_llama_3": Family("VideoLlama3VisionModel", {}, (48,), takes_beside=True),
    "glm_image": Family("GlmImageVisionModel", GLM_IMAGE, (48,), images_only=True),
    "cosmos3_edge": Family("Cosmos3EdgeVisionModel", {"num_patches": 100}, (48,)),
    "qwen2_vl": Family("Qwen2VisionTransformerPretrainedModel", QWEN2_VL, (96,), pixels="hidden_states", drops=False),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeVisionTransformerPretrainedModel", BLOCKS, (48,), pixels="hidden_states", drops=False
    ),
    "hunyuan_vl": Family(
        "HunYuanVLVisionTransformer",
        {"max_image_size": 40, "text_hidden_size": 48},
        (48,),
        side=1,
        images_only=True,
        drops=False,
        adds_tokens=True,
    ),
    "hy_v4_vl": Family(
        "HYV4VLVisionModel", {"max_image_size": 40, "out_hidden_size": 48}, (48,), side=1, drops=False, adds_tokens=True
    ),
}


def stock_class(family: str) -> type[nn.Module]:
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), FAMILIES[family].name)


INSTALLED = [family for family in FAMILIES if importlib.util.find_spec(f"transformers.models.{family}")]


def takes_bounds() -> bool:
    """Whether PaddleOCR-VL's tower is given cu_seqlens, as until transformers 5.6."""
    return "cu_seqlens" in inspect.signature(stock_class("paddleocr_vl").forward).parameters


def tower(family: str, dtype: torch.dtype = torch.float32, **values) -> nn.Module:
    """A stock tower with nothing at its neutral value."""
    stock = stock_class(family)
    torch.manual_seed(0)
    values = SIZE | FAMILIES[family].values | values
    if "depth" in values:
        values["depth"] = values.pop("num_hidden_layers")
    config = stock.config_class(**values)
    config._attn_implementation = "sdpa"
    return without_neutral_values(stock(config), scores=("q_proj", "k_proj", "qkv")).to(dtype)


def fast(stock, **kwargs):
    return apply_to(copy.deepcopy(stock), **{"strict": True, "backend": "torch"} | kwargs)


def exact(stock, call, **kwargs):
    """What stock gives in float64."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in call.items()}
    return copy.deepcopy(stock).double()(**wide, **kwargs)


def assert_as(stock, ours, call, **kwargs):
    assert_accurate_outputs(ours(**call, **kwargs), stock(**call, **kwargs), exact(stock, call, **kwargs))


def assert_accurate_outputs(actual, expected, exact):
    """Within the accuracy rule, every output, and of the same form."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
    expected, actual, exact = map(zoo.tensors, (expected, actual, exact))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_accurate(actual[name], exact[name], tensor)


def assert_left_to_stock(stock, ours, call, reason=""):
    """Which raises, or computes something."""
    assert reason in (ours.why_not(**call) or "nothing speaks against it")
    with pytest.raises(RuntimeError, match="does not apply"):
        ours(**call)
    ours.strict = False
    try:
        expected = zoo.tensors(stock(**call))
    except Exception as error:
        with pytest.raises((type(error), KeyError)):  # Python raises either for a keyword given twice
            ours(**call)
    else:
        actual = zoo.tensors(ours(**call))
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
