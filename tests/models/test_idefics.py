"""Idefics2's, Idefics3's and SmolVLM's towers on images that are not padded; `test_padded.py` has those that are."""

import copy

import pytest
import torch
from models import TINY
from torch import nn
from transformers.models.idefics2 import modeling_idefics2
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.smolvlm import modeling_smolvlm

from siglip_fast import apply_to, restore, towers

STOCK = [
    modeling_idefics2.Idefics2VisionTransformer,
    modeling_idefics3.Idefics3VisionTransformer,
    modeling_smolvlm.SmolVLMVisionTransformer,
]


@pytest.fixture(params=STOCK, ids=lambda cls: cls.__name__)
def stock(request):
    torch.manual_seed(0)
    config = request.param.config_class(**TINY)
    config._attn_implementation = "sdpa"
    tower = request.param(config)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.2)
        elif "norm" in name or "position" in name:
            nn.init.normal_(parameter, 1, 0.4)
    return tower.eval()


@pytest.fixture
def ours(stock):
    return apply_to(copy.deepcopy(stock), strict=True)


def pixels(height=24, width=24, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 3, height, width).to(dtype)


def full_mask(height=3, width=3):
    return torch.ones(2, height, width, dtype=torch.bool)


def assert_equal(actual, expected, atol=1e-4):
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=atol, rtol=0)


@torch.no_grad()
def test_batch_invariant(stock, monkeypatch):
    """With a library whose results depend on the number of rows."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
    images = pixels(16, 24)
    for batch_invariant in (True, False):
        ours = apply_to(copy.deepcopy(stock), backend="torch", strict=True, batch_invariant=batch_invariant)
        rows = ours(images).last_hidden_state
        equal = [torch.equal(ours(images[i : i + 1]).last_hidden_state[0], row) for i, row in enumerate(rows)]
        assert equal == [batch_invariant] * len(images)


@pytest.mark.parametrize("height, width", [(24, 24), (16, 24), (8, 8), (27, 17)])
@torch.no_grad()
def test_as_stock(height, width, stock, backend):
    ours = apply_to(copy.deepcopy(stock), backend=backend, strict=True)
    images, mask = pixels(height, width), full_mask(height // 8, width // 8)
    assert_equal(ours(images), stock(images))
    assert_equal(ours(images, mask), stock(images, mask))
    assert_equal(ours(pixel_values=images, patch_attention_mask=mask), stock(images, mask))
    assert type(ours(images, return_dict=False)) is tuple


@torch.no_grad()
def test_positions_of_a_large_grid_in_bf16(stock):
    """Stock computes their fractions in some dtype, and rounds; 31 and 64 patches a side show it."""
    large = type(stock)(type(stock.config)(**TINY | {"image_size": 512})).eval()
    for side in (31, 64):
        images = pixels(8 * side, 8 * side)[:1]
        assert_equal(apply_to(copy.deepcopy(large), strict=True)(images), large(images))
        bf16, images = copy.deepcopy(large).bfloat16(), images.bfloat16()
        expected = bf16(images)
        assert_equal(apply_to(bf16, strict=True)(images), expected, atol=0.1)


@torch.no_grad()
def test_a_true_mask_changes_no_bits(ours):
    for name in ("last_hidden_state", "hidden_states"):
        actual, expected = (ours(pixels(), mask, output_hidden_states=True)[name] for mask in (full_mask(), None))
        torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@torch.no_grad()
def test_hidden_states(stock, ours):
    actual, expected = (m(pixels(), output_hidden_states=True) for m in (ours, stock))
    assert_equal(actual, expected)
    torch.testing.assert_close(actual.hidden_states, expected.hidden_states, atol=1e-4, rtol=0)


@torch.no_grad()
def test_compiled_is_stocks(stock, ours):
    ours.strict = False
    assert_equal(torch.compile(ours, backend="eager")(pixels()), stock(pixels()))


WRONG = [
    (pixels()[0], None),
    (pixels()[:, :2], None),
    (pixels(4, 4), None),
    (pixels(dtype=torch.bfloat16), None),
    (pixels(), full_mask(2, 3)),
    (pixels(), full_mask().long()),
]


@pytest.mark.parametrize("images, mask", WRONG)
@torch.no_grad()
def test_what_is_wrong_is_stocks_to_judge(images, mask, stock, ours):
    """It raises; or computes something, as older versions of transformers do with an integer mask."""
    ours.strict = False
    assert ours.why_not(images, mask)
    try:
        expected = stock(images, mask)
    except Exception as error:
        with pytest.raises(type(error)):
            ours(images, mask)
    else:
        assert torch.equal(ours(images, mask).last_hidden_state, expected.last_hidden_state)


def test_gradients_are_stocks(stock, ours):
    ours.strict = False
    for model in (stock, ours):
        model(pixels()).last_hidden_state.square().sum().backward()
    for expected, actual in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@torch.no_grad()
def test_edits_are_seen(stock, ours):
    ours(pixels())
    for model in (stock, ours):
        model.embeddings.position_embedding.weight.mul_(2)
        model.encoder.layers[1].mlp.fc1.weight.mul_(2)
    assert_equal(ours(pixels()), stock(pixels()))


@torch.no_grad()
def test_restore(stock, ours):
    ours(pixels())
    assert [tower.fast for tower in towers(ours)] == [True]
    assert type(restore(ours)) is type(stock)
    assert vars(ours).keys() == vars(stock).keys()
    assert torch.equal(ours(pixels()).last_hidden_state, stock(pixels()).last_hidden_state)


@torch.no_grad()
def test_exported(stock, ours):
    try:
        torch.export.export(stock, (pixels(),))
    except Exception:  # in transformers 4 that of Idefics2 asks for a value
        pytest.skip("stock's code cannot be exported")
    exported = torch.export.export(ours, (pixels(),)).module()
    torch.testing.assert_close(exported(pixels())[0], stock(pixels())[0], atol=1e-4, rtol=0)


def test_built_by_its_class(stock, monkeypatch):
    """As transformers does after `register`."""
    monkeypatch.setenv("SIGLIP_FAST_BACKEND", "torch")
    fast = type(apply_to(copy.deepcopy(stock)))
    assert fast(stock.config).backend == "torch"
    assert fast.is_custom_code() is False
