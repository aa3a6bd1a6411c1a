"""attention_pool against nn.MultiheadAttention with the probe as its query."""

import copy

import pytest
import reference
import torch
from torch import nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

from siglip_fast.models.weights import Maker
from siglip_fast.ops import Ops

SHAPES = [  # B, N, D, H
    pytest.param(2, 196, 768, 12, id="B16-224"),
    pytest.param(1, 729, 1152, 16, id="So400m-384"),
    pytest.param(17, 5, 96, 4, id="more-images-than-a-tile"),
    pytest.param(3, 1, 72, 1, id="one-token-one-head"),
    pytest.param(2, 33, 144, 18, id="more-heads-than-16"),
]


def make(D, H, dtype, device):
    config = SiglipVisionConfig(hidden_size=D, num_attention_heads=H, intermediate_size=2 * D)
    head = SiglipMultiheadAttentionPoolingHead(config)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=D**-0.5)
    nn.init.normal_(head.attention.in_proj_bias, std=1.0)
    return head.to(device, dtype).requires_grad_(False)


def check(head, y, backend):
    def attend(head, y):
        probe = head.probe.expand(len(y), 1, -1)
        attention = head.attention
        attention.out_proj.weight.copy_(torch.eye(y.shape[-1]))
        attention.out_proj.bias.zero_()
        return attention(probe, y, y)[0][:, 0]

    ops = Ops(backend)
    out = ops.attention_pool(y, Maker(ops, y.dtype, tokens=1).head(head).pool)
    same_dtype = attend(copy.deepcopy(head), y)
    reference.assert_accurate(out, attend(copy.deepcopy(head).double(), y.double()), same_dtype)


@pytest.mark.parametrize("B, N, D, H", SHAPES)
def test_accuracy(B, N, D, H, dtype, backend, device):
    torch.manual_seed(N + D)
    check(make(D, H, dtype, device), torch.randn(B, N, D).to(device, dtype), backend)


def test_a_phantom_token_would_dominate(dtype, backend, device):
    """Every real score is below the 0 of a token that is not there."""
    torch.manual_seed(0)
    head = make(128, 2, dtype, device)
    scores = Maker(Ops(backend), torch.float32, tokens=1).head(head).pool.scores
    y = torch.randn(2, 37, 128).to(device) * 0.1 - 40 * scores.mean(0) / scores.mean(0).norm()
    assert (y.float() @ scores.T).max() < -4
    check(head, y.to(dtype), backend)
