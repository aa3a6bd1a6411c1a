"""Towers that take packed pixels and grids, beside Qwen3-VL's: what is alike in all families. Each is held to stock's."""

import functools
import pickle

import pytest
import recorded
import torch
import zoo
from device import DEVICE
from gridded_towers import (
    FAMILIES,
    INSTALLED,
    MIXED,
    assert_accurate_outputs,
    assert_as,
    assert_left_to_stock,
    exact,
    fast,
    tower,
)
from stock_towers import count_reads
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import siglip_fast
from siglip_fast import restore, towers
from siglip_fast.backends import cpu
from siglip_fast.models import swap

pytestmark = pytest.mark.skipif(not INSTALLED, reason="this transformers has none of them")
every_family = pytest.mark.parametrize("family", INSTALLED)
row_by_row = pytest.mark.parametrize("family", [name for name in INSTALLED if not FAMILIES[name].adds_tokens])
on = functools.partial(pytest.mark.parametrize, "backend", indirect=True)
GRIDS = {
    "images": [(1, 2 * h, 2 * w) for h, w in [(3, 5), (1, 1), (2, 3), (5, 1), (2, 3), (1, 7), (2, 2), (2, 2)]],
    "videos": [(3, 4, 6), (3, 2, 2)],
    "long": [(1, 2, 600)],  # of whose positions bfloat16 has not all
}
FEW = [(1, 2, 4), (1, 4, 2)]


@functools.cache
def case(family, grids, dtype):
    stock, call = tower(family, dtype), FAMILIES[family].call(GRIDS[grids], dtype)
    return stock, call, (stock(**call), exact(stock, call))


def layers_of(model):
    own = getattr(model, "layers", None) or getattr(model, "blocks", None)
    return model.encoder.layers if own is None else own


def attention_of(layer):
    return layer.attn if hasattr(layer, "attn") else layer.self_attn


@every_family
@on(["torch", "cpu"])
@pytest.mark.parametrize("grids", GRIDS)
@torch.no_grad()
def test_accuracy(family, grids, backend, dtype):
    stock, call, expected = case(family, grids, dtype)
    assert_accurate_outputs(fast(stock, backend=backend)(**call), *expected)


@every_family
@on(["triton"])
@torch.no_grad()
def test_on_the_kernels(family, backend):
    stock, call = tower(family, num_hidden_layers=1), FAMILIES[family].call(FEW)
    assert_as(stock, fast(stock, backend=backend), call)


@every_family
@torch.no_grad()
def test_forms_of_the_output(family):
    stock, call = tower(family), FAMILIES[family].call(MIXED)
    ours = fast(stock)
    ours.strict = ours.returns_hidden_states
    for asked in (False, True, 1, [0, -1]):
        for return_dict in (True, False):
            assert_as(stock, ours, call, output_hidden_states=asked, return_dict=return_dict)
    small = {name: value if value.is_floating_point() else value.int() for name, value in call.items()}
    assert_as(stock, ours, small)
    assert all(tensor.is_contiguous() for tensor in zoo.tensors(ours(**call)).values())


@every_family
@torch.no_grad()
def test_by_place(family):
    """As stock's signature has the arguments, in why_not too."""
    stock, call = tower(family), FAMILIES[family].call(MIXED)
    ours = fast(stock)
    by_place = [call.get(name) for name in ours.arguments]
    assert ours.why_not(*by_place) is None
    expected, actual = zoo.tensors(ours(**call)), zoo.tensors(ours(*by_place))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@every_family
@torch.no_grad()
def test_constructed(family):
    stock, call = tower(family), FAMILIES[family].call(MIXED)
    ours = type(fast(stock))(stock.config, backend="torch", strict=True).eval()
    ours.load_state_dict(stock.state_dict())
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert_as(stock, ours, call)


@row_by_row
@torch.no_grad()
def test_no_image_sees_another(family):
    """Not even one that is not a number."""
    stock, call = tower(family), FAMILIES[family].call([(1, 4, 4), (1, 2, 6), (1, 2, 2)])
    ours = fast(stock)
    before = zoo.tensors(ours(**call))
    call[ours.pixels_name].view(32, -1)[16:28] = float("nan")
    for name, tensor in zoo.tensors(ours(**call)).items():
        rows = tensor.isnan().flatten(1).any(1)
        count = len(rows) // 4  # in all families a row is of one patch or of four
        assert rows.sum() == 3 * count // 2
        assert torch.equal(tensor[~rows], before[name][~rows])


