"""What forwards of images of any size launch and wait for: as docs/packed-launches.md says."""

import re
from pathlib import Path

import launch_counts
import packed_launches
import pytest
import transformers

DOCS = Path(__file__).parents[2] / "docs" / "packed-launches.md"


@pytest.fixture(autouse=True)
def poison_empty():
    """Not here: filling `torch.empty` with NaN would be a kernel."""


@pytest.mark.parametrize("layers", [2, 3])
def test_five_launches_a_layer_and_one_wait(layers):
    kernels, waits, _ = packed_launches.count(packed_launches.naflex(layers, packed_launches.NARROW), ours=True)
    # patch_embed, LayerNorm, the pooling head's five, and what looks at mask, padding and sizes
    assert kernels <= 5 * layers + 7 + 13 and waits == 1


def test_stock_launches_and_waits_more():
    case = packed_launches.naflex(2, packed_launches.NARROW)
    ours, stock = (packed_launches.count(case, ours) for ours in (True, False))
    assert stock.kernels > ours.kernels and stock.waits > ours.waits and stock.bytes > ours.bytes


def test_as_committed():
    text = DOCS.read_text()
    if f"transformers {transformers.__version__}." not in text:
        pytest.skip("stock's numbers are of another version of transformers")
    name = "Qwen3-VL, 27 layers, 3 taps, eight images"
    stock, ours, waits, own_waits = map(
        int, re.search(re.escape(name) + r" \| (\d+) \| (\d+) \| (\d+) \| (\d+)", text).groups()
    )
    case = packed_launches.CASES[name](packed_launches.NARROW)
    assert packed_launches.count(case, ours=False)[:2] == (stock, waits)
    assert packed_launches.count(case, ours=True)[:2] == (ours, own_waits)


@pytest.mark.parametrize("name", ["Kimi_K25VisionModel", "Phi4MultimodalVisionModel", "granite_docling"])
def test_of_every_tower_as_committed(name):
    text = (DOCS.parent / "launches.md").read_text()
    if f"transformers {transformers.__version__}." not in text:
        pytest.skip("stock's numbers are of another version of transformers")
    row = re.search(rf"`{name}` \| (\d+) \| (\d+) \| (\d+) \| (\d+)", text).groups()
    stock, ours = launch_counts.counts(dict(launch_counts.towers())[name])
    assert [stock.kernels, ours.kernels, stock.waits, ours.waits] == [*map(int, row)]


def test_every_family_is_in_the_table():
    named = (DOCS.parent / "launches.md").read_text()
    assert [name for name, _ in launch_counts.towers() if f"`{name}`" not in named] in ([], ["HYV4VLVisionModel"])
