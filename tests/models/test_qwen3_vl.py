"""The towers of Qwen3-VL and its descendants: images and videos of any size, packed, with rotation, taps and mergers."""

import copy
import functools
import pickle
import re

import numpy as np
import pytest
import torch
import zoo
from packed_towers import MIXED
from packed_towers import qwen3_vl_inputs as inputs
from packed_towers import qwen3_vl_tower as make
from reference import assert_accurate
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import siglip_fast
from siglip_fast import apply_to, restore, towers
from siglip_fast.backends import cpu
from siglip_fast.models import qwen3_vl, swap
from siglip_fast.models.packed import together
from siglip_fast.running import grids as on_grids

every_backend = pytest.mark.parametrize("backend", ["torch", "cpu", "cpu-avx2", "triton"], indirect=True)
NAMES = [cls.__name__ for cls in qwen3_vl.installed()]
GRIDS = {
    "one": [(1, 6, 10)],
    "equal": [(1, 4, 6)] * 5,
    "many": [(1, 2 * h, 2 * w) for h, w in [(1, 1), (3, 2), (2, 3), (5, 1), (1, 7), (4, 4), (1, 1), (2, 2), (2, 2)]],
    "uneven": [(1, 2, 2), (1, 28, 30), (1, 2, 8)],
    "videos": [(4, 4, 6), (1, 2, 2), (3, 2, 4)],
    "long": [(1, 2, 600)],  # of whose positions bfloat16 has not all
}


def fast(stock, **kwargs):
    return apply_to(copy.deepcopy(stock), **{"strict": True, "backend": "torch"} | kwargs)


def judged(stock, *args, **kwargs):
    """What stock's code gives, and what it gives in float64."""
    return stock(*args, **kwargs), copy.deepcopy(stock).double()(args[0].double(), *args[1:], **kwargs)


@functools.cache
def case(grids, dtype):
    stock, args = make(dtype=dtype), inputs(GRIDS[grids], dtype)
    return stock, args, judged(stock, *args)


def assert_as(stock, ours, *args, **kwargs):
    assert_accurate_outputs(ours(*args, **kwargs), *judged(stock, *args, **kwargs))


def assert_accurate_outputs(actual, expected, exact):
    """Within the accuracy rule, every output, and of the same form."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
    expected, actual, exact = map(zoo.tensors, (expected, actual, exact))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_accurate(actual[name], exact[name], tensor)


def assert_left_to_stock(stock, ours, *args, **kwargs):
    """Which raises, or computes something."""
    try:
        expected = zoo.tensors(stock(*args, **kwargs))
    except Exception as error:
        with pytest.raises((type(error), KeyError)):  # Python raises either for a keyword given twice
            ours(*args, **kwargs)
    else:
        actual = zoo.tensors(ours(*args, **kwargs))
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@every_backend
@pytest.mark.parametrize("grids", GRIDS)
@torch.no_grad()
def test_accuracy(grids, backend, dtype):
    stock, args, expected = case(grids, dtype)
    assert_accurate_outputs(fast(stock, backend=backend)(*args), *expected)


@torch.no_grad()
def test_a_large_image_among_small_ones():
    stock = make(depth=1)
    assert_as(stock, fast(stock, backend="cpu"), *inputs([(1, 2, 2), (1, 64, 64), (1, 2, 8)]))


@every_backend
@pytest.mark.parametrize("head_dim", [64, 72])
@torch.no_grad()
def test_head_dims(head_dim, backend, dtype):
    stock = make(dtype=dtype, hidden_size=2 * head_dim, deepstack_visual_indexes=[])
    assert_as(stock, fast(stock, backend=backend), *inputs([(1, 6, 10), (1, 2, 4)], dtype))


@torch.no_grad()
def test_taps_need_whole_blocks_of_moments():
    ours = fast(make(hidden_size=144))
    assert "hidden_size is no multiple of 64" in ours.why_not(*inputs())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_class(name):
    stock = make(name)
    ours = fast(stock)
    assert ours.why_not(*inputs()) is None
    assert_as(stock, ours, *inputs())
    assert_as(stock, ours, inputs()[0], grid_thw=inputs()[1].int())
    assert_as(stock, ours, *inputs(), return_dict=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("asked", [True, 1, [0, -1]])
@torch.no_grad()
def test_hidden_states(name, asked):
    stock = make(name)
    ours = fast(stock, strict=qwen3_vl.Qwen3VLVisionModel.returns_hidden_states)
    for return_dict in (True, False):
        assert_as(stock, ours, *inputs(), output_hidden_states=asked, return_dict=return_dict)
    if not ours.strict:
        assert "output_hidden_states" in ours.why_not(*inputs(), output_hidden_states=asked)


@torch.no_grad()
def test_constructed():
    """As a class of its own, with stock's weights."""
    stock = make()
    ours = qwen3_vl.Qwen3VLVisionModel(stock.config, backend="torch", strict=True).eval()
    ours.load_state_dict(stock.state_dict())
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert_as(stock, ours, *inputs())
    with pytest.raises(ImportError):
        from siglip_fast.models.qwen3_vl import NoSuchTower  # noqa: F401


