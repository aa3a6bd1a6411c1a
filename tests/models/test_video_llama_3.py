"""What is VideoLLaMA 3's own: a merge size for each image, by which its rows are ordered and then shrunk."""

import pytest
import torch
from gridded_towers import FAMILIES, INSTALLED, assert_as, assert_left_to_stock, fast, tower

pytestmark = pytest.mark.skipif("video_llama_3" not in INSTALLED, reason="this transformers has no such tower")
OWN = FAMILIES["video_llama_3"]
GRIDS, MERGES = [(1, 3, 5), (1, 4, 6), (2, 4, 4), (1, 6, 3), (1, 4, 8), (1, 1, 1)], [1, 2, 2, 3, 4, 1]


@torch.no_grad()
def test_merge_sizes(dtype):
    stock, call = tower("video_llama_3", dtype), OWN.call(GRIDS, dtype, MERGES)
    for asked in (False, True):
        assert_as(stock, fast(stock), call, output_hidden_states=asked)


@torch.no_grad()
def test_a_square_becomes_its_mean_to_the_bit():
    ours = fast(tower("video_llama_3", torch.bfloat16))
    call = OWN.call([(2, 4, 6)], torch.bfloat16, [2])
    states = ours(**call, output_hidden_states=True)
    normed = torch.nn.functional.layer_norm(states.hidden_states[-1], (64,), *ours.post_layernorm.parameters(), 1e-6)
    assert torch.equal(states.last_hidden_state, normed.view(12, 4, 64).float().mean(1).bfloat16())


@pytest.mark.parametrize(
    "merges, reason",
    [
        ([1, 2, 2, 3, 4], "not one for each"),
        ([[1], [2], [2], [3], [4], [1]], "not one for each"),
        ([1, 3, 2, 3, 4, 1], "no multiples of merge_sizes"),
        ([1, 2, 2, 3, 4, 0], "not positive"),
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
