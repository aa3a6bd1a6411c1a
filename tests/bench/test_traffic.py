"""bench/traffic.py counts right, its targets hold, and a forward that wastes launches or bytes misses them."""

import json
import math
from collections import Counter

import pytest
import torch
import traffic
from models import TINY
from siglip_fast.kernels import attention_pool
from torch import nn
from transformers import SiglipVisionConfig

from siglip_fast.models.variants import config_for
from siglip_fast.ops import Ops

BATCH, LAYERS, TOKENS, D, F = 2, 2, 9, 64, 100  # of TINY


@pytest.fixture(autouse=True)
def poison_empty():
    """Not here: filling `torch.empty` with NaN would be a kernel."""


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.empty(BATCH, 3, 24, 24, dtype=torch.bfloat16, device="meta")


def test_counter_by_hand():
    """Every rule once. x has 2·3·4 = 24 elements, its projection 48."""
    leaf = torch.empty(2, 4, 3, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        norm, linear = nn.LayerNorm(4).bfloat16(), nn.Linear(4, 8).bfloat16()
        row = torch.empty(1, 8)
    with traffic.counting([*norm.parameters(), *linear.parameters()]) as counter:
        y = linear(norm(leaf.transpose(1, 2)))
        q = y.unflatten(-1, (2, 4)).transpose(1, 2)
        o = nn.functional.scaled_dot_product_attention(q, q.view_as(q), q.view_as(q))
        z = o.transpose(1, 2).contiguous().flatten(2).float()
        z.add_(row.expand(6, 8).unflatten(0, (2, 3)))
        torch.empty_like(z)
    assert [tuple(launch) for launch in counter.launches] == [
        ("clone", 24 * 2 + 24 * 2, 0),  # LayerNorm's input is transposed
        ("native_layer_norm", 24 * 2 + 24 * 2 + 2 * 6 * 4, 2 * 4 * 2),
        ("addmm", 24 * 2 + 48 * 2, 4 * 8 * 2 + 8 * 2),
        ("scaled_dot_product_attention", 48 * 2 + 48 * 2, 0),  # q, k and v are one tensor
        ("_to_copy", 48 * 2 + 48 * 4, 0),
        ("add_", 48 * 4 + 8 * 4 + 48 * 4, 0),
    ]


def test_ours_by_hand(pixels):
    counter = traffic.count_ours(SiglipVisionConfig(**TINY), pixels)
    assert Counter(launch.name for launch in counter.launches) == {
        "_patch_embed_kernel": 1,
        "_layernorm_linear_kernel": 2 * LAYERS + 1,
        "_attention_kernel": LAYERS,
        "_linear_residual_kernel": 2 * LAYERS + 2,
        "_layernorm_kernel": 1,
        "_pool_kernel": 1,
        "_value_kernel": 1,
    }
    x, moments, row, row_moments = TOKENS * D * 2, TOKENS * 2 * 4, D * 2, 2 * 4
    patch_embed = 3 * 24 * 24 * 2 + x + moments
    layer = 14 * x + 2 * TOKENS * F * 2 + 4 * moments
    layernorm = x + moments + x
    pool = x + 2 * (4 * row + 4 * 4) + row  # 4 heads, and the logsumexp of each
    head = (row + row + row_moments) + (row + row_moments + F * 2) + (F * 2 + row + row + row_moments)
    image = patch_embed + LAYERS * layer + layernorm + pool + head
    assert sum(launch.activations for launch in counter.launches) == BATCH * image
    assert counter.rereads == BATCH * (x + 4 * D * 4)  # one program an image
    folded = LAYERS * (3 * D + F) * 8 + F * 8  # fp32 column sums and biases
    matrices = LAYERS * (4 * D * D + 2 * D * F) + 2 * D * D + 2 * D * F + D * 3 * 8 * 8
    vectors = D + TOKENS * D + LAYERS * 2 * D + 2 * D + 3 * D  # patch embedding, layers, post_layernorm, head
    scores = 4 * D * 4
    assert sum(launch.weights for launch in counter.launches) == folded + 2 * (matrices + vectors) + scores


def test_rereads_by_hand():
    """Several programs an image."""
    config = SiglipVisionConfig(**TINY | {"hidden_size": 512, "image_size": 96})
    pixels = torch.empty(BATCH, 3, 96, 96, dtype=torch.bfloat16, device="meta")
    programs = math.ceil(144 / attention_pool.pool_config(torch.bfloat16, "", BATCH, 144)["BLOCK_N"])
    assert programs > 1
    tokens, scores = 144 * 512 * 2, 4 * 512 * 4
    assert traffic.count_ours(config, pixels).rereads == BATCH * (tokens + programs * scores)


@pytest.mark.parametrize("fix, expected", [(False, 22 + 14 * LAYERS), (True, 22 + 12 * LAYERS)])
def test_stock_by_hand(pixels, fix, expected):
    """embedding 3, layer 12, post_layernorm 1, head 17; a copy for each LayerNorm of the stream, or one in all."""
    counter = traffic.count_stock(SiglipVisionConfig(**TINY), pixels, "sdpa", fix)
    names = Counter(launch.name for launch in counter.launches)
    assert len(counter.launches) == expected
    assert names["scaled_dot_product_attention"] == LAYERS
    assert names["native_layer_norm"] == 2 * LAYERS + 2
    assert names["clone"] == 2 + (1 if fix else 2 * LAYERS + 1)  # 2 in the head


@pytest.mark.parametrize(
    "variant, megabytes",
    [
        ("base-patch16-224", 80),
        ("base-patch16-384", 234),
        ("large-patch16-384", 623),
        ("so400m-patch14-224", 342),
        ("so400m-patch14-384", 974),
        ("so400m-patch14-896", 5471),
    ],
)
def test_fused_minimum(variant, megabytes):
    """The figures that the project set out from, rounded to MB."""
    assert traffic.fused_minimum(config_for(variant)) / 1e6 == pytest.approx(megabytes, abs=0.55)


def test_targets_hold(tmp_path, capsys):
    results, document = tmp_path / "traffic.json", tmp_path / "traffic.md"
    command = ["--variant", "base-patch16-224", "so400m-patch14-384"]
    assert traffic.main([*command, "--json", str(results), "--markdown", str(document)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "All targets are met."
    variants = json.loads(results.read_text())["variants"]
    for variant, layers in {"base-patch16-224": 12, "so400m-patch14-384": 27}.items():
        ours = variants[variant][traffic.WITH_REREADS]
        assert ours["launches"] <= 5 * layers + 7
        assert 1 < ours["ratio"] <= 1.10
        assert f"## {variant}" in document.read_text()


def test_waste_is_a_miss(monkeypatch, capsys):
    attention = Ops.attention
    monkeypatch.setattr(Ops, "attention", lambda self, *args: attention(self, *args).clone())
    assert traffic.main(["--variant", "base-patch16-224"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "79 launches, target 67" in last and "× the fused minimum bytes, target 1.1" in last
