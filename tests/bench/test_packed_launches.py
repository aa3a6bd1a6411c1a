"""What forwards of images of any size launch and wait for: as docs/packed-launches.md says."""

import re
from pathlib import Path

import packed_launches
import pytest
import transformers

DOCS = Path(__file__).parents[2] / "docs" / "packed-launches.md"


@pytest.fixture(autouse=True)
def poison_empty():
    """Not here: filling `torch.empty` with NaN would be a kernel."""


@pytest.mark.parametrize("layers", [2, 3])
def test_five_launches_a_layer_and_one_wait(layers):
    kernels, waits = packed_launches.count(lambda: packed_launches.naflex(layers), ours=True)
    # patch_embed, LayerNorm, the pooling head's five, and what looks at mask, padding and sizes
    assert kernels <= 5 * layers + 7 + 13 and waits == 1


def test_stock_launches_and_waits_more():
    ours, stock = (packed_launches.count(lambda: packed_launches.naflex(2), ours) for ours in (True, False))
    assert stock[0] > ours[0] and stock[1] > ours[1]


def test_as_committed():
    text = DOCS.read_text()
    if f"transformers {transformers.__version__}." not in text:
        pytest.skip("stock's numbers are of another version of transformers")
    name = "Qwen3-VL, 27 layers, 3 taps, eight images"
    stock, ours, waits, own_waits = map(
        int, re.search(re.escape(name) + r" \| (\d+) \| (\d+) \| (\d+) \| (\d+)", text).groups()
    )
    make = packed_launches.CASES[name]
    assert packed_launches.count(make, ours=False) == (stock, waits)
    assert packed_launches.count(make, ours=True) == (ours, own_waits)
