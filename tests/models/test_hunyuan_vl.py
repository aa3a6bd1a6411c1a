"""HunYuanVL's and Hy4's vision towers: what is their own, beside test_gridded.py."""

import copy

import pytest
import torch
import zoo
from gridded_towers import FAMILIES, INSTALLED, assert_as, assert_left_to_stock, fast, tower

from siglip_fast.running.grids import interpolated, places

NAMES = [name for name in ("hunyuan_vl", "hy_v4_vl") if name in INSTALLED]
pytestmark = pytest.mark.skipif(not NAMES, reason="this transformers has neither")
both = pytest.mark.parametrize("family", NAMES)
hy_v4 = pytest.mark.parametrize("family", [name for name in NAMES if name == "hy_v4_vl"])
ODD = [(1, 5, 7), (1, 2, 3), (1, 10, 10), (1, 4, 10), (1, 13, 2)]  # 10 is the table's side


@both
@pytest.mark.parametrize("backend", ["torch", "cpu", "cpu-avx2"], indirect=True)
@torch.no_grad()
def test_odd_grids(family, backend, dtype):
    """Of which the merger leaves a row or a column out; and sides on which torch does not resize."""
    stock = tower(family, dtype)
    assert_as(stock, fast(stock, backend=backend), FAMILIES[family].call(ODD, dtype))


@both
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("head_dim", [72, 96])
@torch.no_grad()
def test_head_dims_of_the_published(family, head_dim, backend, dtype):
    stock = tower(family, dtype, hidden_size=2 * head_dim, num_hidden_layers=1)
    assert_as(stock, fast(stock, backend=backend), FAMILIES[family].call([(1, 4, 3), (1, 2, 2)], dtype))


@both
@torch.no_grad()
def test_a_table_as_large_as_the_published(family, dtype):
    """Of positions that count for more than the pixels."""
    stock = tower(family, dtype, max_image_size=4 * 128, num_hidden_layers=1)
    stock.embeddings.patch_embedding.weight.mul_(0.01)
    assert_as(stock, fast(stock), FAMILIES[family].call([(1, 7, 128), (1, 2, 90), (1, 60, 77)], dtype))


@pytest.mark.parametrize("height, width", [(60, 77), (128, 128), (90, 127), (200, 33)])
def test_interpolated_as_torch_does(height, width):
    """On a CPU without fused multiply-add too, where it is 2e-6 off."""
    table, grids = torch.randn(128 * 128, 8, generator=torch.Generator().manual_seed(0)), [(1, height, width)]
    index, weight = map(torch.from_numpy, interpolated(places(grids, 1), grids, 128))
    actual = (table[index] * weight[..., None]).sum(1)
    size = {"size": (height, width), "mode": "bilinear", "align_corners": False}
    expected = torch.nn.functional.interpolate(table.view(1, 128, 128, 8).permute(0, 3, 1, 2), **size)
    assert zoo.error({"": actual}, {"": expected.permute(0, 2, 3, 1).reshape(-1, 8)}) < 4e-6


def merged(family, h, w):
    """How many tokens an image becomes."""
    return h // 2 * (w // 2 + 1) + (2 if family == "hunyuan_vl" else 0)


@both
@torch.no_grad()
def test_no_image_sees_another(family):
    """Not even one that is not a number; but its tokens of no patch are numbers."""
    ours, call = fast(tower(family)), FAMILIES[family].call([(1, 4, 4), (1, 2, 6), (1, 2, 2)])
    before = ours(**call)
    call["pixel_values"][16:28] = float("nan")
    after = ours(**call)
    last = after.last_hidden_state[0].isnan().any(1)
    assert last.tolist() == [False] * 16 + [True] * 12 + [False] * 4
    tokens = after.pooler_output[0].isnan().any(1)
    first, second = merged(family, 4, 4), merged(family, 2, 6)
    assert tokens.sum() == tokens[first : first + second].sum() == 3
    for name, bad in (("last_hidden_state", last), ("pooler_output", tokens)):
        assert torch.equal(after[name][0][~bad], before[name][0][~bad])


