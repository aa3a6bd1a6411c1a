"""attention_pool against nn.MultiheadAttention with the probe as its query."""

import copy

import pytest
import reference
import torch
from packed import segments_of
from siglip_fast.kernels.attention_pool import attention_pool_config
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


def attend(head, y):
    probe = head.probe.expand(len(y), 1, -1)
    attention = head.attention
    attention.out_proj.weight.copy_(torch.eye(y.shape[-1]))
    attention.out_proj.bias.zero_()
    return attention(probe, y, y)[0][:, 0]


def check(head, y, backend):
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


def scores_weight(head, backend):
    return Maker(Ops(backend), torch.float32, tokens=1).head(head).pool.scores


@pytest.mark.parametrize("N", [33, 261])
def test_splits_are_merged(N, dtype, backend, device):
    """In one image the first of them dominates, in one the last, which is ragged, and in one none does."""
    splits_and_slots(N, dtype)
    torch.manual_seed(N)
    head = make(128, 2, dtype, device)
    scores = scores_weight(head, backend).mean(0).cpu()
    ramp = torch.tensor([-8.0, 8.0, 0.0])[:, None] * torch.linspace(-1, 1, N) ** 9  # steep at its ends
    y = torch.randn(3, N, 128) * 0.5 + ramp[:, :, None] * scores / scores.square().sum()
    check(head, y.to(device, dtype), backend)


@pytest.mark.parametrize("N", [33, 261])
def test_the_last_token_counts_once(N, dtype, backend, device):
    """Copies of it stand in for tokens and splits that are not there, and it dwarfs all others."""
    splits_and_slots(N, dtype)
    torch.manual_seed(N)
    head = make(128, 2, dtype, device)
    scores = scores_weight(head, backend).cpu()
    last = torch.randn(128)
    last -= torch.linalg.pinv(scores) @ (scores @ last)  # all scores are around its 0
    y = torch.randn(2, N, 128) * 0.1
    y[:, -1] = 100 * last
    check(head, y.to(device, dtype), backend)


def splits_and_slots(N, dtype):
    """33: 3 splits where the value projection has place for 4; 261: 17, one more than it takes at a time."""
    config = attention_pool_config(dtype, "", 3, N)
    assert (config["pool"]["BLOCK_N"], config["value"]["BLOCK_M"]) == (16, 16)


LENGTHS = [  # keys, and rows that are none, of each image
    pytest.param([5, 130, 1, 33], [1, 0, 3, 7], id="uneven"),
    pytest.param([270, 2], None, id="more-splits-than-a-tile"),
    pytest.param([37, 37, 37], None, id="equal"),
]


@pytest.mark.parametrize("keys, extra", LENGTHS)
def test_segments(keys, extra, dtype, backend, device):
    """Every score of an image is below 0, those of its neighbours and of the rows that are no keys far above it."""
    torch.manual_seed(0)
    head = make(64, 2, dtype, device)
    scores = scores_weight(head, backend).mean(0)
    segments = segments_of(keys, device, extra)
    y = torch.randn(sum(segments.queries), 64).to(device) * 0.1
    for i, (first, queries, count) in enumerate(zip(*segments[:3], strict=True)):
        y[first : first + queries] += (40 if i % 2 else -40) * scores / scores.norm()
        y[first + count : first + queries] -= (80 if i % 2 else -80) * scores / scores.norm()
    y = y.to(dtype)
    ops = Ops(backend)
    pool = Maker(ops, dtype, tokens=1).head(head).pool
    out = ops.attention_pool(y, pool, segments)
    images = [y[first : first + count][None] for first, count in zip(segments.first, segments.keys, strict=True)]
    expected = torch.cat([attend(copy.deepcopy(head).double(), image.double()) for image in images])
    reference.assert_accurate(out, expected, torch.cat([attend(copy.deepcopy(head), image) for image in images]))


@pytest.mark.parametrize("backend", ["triton"])
def test_bits_do_not_depend_on_the_other_segments(dtype, backend, device):
    """Batch invariant, whatever their lengths, and though one alone is of one size with itself."""
    torch.manual_seed(0)
    keys, ops = [5, 270, 40], Ops(backend, batch_invariant=True)
    pool = Maker(ops, dtype, tokens=1).head(make(64, 2, dtype, device)).pool
    y = torch.randn(sum(keys), 64).to(device, dtype)
    together = ops.attention_pool(y, pool, segments_of(keys, device))
    for part, expected, length in zip(y.split(keys), together, keys, strict=True):
        assert torch.equal(ops.attention_pool(part, pool, segments_of([length], device))[0], expected)


@pytest.mark.parametrize("backend", ["triton"])
def test_an_entry_of_zeros_harms_no_other(dtype, backend, device):
    torch.manual_seed(0)
    ops, segments = Ops(backend), segments_of([40, 3], device)
    pool = Maker(ops, dtype, tokens=1).head(make(64, 2, dtype, device)).pool
    y = torch.randn(43, 64).to(device, dtype)
    longer = {name: (*getattr(segments, name), 0) for name in ("first", "queries", "keys")}
    table = torch.cat([segments.table, segments.table.new_zeros(1, 3)])
    out = ops.attention_pool(y, pool, segments._replace(**longer, table=table))
    assert torch.equal(out[:2], ops.attention_pool(y, pool, segments)) and out.isfinite().all()
