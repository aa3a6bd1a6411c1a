"""Stock models whose weights leave nothing neutral, and the drop-in with the same weights."""

import copy
import platform

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

import siglip_fast

ONEDNN = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
TINY = {
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}


def stock_model(
    config: PretrainedConfig, attn_implementation: str = "eager", architecture: str = "SiglipVisionModel"
) -> nn.Module:
    """transformers' model with weights that leave nothing at its neutral value."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation=attn_implementation)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, 1, 0.4)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.2)
    return model.eval()


def drop_in(stock: nn.Module, **kwargs) -> nn.Module:
    config = copy.deepcopy(stock.config)
    config._attn_implementation = "sdpa"
    model = getattr(siglip_fast, type(stock).__name__)(config, **kwargs)
    model.load_state_dict(stock.state_dict())
    parameter = next(stock.parameters())
    return model.to(parameter.device, parameter.dtype).eval()
