"""What is Kimi K2.5's own: frames that see each other, positions in time, rotations width first, the pooler's output."""

import pytest
import torch
from gridded_towers import FAMILIES, INSTALLED, MIXED, assert_as, assert_left_to_stock, fast, tower

pytestmark = pytest.mark.skipif("kimi_k25" not in INSTALLED, reason="this transformers has no such tower")
OWN = FAMILIES["kimi_k25"]


@torch.no_grad()
def test_frames_of_a_video_see_each_other():
    ours, call = fast(tower("kimi_k25")), OWN.call([(3, 4, 4), (3, 2, 2)])
    before = ours(**call).last_hidden_state
    call["pixel_values"][32:48] += 1  # the last frame of the first
    assert (before != ours(**call).last_hidden_state).any(1).tolist() == [True] * 48 + [False] * 12


@torch.no_grad()
def test_images_are_pooled_to_the_bit(dtype):
    """Whose pooler's output is the last hidden state in the order of squares."""
    ours = fast(tower("kimi_k25", dtype))
    last, pooled = ours(**OWN.call([(1, 4, 6), (1, 2, 4)], dtype)).to_tuple()
    squares = [last[:24].view(2, 2, 3, 2, 64), last[24:].view(1, 2, 2, 2, 64)]
    assert torch.equal(pooled, torch.cat([square.transpose(1, 2).reshape(-1, 4, 64) for square in squares]))


@torch.no_grad()
def test_images_among_videos(dtype):
    """Which stock's code took together from transformers 5.24 on."""
    stock, call = tower("kimi_k25", dtype), OWN.call([(1, 2, 4), (3, 4, 2), (2, 4, 4), (2, 2, 2), (1, 2, 2)], dtype)
    ours = fast(stock)
    if ours.mixes_lengths:
        assert_as(stock, ours, call)
    else:
        assert_left_to_stock(stock, ours, call, "videos of different length")


@torch.no_grad()
def test_longest_video():
    stock = tower("kimi_k25")
    assert_as(stock, fast(stock), OWN.call([(4, 2, 2)]))
    assert_left_to_stock(stock, fast(stock), OWN.call([(5, 2, 2)]), "more than 4 frames")


@torch.no_grad()
def test_pixels_are_not_cast():
    stock = tower("kimi_k25", torch.bfloat16)
    assert_left_to_stock(stock, fast(stock), OWN.call(MIXED), "torch.float32, the weights torch.bfloat16")


@torch.no_grad()
def test_tables_that_are_forgotten(monkeypatch):
    monkeypatch.setattr("siglip_fast.models.resized.MOST_ROWS", 40)
    stock = tower("kimi_k25")
    ours = fast(stock)
    for grids in ([(1, 4, 4)], [(1, 2, 8), (1, 4, 4)], [(1, 6, 8)], [(1, 2, 2), (1, 4, 4)]):
        assert_as(stock, ours, OWN.call(grids))


@torch.no_grad()
def test_table_that_is_no_square():
    """Of which stock takes other rows than one would think."""
    stock = tower("kimi_k25", pos_emb_height=6, pos_emb_width=9)
    assert_as(stock, fast(stock), OWN.call(MIXED))


@pytest.mark.parametrize("kernel, reason", [((1, 1), None), ([4, 4], None), ((2, 1), "merge_kernel_size")])
@torch.no_grad()
def test_merge_kernel(kernel, reason):
    """Whether it was so before the first forward, or became so."""
    stock, call = tower("kimi_k25"), OWN.call([(3, 4, 4), (3, 4, 8)])
    ours = fast(stock)
    ours(**call)
    for model in (stock, ours):
        model.merge_kernel_size = kernel
    for model in (ours, fast(stock)):
        if reason:
            assert reason in model.why_not(**call)
        else:
            assert_as(stock, model, call)