@pytest.mark.parametrize("indexes", [[2, 0], [1, 1], [0, 7], []])
@torch.no_grad()
def test_taps_in_any_order(indexes):
    stock = make(deepstack_visual_indexes=indexes)
    assert_as(stock, fast(stock), *inputs())


@torch.no_grad()
def test_images_and_frames_do_not_see_each_other():
    ours = fast(make())
    rows, grid = inputs([(1, 4, 4), (2, 2, 6)])
    before = ours(rows, grid)[0]
    rows[28:] += 1  # the last frame
    after = ours(rows, grid)[0]
    changed = (before != after).flatten(1).any(1)
    per_row = len(rows) // len(changed)  # transformers 4 gives the merged rows
    assert changed.tolist() == [False] * (28 // per_row) + [True] * (12 // per_row)


@pytest.mark.parametrize("buffers", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_frequencies_are_the_buffers(buffers):
    """`.to` rounds them, from_pretrained does not."""
    stock = make()
    frequencies = stock.rotary_pos_emb.inv_freq
    stock.bfloat16()
    stock.rotary_pos_emb.inv_freq = frequencies.to(buffers)
    assert_as(stock, fast(stock), *inputs([(1, 2, 20), (1, 12, 2)], torch.bfloat16))


class TestReasons:
    @pytest.mark.parametrize(
        "kwargs, reason",
        [
            ({"output_attentions": True}, "output_attentions"),
            ({"cu_seqlens": torch.tensor([0, 24, 28, 60, 92])}, "cu_seqlens"),
            ({"position_ids": torch.zeros(92, 2, dtype=torch.int64)}, "position_ids"),
            ({"interp_indices": torch.zeros(92, 4, dtype=torch.int64), "interp_weights": torch.ones(92, 4)}, "interp_"),
            ({"max_seqlen": 32}, "max_seqlen"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @torch.no_grad()
    def test_keywords(self, kwargs, reason):
        stock = make()
        ours = fast(stock)
        assert reason in ours.why_not(*inputs(), **kwargs)
        with pytest.raises(RuntimeError, match=reason):
            ours(*inputs(), **kwargs)
        ours.strict = False
        assert_left_to_stock(stock, ours, *inputs(), **kwargs)

    @torch.no_grad()
    def test_nothing_given_is_no_keyword(self):
        assert fast(make()).why_not(*inputs(), cu_seqlens=None) is None

    WRONG = {
        "odd": (inputs([(1, 4, 4)])[0][:12], torch.tensor([[1, 3, 4]])),
        "no height": (inputs()[0], torch.tensor([[1, 4, 6], [1, 0, 2], [2, 8, 4]])),
        "no frames": (inputs([(1, 4, 6)])[0], torch.tensor([[1, 4, 6], [0, 2, 2]])),
        "negative": (inputs([(1, 4, 6)])[0], torch.tensor([[-1, -4, 6]])),
        "too many rows": (inputs()[0], torch.tensor([[1, 4, 6]])),
        "too few rows": (inputs()[0][:-4], inputs()[1]),
        "no images": (inputs()[0][:0], torch.zeros(0, 3, dtype=torch.int64)),
        "other width": (inputs(width=90)[0], inputs()[1]),
        "volumes": (inputs()[0].view(-1, 3, 2, 4, 4), inputs()[1]),
        "a number": (torch.tensor(1.0), inputs()[1]),
        "integers": (inputs()[0].to(torch.int64), inputs()[1]),
        "fractions": (inputs()[0], inputs()[1].float()),
        "two numbers": (inputs()[0], inputs()[1][:, 1:]),
    }

    @pytest.mark.parametrize("wrong", WRONG)
    @torch.no_grad()
    def test_what_is_wrong_is_stocks_to_judge(self, wrong):
        stock = make()
        ours = fast(stock, strict=False)
        assert ours.why_not(*self.WRONG[wrong])
        assert_left_to_stock(stock, ours, *self.WRONG[wrong])

    def test_grid_that_is_no_tensor(self):
        with torch.no_grad():
            assert "grid_thw is no tensor" in fast(make()).why_not(inputs()[0], MIXED)

    @pytest.mark.parametrize(
        "change, reason",
        [
            (lambda m: setattr(m.blocks[1].mlp, "act_fn", nn.GELU()), "act_fn is a GELU"),
            (lambda m: setattr(m.merger.act_fn, "approximate", "tanh"), "merger.act_fn.approximate"),
            (lambda m: setattr(m.blocks[0], "norm1", nn.RMSNorm(64)), "norm1 is a RMSNorm"),
            (lambda m: setattr(m.blocks[2].attn, "is_causal", True), "is_causal"),
            (lambda m: setattr(m.blocks[2].attn, "scaling", 0.5), "scaling"),
            (lambda m: setattr(m, "rotary_pos_emb", nn.Identity()), "rotary_pos_emb is a Identity"),
            (lambda m: setattr(m.merger, "use_postshuffle_norm", True), "use_postshuffle_norm"),
            (lambda m: setattr(m, "interpolation_mode", "bicubic"), "interpolation_mode"),
            (lambda m: setattr(m, "num_grid_per_side", 11), "num_grid_per_side"),
            (lambda m: setattr(m, "spatial_merge_size", 4), "spatial_merge_size"),
            (lambda m: setattr(m.config, "spatial_merge_size", 4), "spatial_merge_size"),
            (lambda m: m.deepstack_visual_indexes.pop(), "deepstack_visual_indexes"),
            (lambda m: setattr(m.config, "_attn_implementation", "eager"), "'eager'"),
            (lambda m: m.blocks[0].attn.register_forward_hook(lambda *args: None), "forward hooks"),
            (lambda m: m.blocks.__delitem__(slice(0, 3)), "no layers"),
            (lambda m: m.half().pos_embed.float(), "float"),
        ],
    )
    @torch.no_grad()
    def test_of_the_tower(self, change, reason):
        """Whether it was so before the first forward, or became so."""
        ours, changed = fast(make()), fast(make())
        ours(*inputs())
        for model in (ours, changed):
            change(model)
            assert reason in (model.why_not(*inputs()) or "")
            with pytest.raises(RuntimeError, match="does not apply"):
                model(*inputs())

    def test_activation_of_the_config(self):
        with torch.no_grad():
            assert "hidden_act is 'quick_gelu'" in fast(make(hidden_act="quick_gelu")).why_not(*inputs())

    def test_autocast(self):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in fast(make()).why_not(*inputs())

    def test_gradients_are_stocks(self):
        stock = make()
        ours = fast(stock, strict=False)
        assert "gradients" in ours.why_not(*inputs())
        for model in (stock, ours):
            sum(tensor.square().mean() for tensor in zoo.tensors(model(*inputs())).values()).backward()
        for expected, actual in zip(stock.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self):
        torch._dynamo.reset()

    @pytest.mark.parametrize("name", ["Qwen3VLVisionModel", *[name for name in NAMES if "Qwen3_5Vision" in name]])
    @torch.no_grad()
    def test_any_grids_in_one_graph(self, name):
        """Whatever the sizes of images, and how many: one operation, traced once; of towers with taps and without."""
        stock, graphs = make(name), CompileCounterWithBackend("eager")
        compiled = torch.compile(fast(stock), fullgraph=True, dynamic=True, backend=graphs)
        for grids in ("many", "videos", "uneven", "equal"):  # of three first torch would take [3, 3] for a square
            assert_accurate_outputs(compiled(*inputs(GRIDS[grids])), *judged(stock, *inputs(GRIDS[grids])))
        assert graphs.frame_count == 1
        assert any("gridded_tower" in str(node.target) for node in graphs.graphs[0].graph.nodes)

    @torch.no_grad()
    def test_by_inductor(self):
        stock = make()
        ours = fast(stock)
        compiled = torch.compile(ours, fullgraph=True)
        for _ in range(2):
            assert_accurate_outputs(compiled(*inputs()), *judged(stock, *inputs()))
            for tower in (stock, ours):
                tower.merger.linear_fc1.weight.mul_(2)

    @torch.no_grad()
    def test_sizes_that_are_wrong_are_told_as_it_runs(self):
        stock, (rows, grid_thw) = make(), inputs()
        compiled = torch.compile(fast(stock, strict=False), fullgraph=True, backend="eager")
        compiled(rows, grid_thw)
        with pytest.raises(Exception) as expected:
            stock(rows, grid_thw * 2)
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            compiled(rows, grid_thw * 2)

    @torch.no_grad()
    def test_stock_is_traced_for_hidden_states(self):
        stock = make()
        compiled = torch.compile(fast(stock, strict=False), backend="eager")
        expected = zoo.tensors(stock(*inputs(), output_hidden_states=True))
        torch.testing.assert_close(zoo.tensors(compiled(*inputs(), output_hidden_states=True)), expected)


class TestEdits:
    @pytest.mark.parametrize(
        "edit",
        [
            lambda m: m.rotary_pos_emb.inv_freq.mul_(1.5),
            lambda m: setattr(m.rotary_pos_emb, "inv_freq", m.rotary_pos_emb.inv_freq * 2),
            lambda m: m.pos_embed.weight.mul_(2),
            lambda m: m.blocks[1].attn.qkv.weight.mul_(2),
            lambda m: m.merger.linear_fc1.weight.mul_(2),
            lambda m: m.deepstack_merger_list[1].norm.weight.mul_(2),
            lambda m: m.patch_embed.proj.weight.mul_(2),
            lambda m: m.deepstack_visual_indexes.reverse(),
            lambda m: m.deepstack_visual_indexes.__setitem__(0, 1),
            lambda m: setattr(m, "deepstack_visual_indexes", (1, 2)),
            lambda m: setattr(m, "num_grid_per_side", 7),
        ],
    )
    @torch.no_grad()
    def test_are_seen(self, edit):
        stock = make()
        ours = fast(stock)
        ours(*inputs())
        edit(stock)
        edit(ours)
        assert_as(stock, ours, *inputs())

    @torch.no_grad()
    def test_of_the_interpolation(self):
        stock = make()
        if not hasattr(stock, "interpolation_align_corners"):
            pytest.skip("this transformers has no such flag")
        ours = fast(stock)
        ours(*inputs())
        for model in (stock, ours):
            model.interpolation_align_corners = False
        assert_as(stock, ours, *inputs())

    @torch.no_grad()
    def test_moved_and_cast(self):
        stock = make()
        ours = fast(stock)
        names = list(ours.state_dict())
        ours(*inputs())
        assert list(ours.state_dict()) == names == list(stock.state_dict())
        assert_as(stock.bfloat16(), ours.bfloat16(), *inputs(dtype=torch.bfloat16))
        again = pickle.loads(pickle.dumps(ours))
        assert_as(stock, again, *inputs(dtype=torch.bfloat16))

    @torch.no_grad()
    def test_restore(self):
        stock = make()
        ours = fast(stock)
        ours(*inputs())
        assert [tower.fast for tower in towers(ours)] == [True]
        assert type(restore(ours)) is type(stock)
        assert vars(ours).keys() == vars(stock).keys()


class TestParts:
    def test_together(self):
        assert together([3, 4, 5], None) == [slice(0, 3)]
        assert together([3, 4, 5, 1], 7) == [slice(0, 2), slice(2, 4)]
        assert together([9, 9, 1], 4) == [slice(0, 1), slice(1, 2), slice(2, 3)]

    @torch.no_grad()
    def test_one_after_the_other(self, monkeypatch):
        monkeypatch.setattr(cpu, "rows_at_once", lambda: 30)
        stock = make()
        ours = fast(stock, backend="cpu", strict=False)
        assert_as(stock, ours, *inputs())
        assert_as(stock, ours, *inputs(), output_hidden_states=True)

    @torch.no_grad()
    def test_batch_invariant(self, monkeypatch):
        """With a library whose results depend on the number of rows."""
        linear = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
        rows, grid = inputs()
        for batch_invariant in (True, False):
            ours = fast(make(), batch_invariant=batch_invariant)
            alone = ours(rows[24:28], grid[1:2])[0]
            merged = len(alone) == 1  # transformers 4
            among = ours(rows, grid)[0][6:7] if merged else ours(rows, grid)[0][24:28]
            assert torch.equal(among, alone) == batch_invariant


class TestGrids:
    @pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
    @pytest.mark.parametrize("align_corners", [True, False])
    @pytest.mark.parametrize("merge", [1, 2])
    def test_as_transformers(self, grids, align_corners, merge):
        """The same numbers to the last bit."""
        theirs = pytest.importorskip("transformers.vision_utils")
        if not hasattr(theirs, "get_vision_interpolation_indices_and_weights"):
            pytest.skip("this transformers has no such function")
        grid_thw = torch.tensor(grids)
        places = on_grids.places(grids, merge)
        assert np.array_equal(places, theirs.get_vision_position_ids(grid_thw, merge))
        expected = theirs.get_vision_interpolation_indices_and_weights(
            grid_thw, 10, align_corners=align_corners, spatial_merge_size=merge
        )
        for own, their in zip(on_grids.bilinear(places, grids, 10, align_corners), expected, strict=True):
            assert np.array_equal(own, their)

    def test_read_once(self, monkeypatch):
        reads, tolist = [], torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
        grid = torch.tensor(MIXED)
        for _ in range(2):
            assert on_grids.read_once(grid) == MIXED
        assert len(reads) == 1
        grid[1, 1] = 8
        assert on_grids.read_once(grid)[1] == (1, 8, 2)
        held = len(on_grids._read)
        del grid
        assert len(on_grids._read) == held - 1

    def test_what_is_on_the_cpu_is_read_each_time(self):
        numbers = np.array(MIXED)
        grid = torch.from_numpy(numbers)
        assert on_grids.read(grid) == MIXED
        numbers[0, 0] = 5  # which torch does not count
        assert on_grids.read(grid)[0] == (5, 4, 6)

    def test_made_in_inference_mode(self):
        ours = fast(make())
        with torch.inference_mode():
            ours(*inputs())


class TestInAModel:
    @torch.no_grad()
    def test_swapped_and_restored(self):
        model, values = zoo.build("qwen3_vl")
        expected = zoo.run(model, values)
        apply_to(model, strict=True, backend="torch")
        with zoo.fused_attentions() as calls:
            assert zoo.error(zoo.run(model, values), expected) < 1e-5
        assert calls == ["torch"] * 2
        restore(model)
        assert zoo.error(zoo.run(model, values), expected) == 0

    @pytest.mark.skipif(swap._monkey_patching() is None, reason="this transformers names the class, unpatched")
    def test_registered(self):
        model, values = zoo.build("qwen3_vl")
        siglip_fast.register()
        try:
            built = type(model)._from_config(model.config)
        finally:
            siglip_fast.unregister()
        assert [tower.fast for tower in towers(built)] == [True]
        assert not towers(type(model)._from_config(model.config))[0].fast
        assert built.state_dict().keys() == model.state_dict().keys()