@every_family
@torch.no_grad()
def test_the_host_reads_once(family, monkeypatch):
    """The grids and what is beside them, where the sizes are known already."""
    ours, call = fast(tower(family)), FAMILIES[family].call(MIXED)
    ours(**call)
    reads = count_reads(monkeypatch)
    ours(**call)
    assert reads == ["tolist"]


@every_family
@pytest.mark.parametrize("buffers", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_positions_are_the_buffers(family, buffers):
    """`.to` rounds them, from_pretrained does not."""
    stock = tower(family)
    kept = {name: buffer for name, buffer in stock.named_buffers() if buffer.is_floating_point()}
    stock.bfloat16()
    for name, buffer in kept.items():
        module, _, own = name.rpartition(".")
        setattr(stock.get_submodule(module), own, buffer.to(buffers))
    assert_as(stock, fast(stock), FAMILIES[family].call([(3, 2, 20), (3, 12, 2)], torch.bfloat16))


@pytest.mark.parametrize("family", [family for family in INSTALLED if family == "glm_image"])
@torch.no_grad()
def test_attention_without_bias(family):
    stock = tower(family, attention_bias=False)
    assert stock.blocks[0].attn.qkv.bias is None
    assert_as(stock, fast(stock), FAMILIES[family].call(MIXED))


class TestReasons:
    @every_family
    @pytest.mark.parametrize(
        "name, value",
        [
            ("output_attentions", True),
            ("position_ids", torch.zeros(60, 2, dtype=torch.int64)),
            ("max_seqlen", 32),
            ("interp_indices", torch.zeros(60, 4, dtype=torch.int64)),
            ("frame_index", torch.ones(60, dtype=torch.int64)),
            ("cu_seqlens", torch.tensor([0, 30, 60], dtype=torch.int32)),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @torch.no_grad()
    def test_keywords(self, family, name, value):
        stock = tower(family)
        call = FAMILIES[family].call(MIXED) | {name: value}
        if name == "interp_indices":
            call["interp_weights"] = torch.ones(60, 4)
        assert_left_to_stock(stock, fast(stock), call, name)

    @every_family
    @torch.no_grad()
    def test_nothing_given_is_no_keyword(self, family):
        assert fast(tower(family)).why_not(**FAMILIES[family].call(MIXED), position_ids=None) is None

    WRONG = {
        "no height": [(1, 4, 6), (1, 0, 2)],
        "no frames": [(1, 4, 6), (0, 2, 2)],
        "negative": [(-1, -4, 6)],
        "more rows": [(1, 4, 6), (1, 2, 2), (1, 8, 8)],
        "fewer rows": [(1, 4, 6), (1, 2, 2)],
        "odd": [(1, 5, 4), (1, 5, 8)],
    }

    @every_family
    @pytest.mark.parametrize("wrong", WRONG)
    @torch.no_grad()
    def test_grids(self, family, wrong):
        if wrong == "odd" and FAMILIES[family].side == 1:
            pytest.skip("nothing is merged")
        stock, own = tower(family), FAMILIES[family]
        sizes = self.WRONG[wrong]
        call = own.call(sizes, merges=[2] * len(sizes)) if wrong == "odd" else own.call([(1, 6, 10)])
        if wrong != "odd":
            call = own.call(sizes, merges=[1] * len(sizes)) | {own.pixels: call[own.pixels]}
        assert_left_to_stock(stock, fast(stock), call)

    @every_family
    @pytest.mark.parametrize(
        "change",
        [
            lambda px, grid: (px[..., :-1], grid),
            lambda px, grid: (px.flatten(), grid),
            lambda px, grid: (px.to(torch.int64), grid),
            lambda px, grid: (px, grid.float()),
            lambda px, grid: (px, grid[:, 1:]),
            lambda px, grid: (px, grid[:0]),
            lambda px, grid: (px, grid.tolist()),
            lambda px, grid: (px, None),
        ],
        ids=["width", "flat", "integers", "fractions", "two numbers", "no images", "a list", "none"],
    )
    @torch.no_grad()
    def test_arguments(self, family, change):
        stock, call = tower(family), FAMILIES[family].call(MIXED)
        ours = fast(stock)
        names = ours.pixels_name, ours.grids_name
        assert_left_to_stock(stock, ours, call | dict(zip(names, change(*map(call.get, names)), strict=True)))

    @every_family
    @pytest.mark.parametrize(
        "change, reason",
        [
            (lambda m: setattr(attention_of(layers_of(m)[2]), "is_causal", True), "is_causal"),
            (lambda m: setattr(attention_of(layers_of(m)[2]), "head_dim", 16), "head_dim"),
            (lambda m: setattr(layers_of(m)[1].mlp, "fc1", nn.Identity()), "fc1 is a Identity"),
            (lambda m: setattr(m.config, "_attn_implementation", "eager"), "'eager'"),
            (lambda m: attention_of(layers_of(m)[0]).register_forward_hook(lambda *args: None), "forward hooks"),
            (lambda m: layers_of(m).__delitem__(slice(0, 3)), "no layers"),
            (lambda m: layers_of(m.half())[0].float(), "float"),
        ],
        ids=["causal", "heads", "mlp", "eager", "hook", "no layers", "dtypes"],
    )
    @torch.no_grad()
    def test_of_the_tower(self, family, change, reason):
        """Whether it was so before the first forward, or became so."""
        call = FAMILIES[family].call(FEW)
        ours, changed = fast(tower(family)), fast(tower(family))
        ours(**call)
        for model in (ours, changed):
            change(model)
            assert reason in (model.why_not(**call) or "")
            with pytest.raises(RuntimeError, match="does not apply"):
                model(**call)

    @every_family
    @torch.no_grad()
    def test_activation_of_the_config(self, family):
        ours = fast(tower(family, hidden_act="relu"))
        assert "hidden_act is 'relu'" in ours.why_not(**FAMILIES[family].call(FEW))

    @every_family
    def test_gradients_are_stocks(self, family):
        stock, call = tower(family), FAMILIES[family].call(FEW)
        ours = fast(stock, strict=False)
        assert "gradients" in ours.why_not(**call)
        for model in (stock, ours):
            sum(tensor.square().mean() for tensor in zoo.tensors(model(**call)).values()).backward()
        for expected, actual in zip(stock.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)

    @pytest.mark.parametrize("family", [family for family in INSTALLED if FAMILIES[family].drops])
    @torch.no_grad()
    def test_attention_dropout(self, family):
        """Where the tower is in training, though there are no gradients."""
        ours, call = fast(tower(family, attention_dropout=0.1)), FAMILIES[family].call(FEW)
        assert ours.why_not(**call) is None
        assert "dropout" in ours.train().why_not(**call)

    @every_family
    @torch.no_grad()
    def test_gradient_checkpointing_leaves_no_mark(self, family):
        ours = fast(tower(family))
        ours.gradient_checkpointing_enable()
        if getattr(ours, "_input_embed_layer", None) == "patch_embed":  # where stock puts a hook
            assert "forward hooks" in ours.why_not(**FAMILIES[family].call(FEW))
            ours.disable_input_require_grads()
        assert ours.why_not(**FAMILIES[family].call(FEW)) is None


class TestEdits:
    @every_family
    @torch.no_grad()
    def test_are_seen(self, family):
        """Of each parameter and buffer."""
        stock, call = tower(family, num_hidden_layers=1), FAMILIES[family].call([(2, 4, 4), (2, 2, 8)])
        ours = fast(stock)
        for own, theirs in zip(self.numbers(ours), self.numbers(stock), strict=True):
            own.mul_(1.25)
            theirs.mul_(1.25)
            assert zoo.error(zoo.tensors(ours(**call)), zoo.tensors(stock(**call))) < 1e-5

    def numbers(self, model):
        return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]

    @every_family
    @torch.no_grad()
    def test_moved_and_cast(self, family):
        stock, call = tower(family), FAMILIES[family].call(FEW, torch.bfloat16)
        ours = fast(stock)
        ours(**FAMILIES[family].call(FEW))
        assert_as(stock.bfloat16(), ours.bfloat16(), call)
        assert_as(stock, pickle.loads(pickle.dumps(ours)), call)

    @every_family
    @torch.no_grad()
    def test_restore(self, family):
        stock = tower(family)
        ours = fast(stock)
        ours(**FAMILIES[family].call(FEW))
        assert [found.fast for found in towers(ours)] == [True]
        assert type(restore(ours)) is type(stock)
        assert vars(ours).keys() == vars(stock).keys()


class TestParts:
    @every_family
    @torch.no_grad()
    def test_one_after_the_other(self, family, monkeypatch):
        monkeypatch.setattr(cpu, "rows_at_once", lambda: 30)
        stock, call = tower(family), FAMILIES[family].call(GRIDS["images"])
        ours = fast(stock, backend="cpu")
        for asked in (False, True) if ours.returns_hidden_states else (False,):
            assert_as(stock, ours, call, output_hidden_states=asked)

    @row_by_row
    @torch.no_grad()
    def test_batch_invariant(self, family, monkeypatch):
        """With a library whose results depend on the number of rows."""
        linear = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
        stock, own = tower(family), FAMILIES[family]
        grids = [(3, 4, 2), (3, 2, 6), (3, 2, 2)]
        together, alone = own.call(grids), own.call(grids[1:2])
        pixels = together[own.pixels].view(72, -1)[24:60]
        alone[own.pixels] = pixels.reshape(alone[own.pixels].shape)
        for batch_invariant in (True, False):
            ours = fast(stock, batch_invariant=batch_invariant)
            of_all, of_one = zoo.tensors(ours(**together)), zoo.tensors(ours(**alone))
            for whole, own_rows in zip(of_all.values(), of_one.values(), strict=True):
                first = len(whole) * 2 // 5 if family == "kimi_k25" and whole.ndim == 3 else len(whole) // 3
                same = torch.equal(whole[first : first + len(own_rows)], own_rows)
                assert same == batch_invariant


@every_family
@torch.no_grad()
def test_captured(family, monkeypatch):
    """Each call's positions, and what is made of the last hidden state behind a graph."""
    recorder, own = recorded.install(monkeypatch), FAMILIES[family]
    stock = tower(family, num_hidden_layers=1).to(DEVICE)
    ours = fast(stock, backend="triton")
    ours.capture([32, 16], max_images=4)
    for grids, budget in (([(1, 4, 4), (1, 2, 6)], 32), ([(1, 2, 2)], 16), ([(2, 2, 4), (2, 2, 2)], 32)):
        call = {name: value.to(DEVICE) for name, value in own.call(grids).items()}
        recorder.replayed.clear()
        assert zoo.error(zoo.tensors(ours(**call)), zoo.tensors(stock(**call))) < 1e-4
        assert recorder.replayed == [budget]


class TestCompiled:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self):
        torch._dynamo.reset()

    @every_family
    @torch.no_grad()
    def test_any_grids_in_one_graph(self, family):
        stock, graphs = tower(family), CompileCounterWithBackend("eager")
        compiled = torch.compile(fast(stock), fullgraph=True, dynamic=True, backend=graphs)
        for grids in (GRIDS["images"], GRIDS["videos"], [(1, 4, 4)] * 5):
            call = FAMILIES[family].call(grids)
            assert_accurate_outputs(compiled(**call), stock(**call), exact(stock, call))
        assert graphs.frame_count == 1
        assert any("gridded_tower" in str(node.target) for node in graphs.graphs[0].graph.nodes)


class TestInAModel:
    @every_family
    def test_registered(self, family):
        """Built by AutoModel, or where transformers can patch the names of classes."""
        if swap._monkey_patching() is None and family != "video_llama_3":
            pytest.skip("this transformers names the class, unpatched")
        if family not in zoo.ZOO:
            pytest.skip("no model around it")
        model, _ = zoo.build(family)
        siglip_fast.register()
        try:
            built = type(model)._from_config(model.config)
        finally:
            siglip_fast.unregister()
        assert [found.fast for found in towers(built)] == [True]
        assert not towers(type(model)._from_config(model.config))[0].fast
