"""Projectors beside a tower that stock runs image by image, on all images at once: stock's outputs, gradients and errors."""

import copy
import logging
import pickle
import types

import pytest
import torch
import zoo
from reference import assert_accurate
from stock_towers import count_reads
from torch import nn

import siglip_fast

paddleocr = pytest.importorskip("transformers.models.paddleocr_vl.modeling_paddleocr_vl", exc_type=ImportError)
GRIDS = [(1, 4, 6), (3, 2, 8), (1, 2, 2), (1, 10, 4)]
ROWS = sum(t * h * w for t, h, w in GRIDS)


@pytest.fixture
def stock() -> nn.Module:
    torch.manual_seed(0)
    vision, text = types.SimpleNamespace(spatial_merge_size=2, hidden_size=32), types.SimpleNamespace(hidden_size=48)
    projector = paddleocr.PaddleOCRProjector(types.SimpleNamespace(vision_config=vision, text_config=text))
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.2)
    return projector


@pytest.fixture
def ours(stock) -> nn.Module:
    return fast(stock)


def fast(projector: nn.Module) -> nn.Module:
    """As `apply_to` makes it, in a model with a tower."""
    model = nn.ModuleDict({"projector": copy.deepcopy(projector), "tower": zoo.siglip()[0]})
    return siglip_fast.apply_to(model)["projector"]


def features(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_accuracy(stock, ours, dtype):
    grids, exact = torch.tensor(GRIDS), copy.deepcopy(stock).to(dtype).double()
    actual = ours.to(dtype)(features(dtype), grids)
    same = stock.to(dtype)(features(dtype), grids)
    assert actual.dtype == same.dtype and actual.shape == same.shape
    assert_accurate(actual, exact(features(dtype).double(), grids), same)


@torch.no_grad()
def test_the_host_waits_once(ours, monkeypatch):
    grids, reads = torch.tensor(GRIDS), count_reads(monkeypatch)
    ours(features(), grids)
    assert len(reads) == 1


@torch.no_grad()
def test_each_linear_runs_once(ours, monkeypatch):
    calls, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args[0].shape) or linear(*args))
    ours(features(), torch.tensor(GRIDS))
    assert calls == [(ROWS // 4, 128)] * 2


def test_gradients_are_stocks(stock, ours):
    of_both = []
    for projector in (stock, ours):
        x = features().requires_grad_()
        projector(x, torch.tensor(GRIDS)).square().sum().backward()
        of_both.append([x.grad, *(parameter.grad for parameter in projector.parameters())])
    for expected, actual in zip(*of_both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_edits_are_seen(stock, ours):
    for projector in (stock, ours):
        projector.linear_2.weight.data.mul_(-2)
    torch.testing.assert_close(ours(features(), torch.tensor(GRIDS)), stock(features(), torch.tensor(GRIDS)))


@torch.no_grad()
def test_a_hook_sees_image_by_image(stock, ours, caplog):
    seen = []
    ours.linear_1.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with caplog.at_level(logging.WARNING, "siglip_fast"):
        assert torch.equal(ours(features(), torch.tensor(GRIDS)), stock(features(), torch.tensor(GRIDS)))
    assert seen == [t * h * w // 4 for t, h, w in GRIDS]
    assert "running the stock PaddleOCRProjector forward: a Linear has forward hooks" in caplog.text


@pytest.mark.parametrize("grids", [[(1, 3, 4)], [(1, 4, 6)], [(0, 2, 2)]], ids=str)
@torch.no_grad()
def test_what_stock_refuses_is_refused(stock, ours, grids):
    for projector in (stock, ours):
        with pytest.raises((RuntimeError, ValueError)):
            projector(features()[:12], torch.tensor(grids))


@torch.no_grad()
def test_batch_invariance_is_stocks(stock, monkeypatch):
    model = nn.ModuleDict({"projector": stock, "tower": zoo.siglip()[0]})
    siglip_fast.apply_to(model, batch_invariant=True)
    assert type(stock) is paddleocr.PaddleOCRProjector
    ours = fast(stock)
    monkeypatch.setenv("SIGLIP_FAST_BATCH_INVARIANT", "1")
    assert torch.equal(ours(features(), torch.tensor(GRIDS)), stock(features(), torch.tensor(GRIDS)))


@torch.no_grad()
def test_pickled_and_restored(stock, ours):
    expected = ours(features(), torch.tensor(GRIDS))
    assert torch.equal(pickle.loads(pickle.dumps(ours))(features(), torch.tensor(GRIDS)), expected)
    siglip_fast.restore(ours)
    assert type(ours) is paddleocr.PaddleOCRProjector
    assert [*ours.state_dict()] == [*stock.state_dict()]
