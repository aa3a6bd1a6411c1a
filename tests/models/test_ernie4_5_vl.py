"""ERNIE 4.5 VL's vision tower: what is its own, beside test_gridded.py."""

import pytest
import torch
import zoo
from gridded_towers import FAMILIES, INSTALLED, MIXED, assert_as, assert_left_to_stock, fast, tower

FAMILY = "ernie4_5_vl_moe"
pytestmark = pytest.mark.skipif(FAMILY not in INSTALLED, reason="this transformers has none")


@torch.no_grad()
def test_the_model_says_whether_it_wants_the_logits_of_routers():
    stock, call = tower(FAMILY), FAMILIES[FAMILY].call(MIXED)
    ours = fast(stock)
    assert_as(stock, ours, call, output_router_logits=False)
    assert_left_to_stock(stock, ours, call | {"output_router_logits": True}, "output_router_logits")


@torch.no_grad()
def test_in_a_model():
    model, inputs = zoo.build(FAMILY)
    expected = zoo.run(model, inputs)
    fast_model = fast(model)
    with zoo.fused_attentions() as calls:
        assert zoo.error(zoo.run(fast_model, inputs), expected) < 1e-5
    assert calls == ["torch"] * 2


@torch.no_grad()
def test_eps_of_the_config():
    stock = tower(FAMILY, rms_norm_eps=0.5)
    assert_as(stock, fast(stock), FAMILIES[FAMILY].call(MIXED))
