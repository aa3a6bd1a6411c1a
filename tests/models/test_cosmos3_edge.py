"""What is Cosmos3 Edge's own: SigLIP 2's position resize, square by square; and whose tower Cosmos3 Omni's is."""

import pytest
import torch
import zoo
from gridded_towers import FAMILIES, INSTALLED, MIXED, assert_as, assert_left_to_stock, fast, tower

import siglip_fast

pytestmark = pytest.mark.skipif("cosmos3_edge" not in INSTALLED, reason="this transformers has no such tower")
OWN = FAMILIES["cosmos3_edge"]


@torch.no_grad()
def test_smaller_and_larger_than_the_table(dtype):
    """Antialias takes all of it for a patch, or a few."""
    stock, call = tower("cosmos3_edge", dtype), OWN.call([(1, 2, 2), (1, 40, 4), (2, 2, 26)], dtype)
    assert_as(stock, fast(stock), call)


@torch.no_grad()
def test_pooler_output_is_as_stocks():
    stock, call = tower("cosmos3_edge"), OWN.call(MIXED)
    expected, actual = stock(**call), fast(stock)(**call)
    assert (actual.pooler_output is actual.last_hidden_state) == (expected.pooler_output is expected.last_hidden_state)
    assert actual.keys() == expected.keys()


@torch.no_grad()
def test_merge_size_of_the_config():
    """By which stock orders positions, whenever it changes."""
    stock, call = tower("cosmos3_edge"), OWN.call([(1, 4, 8), (1, 4, 4)])
    ours = fast(stock)
    for side in (2, 4, 1):
        for model in (stock, ours):
            model.config.spatial_merge_size = side
        assert_as(stock, ours, call)
    for model in (stock, ours):
        model.config.spatial_merge_size = 3
    assert_left_to_stock(stock, ours, call, "no multiples of 3")


def test_the_tower_of_cosmos3_omni():
    model, _ = zoo.build("cosmos3_omni")
    (found,) = siglip_fast.towers(siglip_fast.apply_to(model))
    assert found.fast and type(found.module).__name__ == "Qwen3VLVisionModel"
