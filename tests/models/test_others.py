"""Towers that are left alone: listed with the reason, under names that transformers has."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers

import siglip_fast
from siglip_fast.models import swap
from siglip_fast.models.others import OTHERS


@pytest.mark.parametrize("path", [*swap._FAST, *OTHERS])
def test_transformers_has_it(path):
    """Or has no such module, or has it no more."""
    module, name = path.rsplit(".", 1)
    package = module.rsplit(".", 1)[0]
    if not module.startswith("transformers.") or importlib.util.find_spec(package) is None:
        pytest.skip("this transformers has no such module")
    source = (Path(importlib.util.find_spec(package).origin).parent / f"{module.rsplit('.', 1)[1]}.py").read_text()
    if name in ("SiglipVisionTransformer", "Siglip2VisionTransformer") and f"class {name}(" not in source:
        pytest.skip("until transformers 5.6")
    assert re.search(rf"^class {name}\(", source, re.MULTILINE)


def test_is_listed():
    home = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
    config = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig
    tower = home.Qwen2_5_VisionTransformerPretrainedModel(config(depth=1, hidden_size=32, num_heads=2))
    model = torch.nn.ModuleDict({"visual": tower})
    (found,) = siglip_fast.towers(model)
    assert not found.fast and "RMSNorm" in found.reason
    assert type(siglip_fast.apply_to(model)["visual"]) is type(tower)
    assert not set(OTHERS) & set(swap._FAST)