@both
@torch.no_grad()
def test_batch_invariant(family, monkeypatch):
    """With a library whose results depend on the number of rows."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
    own, stock = FAMILIES[family], tower(family)
    together, alone = own.call([(1, 4, 4), (1, 2, 6), (1, 2, 2)]), own.call([(1, 2, 6)])
    alone["pixel_values"] = together["pixel_values"][16:28]
    first, count = merged(family, 4, 4), merged(family, 2, 6)
    for batch_invariant in (True, False):
        ours = fast(stock, batch_invariant=batch_invariant)
        whole, one = ours(**together), ours(**alone)
        assert torch.equal(whole.last_hidden_state[:, 16:28], one.last_hidden_state) == batch_invariant
        assert torch.equal(whole.pooler_output[:, first : first + count], one.pooler_output) == batch_invariant


@hy_v4
@torch.no_grad()
def test_frames_do_not_see_each_other(family):
    ours, call = fast(tower(family)), FAMILIES[family].call([(3, 4, 4)])
    before = ours(**call)
    call["pixel_values"][16:32] += 1
    changed = (ours(**call).last_hidden_state != before.last_hidden_state)[0].any(1)
    assert changed.tolist() == [False] * 16 + [True] * 16 + [False] * 16


@both
@torch.no_grad()
def test_what_the_merger_does_not_take(family):
    """Videos of HunYuanVL's, and images of one row or column."""
    stock = tower(family)
    for grids in ([(1, 1, 8)], [(1, 4, 4), (1, 8, 1)]):
        call = FAMILIES[family].call(grids)
        assert_left_to_stock(stock, fast(stock), call, "fewer than 2 patches a side")
    if family == "hunyuan_vl":
        call = {"pixel_values": torch.randn(48, 48), "grid_thw": torch.tensor([[1, 4, 4], [2, 4, 4]])}
        assert_left_to_stock(stock, fast(stock), call, "grid_thw has a video")


@both
@torch.no_grad()
def test_other_squares(family):
    for side, least in ((3, 3), (1, 2)):
        stock, call = tower(family, spatial_merge_size=side), FAMILIES[family].call
        assert_as(stock, fast(stock), call([(1, 3, 6), (1, 7, 4)]))
        too_few = call([(1, least - 1, 6)])
        assert_left_to_stock(stock, fast(stock), too_few, f"fewer than {least} patches a side")


@both
@torch.no_grad()
def test_another_interpolation(family):
    """Of the config, or set later."""
    stock, call = tower(family), FAMILIES[family].call(ODD)
    ours = fast(stock)
    ours(**call)
    for model in (stock, ours):
        model.config.interpolate_mode = "bicubic"
    assert_left_to_stock(stock, ours, call, "interpolate_mode is 'bicubic'")
    stock = tower(family, interpolate_mode="bicubic")
    assert_left_to_stock(stock, fast(stock), call, "interpolate_mode is 'bicubic'")


@both
@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m.patch_merger.register_forward_hook(lambda *args: None), "forward hooks"),
        (lambda m: setattr(m.patch_merger, "proj_act", torch.nn.SiLU()), "patch_merger.proj_act is a SiLU"),
        (lambda m: setattr(m.embeddings, "position_edge", 5), "embeddings.position_edge"),
        (lambda m: setattr(m.embeddings, "interpolate_pos_encoding", lambda *args: 0), "interpolate_pos_encoding"),
    ],
    ids=["hook", "activation", "edge", "replaced"],
)
@torch.no_grad()
def test_reasons_of_the_tower(family, change, reason):
    """Whether it was so before the first forward, or became so."""
    ours, changed, call = fast(tower(family)), fast(tower(family)), FAMILIES[family].call(ODD)
    ours(**call)
    for model in (ours, changed):
        change(model)
        assert reason in (model.why_not(**call) or "")
        with pytest.raises(RuntimeError, match="does not apply"):
            model(**call)


@both
@torch.no_grad()
def test_in_a_model(family):
    model, inputs = zoo.build(family)
    expected = zoo.run(copy.deepcopy(model), inputs)
    fast_model = fast(model)
    with zoo.fused_attentions() as calls:
        assert zoo.error(zoo.run(fast_model, inputs), expected) < 1e-5
    assert calls == ["torch"] * 2
