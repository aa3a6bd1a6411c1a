"""What is VideoLLaMA 3's own: a merge size for each image, by which its rows are ordered and then shrunk."""

import pytest
import torch
from gridded_towers import FAMILIES, INSTALLED, assert_as, assert_left_to_stock, fast, tower

from siglip_fast.models.video_llama_3 import VideoLlama3Tower

pytestmark = pytest.mark.skipif("video_llama_3" not in INSTALLED, reason="this transformers has no such tower")
OWN = FAMILIES["video_llama_3"]
GRIDS, MERGES = [(1, 3, 5), (1, 4, 6), (2, 4, 4), (1, 6, 3), (1, 4, 8), (1, 1, 1)], [1, 2, 2, 3, 4, 1]


@torch.no_grad()
def test_merge_sizes(dtype):
    stock, call = tower("video_llama_3", dtype), OWN.call(GRIDS, dtype, MERGES)
    for asked in (False, True):
        assert_as(stock, fast(stock), call, output_hidden_states=asked)


@torch.no_grad()
def test_squares_are_shrunk_to_the_bit(monkeypatch):
    """As stock's own method shrinks the same rows."""
    stock, call = tower("video_llama_3", torch.bfloat16), OWN.call(GRIDS, torch.bfloat16, MERGES)
    ours, whole, finished = fast(stock), [], VideoLlama3Tower._finished
    monkeypatch.setattr(
        VideoLlama3Tower, "_finished", lambda self, *args: whole.append(args[0]) or finished(self, *args)
    )
    shrunk = ours(**call).last_hidden_state
    assert len(shrunk) == 15 + 6 + 8 + 2 + 2 + 1
    expected = stock.pixel_unshuffle(whole[0].last_hidden_state, call["grid_thw"], call["merge_sizes"])
    assert torch.equal(shrunk, expected)


@pytest.mark.parametrize(
    "merges, reason",
    [
        ([1, 2, 2, 3, 4], "not one for each"),
        ([[1], [2], [2], [3], [4], [1]], "not one for each"),
        ([1, 3, 2, 3, 4, 1], "no multiples of merge_sizes"),
        ([1, 2, 2, 3, 4, 0], "merge_sizes is not positive"),
        ([1.0, 2, 2, 3, 4, 1], "merge_sizes is torch.float32"),
    ],
)
@torch.no_grad()
def test_what_is_wrong_is_stocks_to_judge(merges, reason):
    stock, call = tower("video_llama_3"), OWN.call(GRIDS, merges=MERGES)
    assert_left_to_stock(stock, fast(stock), call | {"merge_sizes": torch.tensor(merges)}, reason)


@torch.no_grad()
def test_without_merge_sizes():
    stock, call = tower("video_llama_3"), OWN.call(GRIDS, merges=MERGES)
    del call["merge_sizes"]
    for model in (stock, fast(stock)):
        with pytest.raises(TypeError, match="merge_sizes"):
            model(**call)
