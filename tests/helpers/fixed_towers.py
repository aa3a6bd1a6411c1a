"""Small stock towers for crops or tiles of one size, each with what a call of it takes, for tests."""

import importlib

import pytest
import torch
import transformers
from stock_towers import without_neutral_values
from torch import Tensor, nn

SIZE = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}


def molmo2(**values) -> nn.Module:
    sides = {"image_size": [32, 24], "num_key_value_heads": 2, "head_dim": 24}  # which is not hidden_size / heads
    return _tower("molmo2", "Molmo2VisionModel", **sides | values)


def granite_docling(**values) -> nn.Module:
    taps = {"image_size": 32, "out_hidden_size": 48, "scale_factor": 2, "deepstack_visual_indexes": [0, 2]}
    return _tower("granite_docling", "GraniteDoclingVisionModel", **taps | values)


def janus(**values) -> nn.Module:
    values = {"image_size": 32, "mlp_ratio": 1.5, "intermediate_size": None} | values
    return _tower("janus", "JanusVisionModel", **values)


TOWERS = {"molmo2": molmo2, "granite_docling": granite_docling, "janus": janus}


def inputs(name: str, images: int = 3) -> Tensor:
    """Images each of a different scale."""
    shape = (12, 192) if name == "molmo2" else (3, 32, 32)
    pixels = torch.randn(images, *shape, generator=torch.Generator().manual_seed(1))
    return pixels * torch.tensor([10.0 ** (i % 3 - 1) for i in range(images)]).view(-1, *[1] * len(shape))


def _tower(part: str, name: str, **values) -> nn.Module:
    """A stock tower with nothing at its neutral value."""
    try:
        home = importlib.import_module(f"transformers.models.{part}.modeling_{part}")
    except ImportError:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    stock = getattr(home, name)
    config = stock.config_class(**{key: value for key, value in (SIZE | values).items() if value is not None})
    config._attn_implementation = "sdpa"
    return without_neutral_values(stock(config))
