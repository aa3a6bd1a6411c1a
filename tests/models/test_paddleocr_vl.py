"""What is PaddleOCR-VL's own: odd grids, two signatures, bounds of frames from the caller."""

import pytest
import torch
from gridded_towers import FAMILIES, INSTALLED, MIXED, assert_as, assert_left_to_stock, fast, tower

pytestmark = pytest.mark.skipif("paddleocr_vl" not in INSTALLED, reason="this transformers has no such tower")
OWN = FAMILIES["paddleocr_vl"]


@torch.no_grad()
def test_odd_grids(dtype):
    stock, call = tower("paddleocr_vl", dtype), OWN.call([(1, 3, 5), (2, 1, 7), (1, 1, 1)], dtype)
    ours = fast(stock)
    assert_as(stock, ours, call)
    assert ours(**call).last_hidden_state.shape == (30, 64)  # two dimensions, though the pixels have a leading one


@torch.no_grad()
def test_frames_do_not_see_each_other():
    ours, call = fast(tower("paddleocr_vl")), OWN.call([(3, 3, 5)])
    before = ours(**call).last_hidden_state
    call["pixel_values"][:, 30:] += 1
    assert (before != ours(**call).last_hidden_state).any(1).tolist() == [False] * 30 + [True] * 15


@torch.no_grad()
def test_other_positions_are_stocks():
    stock = tower("paddleocr_vl")
    if not hasattr(stock.embeddings, "interpolation_align_corners"):
        pytest.skip("this transformers has no such flag")
    stock.embeddings.interpolation_align_corners ^= True
    assert_left_to_stock(stock, fast(stock), OWN.call(MIXED), "interpolation_align_corners")


@torch.no_grad()
def test_two_rows_of_pixels():
    stock, call = tower("paddleocr_vl"), OWN.call(MIXED)
    call["pixel_values"] = call["pixel_values"].view(2, 30, 3, 4, 4)
    assert_left_to_stock(stock, fast(stock), call, "not [1, rows, 3, 4, 4]")


@torch.no_grad()
def test_mask():
    stock = tower("paddleocr_vl")
    assert "attention_mask" in fast(stock).why_not(**OWN.call(MIXED), attention_mask=torch.ones(1, 60))


@pytest.mark.parametrize("bounds", [[0, 24, 60], [0, 28, 60], [0, 24, 28, 60, 60], [0, 24, 28, 59], [1, 24, 28, 60]])
@torch.no_grad()
def test_other_bounds_of_frames_are_stocks(bounds):
    stock = tower("paddleocr_vl")
    call = OWN.call(MIXED) | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    assert_left_to_stock(stock, fast(stock), call, "cu_seqlens")
