"""`output_hidden_states` on the fused path: the residual stream that stock's hooks record, whole or by index."""

import pytest
import torch
from models import TINY, drop_in, stock_model
from transformers import SiglipVisionConfig

# Newer versions of transformers take indices; for the older ones they are just true.
ASKED = [True, False, None, 0, 1, -2, [1], [0, -1], (-3, 2), [99, -99], []]


@pytest.fixture
def stock(device):
    return stock_model(SiglipVisionConfig(**TINY)).to(device)


@pytest.fixture
def pixels(device):
    torch.manual_seed(1)
    return torch.randn(2, 3, 24, 24, device=device)


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("asked", ASKED, ids=str)
@torch.no_grad()
def test_as_stock(asked, stock, pixels, backend):
    ours = drop_in(stock, backend=backend, strict=True)
    assert_equal(ours(pixels, output_hidden_states=asked), stock(pixels, output_hidden_states=asked))


@torch.no_grad()
def test_by_the_config_and_as_a_tuple(stock, pixels, backend):
    ours = drop_in(stock, backend=backend, strict=True)
    for model in (stock, ours):
        model.config.output_hidden_states = True
    assert_equal(ours(pixels), stock(pixels))
    actual, expected = ours(pixels, return_dict=False), stock(pixels, return_dict=False)
    assert [type(value) for value in actual] == [type(value) for value in expected]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_without_head(pixels, backend, device):
    stock = stock_model(SiglipVisionConfig(**TINY, vision_use_head=False)).to(device)
    ours = drop_in(stock, backend=backend, strict=True)
    assert_equal(ours(pixels, output_hidden_states=True), stock(pixels, output_hidden_states=True))


@torch.no_grad()
def test_what_was_handed_out_stays_as_it_was(stock, pixels, backend):
    ours = drop_in(stock, backend=backend)
    handed_out = ours(pixels, output_hidden_states=True).hidden_states
    before = [state.clone() for state in handed_out]
    ours(pixels + 1, output_hidden_states=True)
    assert all(map(torch.equal, handed_out, before))


@torch.no_grad()
def test_tied_to_last_hidden_state_by_the_config(stock, pixels, backend):
    ours = drop_in(stock, backend=backend)
    for model in (stock, ours):
        model.config.tie_last_hidden_states = True
    assert "ties" in ours.why_not(pixels, output_hidden_states=True)
    assert_equal(ours(pixels, output_hidden_states=True), stock(pixels, output_hidden_states=True))


@pytest.mark.parametrize("asked", [True, -2, -1, 1], ids=str)
@torch.no_grad()
def test_of_fewer_layers_than_the_config_says(asked, stock, pixels):
    ours = drop_in(stock, strict=True)
    for model in (stock, ours):
        tower = getattr(model, "vision_model", model)
        tower.encoder.layers = tower.encoder.layers[:1]
    assert_equal(ours(pixels, output_hidden_states=asked), stock(pixels, output_hidden_states=asked))
