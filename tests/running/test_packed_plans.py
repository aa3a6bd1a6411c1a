"""Calls on images of any size, launched by plans, give the bits of those launched operation by operation: a new mix of sizes
layer by layer as its first layer was, one that came before as a whole."""

import gridded_towers
import pytest
import torch
import zoo
from gridded_towers import FAMILIES, INSTALLED
from interpreted import Chosen, Compiled, assert_freed_at_once, in_place_of_a_gpu, vendors
from models import drop_in, stock_model
from packed_towers import minicpm_strip, minicpm_tower, naflex_inputs, qwen3_vl_inputs, qwen3_vl_tower
from torch.utils._pytree import tree_leaves
from transformers import Siglip2VisionConfig

import siglip_fast
from siglip_fast.backends import triton as triton_backend
from siglip_fast.backends.choice import Choice
from siglip_fast.backends.select import for_graph
from siglip_fast.running import plans
from siglip_fast.running.packed_plans import PackedPlans

LAYERS = 3
KERNELS = 5  # of a layer, at the least
GRIDS = [(1, 2, 4), (1, 2, 2)]


@pytest.fixture(autouse=True)
def interpreted(request):
    with in_place_of_a_gpu(request.function is test_on_a_gpu):
        yield


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: real kernels, real addresses, streams")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_on_a_gpu(dtype):
    model, streams, kept = qwen3_vl(dtype).cuda(), [torch.cuda.Stream() for _ in range(3)], []
    for turn in range(16):
        call = {
            name: value.cuda() for name, value in qwen3_vl_call([(1, 2, 4), (1, 2, 2)][: 1 + turn % 2], dtype).items()
        }
        call["hidden_states"] += turn
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[turn % 3]):
            kept.append((zoo.tensors(model(**call)), call))
    torch.cuda.synchronize()
    plans_made = [*model._current().kept(PackedPlans)._plans._plans.values()]
    assert len(plans_made) == 2 and all(plans_made)
    for actual, call in kept:
        expected = unplanned(model, call)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def qwen3_vl(dtype=torch.float32, **changes):
    stock = qwen3_vl_tower(dtype=dtype, depth=LAYERS, **changes)
    return siglip_fast.apply_to(stock, backend="triton", strict=True)


def naflex():
    config = Siglip2VisionConfig(**zoo.SIGLIP2_VISION | {"num_hidden_layers": LAYERS})
    return drop_in(stock_model(config, "sdpa", "Siglip2VisionModel"), backend="triton", strict=True)


def qwen3_vl_call(grids, dtype=torch.float32):
    rows, grid_thw = qwen3_vl_inputs(grids, dtype)
    return {"hidden_states": rows, "grid_thw": grid_thw}


@torch.no_grad()
def outputs_of(model, call, **kwargs):
    """And how many kernels a plan launched."""
    before = Compiled.launched
    return zoo.tensors(model(**call, **kwargs)), Compiled.launched - before


@torch.no_grad()
def unplanned(model, call, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "applies", lambda tensor: False)
        return zoo.tensors(model(**call, **kwargs))


def check(model, call, launched=KERNELS * (LAYERS - 1), **kwargs):
    actual, count = outputs_of(model, call, **kwargs)
    expected = unplanned(model, call, **kwargs)
    assert count >= launched if launched else not count
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_qwen3_vl(dtype):
    """Taps between the layers, which run as they are; one call after another, none of which knows of the last."""
    model = qwen3_vl(dtype)
    for grids in ([*GRIDS, (2, 8, 4)], [(2, 4, 2)]):
        check(model, qwen3_vl_call(grids, dtype))


def test_padded_rows():
    check(naflex(), naflex_inputs([(3, 5), (4, 4), (1, 6)], 16))


def test_hidden_states():
    check(naflex(), naflex_inputs([(3, 5), (4, 4)], 16), output_hidden_states=True)


@torch.no_grad()
def test_outputs_that_are_kept():
    """No layer writes into what another call's returned."""
    model, call = qwen3_vl(), qwen3_vl_call([(1, 4, 2)])
    kept, _ = outputs_of(model, call)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    outputs_of(model, call | {"hidden_states": call["hidden_states"] + 1})
    assert all(torch.equal(kept[name], before[name]) for name in kept)


def test_rows_that_become_fewer():
    """Between the layers, of which those behind are planned anew."""
    model = siglip_fast.apply_to(minicpm_tower(num_hidden_layers=5), backend="triton", strict=True)
    check(model, minicpm_strip([(4, 6), (2, 2), (6, 4)]), launched=KERNELS * 3)


@pytest.mark.parametrize("names", [["layernorm_linear"], ["linear_residual"], [*triton_backend.RUN]])
def test_vendors_routes(names, monkeypatch):
    """What the vendor's functions are given inside of their arguments is each layer's own."""
    names = [name for name in names if name != "attention_segments"]
    monkeypatch.setattr("siglip_fast.models.weights._selection_on", lambda device: vendors(*names))
    check(qwen3_vl(), qwen3_vl_call(GRIDS), launched=LAYERS - 1)


@pytest.mark.parametrize("persistent", [False, True])
def test_tensor_descriptors(persistent, monkeypatch):
    """Of weights, which are others in each layer."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8, "num_warps": 4, "num_stages": 3, "TMA": True}
    choice = Choice("triton", tile | ({"PERSISTENT": True} if persistent else {}))
    chosen = Chosen(layernorm_linear=choice, linear_residual=choice)
    monkeypatch.setattr("siglip_fast.models.weights._selection_on", lambda device: chosen)
    check(qwen3_vl(torch.float16, intermediate_size=96), qwen3_vl_call(GRIDS, torch.float16))


def test_a_layer_whose_weights_lie_elsewhere():
    """A kernel is compiled for addresses at multiples of 16 bytes, and must not be given others."""
    model = qwen3_vl(torch.float16)
    weight = model.blocks[1].mlp.linear_fc2.weight
    memory = torch.empty(weight.numel() + 1, dtype=weight.dtype)
    weight.data = memory[1:].view(weight.shape).copy_(weight.data)
    assert weight.data_ptr() % 16
    check(model, qwen3_vl_call([(1, 4, 2)], torch.float16), launched=KERNELS * (LAYERS - 2))


def test_a_layer_with_an_epsilon_of_its_own():
    """Which is no tensor, and may be another in each layer."""
    stock = qwen3_vl_tower(depth=LAYERS)
    stock.blocks[1].norm1.eps = 0.5
    check(siglip_fast.apply_to(stock, backend="triton", strict=True), qwen3_vl_call(GRIDS), launched=KERNELS)


def test_weights_in_one_piece_of_memory():
    """As some loaders leave them: where one ends is not known then, and nothing is planned."""
    model = qwen3_vl()
    own = [model.blocks[0].mlp.linear_fc2.weight, model.blocks[0].attn.proj.weight]
    memory = torch.cat([weight.data.flatten() for weight in own])
    for weight, part in zip(own, memory.split([weight.numel() for weight in own]), strict=True):
        weight.data = part.view(weight.shape)
    check(model, qwen3_vl_call([(1, 4, 2)]), launched=0)


def test_profilers_see_each_launch(monkeypatch):
    monkeypatch.setattr(plans, "is_profiled", lambda: True)
    check(qwen3_vl(), qwen3_vl_call([(1, 4, 2)]), launched=0)


def test_not_for_a_graph():
    with for_graph():
        check(qwen3_vl(), qwen3_vl_call([(1, 4, 2)]), launched=0)


class TestSizesThatCameBefore:
    """`again`: a third call records what the fourth and later ones launch."""

    def again(self, model, call, pixels):
        """Each on other pixels."""
        kept, whole, layers = [], KERNELS * LAYERS + 1, KERNELS * (LAYERS - 1)
        for turn in range(5):
            scaled = call | {pixels: call[pixels] * (1 + turn)}
            actual, launched = outputs_of(model, scaled)
            assert launched == 0 if turn == 2 else launched >= (layers if turn < 2 else whole)
            kept.append((actual, unplanned(model, scaled)))
        for actual, expected in kept:  # afterwards: a later call must not write into an earlier one's output
            assert all(torch.equal(actual[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_qwen3_vl(self, dtype):
        self.again(qwen3_vl(dtype), qwen3_vl_call(GRIDS, dtype), "hidden_states")

    @pytest.mark.parametrize("family", INSTALLED)
    def test_gridded(self, family):
        model = gridded_towers.fast(gridded_towers.tower(family), backend="triton")
        self.again(model, FAMILIES[family].call(GRIDS), FAMILIES[family].pixels)

    def test_naflex(self):
        """The table of positions is another tensor once a new size came, also for sizes that came before."""
        model, call = naflex(), naflex_inputs([(3, 5), (4, 4)], 16)
        self.again(model, call, "pixel_values")
        check(model, naflex_inputs([(2, 6)], 16))
        check(model, call, launched=KERNELS * LAYERS + 1)
        check(model, naflex_inputs([(3, 5), (4, 4)], 17))  # padded to more: other sizes

    def test_others_between(self):
        model = qwen3_vl()
        other = [(1, 2, 4)]
        for grids in (GRIDS, other, GRIDS, other, GRIDS, other, GRIDS, other, [(1, 8, 2)], GRIDS, other):
            call = qwen3_vl_call(grids)
            actual, expected = outputs_of(model, call)[0], unplanned(model, call)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)

    def test_the_side_of_squares_is_part_of_the_sizes(self):
        if "cosmos3_edge" not in INSTALLED:
            pytest.skip("transformers has no Cosmos3 Edge")
        family, stock = FAMILIES["cosmos3_edge"], gridded_towers.tower("cosmos3_edge")
        model, call = gridded_towers.fast(stock, backend="triton"), family.call([(1, 4, 4)])
        self.again(model, call, family.pixels)
        planned = outputs_of(model, call)[0]
        model.embeddings.config.spatial_merge_size = 1
        actual, expected = outputs_of(model, call)[0], unplanned(model, call)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert not any(torch.equal(actual[name], planned[name]) for name in planned)

    def test_rows_at_an_odd_address(self):
        """For which there are other kernels than for those at multiples of 16 bytes."""
        model, call = qwen3_vl(torch.float16), qwen3_vl_call(GRIDS, torch.float16)
        self.again(model, call, "hidden_states")
        rows = call["hidden_states"]
        moved = torch.empty(rows.numel() + 1, dtype=rows.dtype)[1:].view(rows.shape).copy_(rows)
        assert moved.data_ptr() % 16
        check(model, call | {"hidden_states": moved})

    @torch.no_grad()
    def test_edits_are_seen(self):
        """Of weights, and of the table of positions, which no operation has among its weights."""
        model, call = qwen3_vl(), qwen3_vl_call(GRIDS)
        self.again(model, call, "hidden_states")
        for parameter in (model.blocks[1].mlp.linear_fc2.weight, model.pos_embed.weight):
            parameter.mul_(1.5)
            self.again(model, call, "hidden_states")

    def test_so_many_are_kept(self, monkeypatch):
        """A round of more sizes than are kept is launched layer by layer, and not recorded in vain."""
        monkeypatch.setattr(plans, "MOST", 2)
        model, calls = qwen3_vl(), [qwen3_vl_call([(frames, 2, 2)]) for frames in (1, 2, 3)]
        for call in 3 * calls:
            check(model, call)
        assert not model._current().kept(PackedPlans)._plans._plans

    def test_those_used_last_are_kept(self, monkeypatch):
        monkeypatch.setattr(plans, "MOST", 2)
        model, calls = qwen3_vl(), [qwen3_vl_call([(frames, 2, 2)]) for frames in (1, 2, 3)]
        first, second, third = calls
        for call in (*4 * [first], *4 * [second], first, *3 * [third]):
            outputs_of(model, call)
        assert [outputs_of(model, call)[1] > KERNELS * LAYERS for call in (first, third, second)] == [True, True, False]

    def test_the_packing_is_held_for_each_stream(self, monkeypatch):
        """Once, by all of its tensors, or what a plan leaves would be somebody's while a stream still reads it."""
        model, held, current = qwen3_vl(), [], [1]
        for _ in range(3):
            outputs_of(model, qwen3_vl_call(GRIDS))
        planned = model._current().kept(PackedPlans)
        (plan,) = planned._plans._plans.values()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: held.append((tensor.data_ptr(), stream))
        )
        for current[0] in (1, 2, 1, 2):
            planned._hold(plan, torch.device("cuda"))
        packing = [leaf.data_ptr() for leaf in tree_leaves(plan.constants[1]) if isinstance(leaf, torch.Tensor)]
        assert len(packing) > 4
        assert held == [(address, stream) for stream in (1, 2) for address in packing]

    def test_what_cannot_be_planned_as_a_whole(self, monkeypatch):
        """Still layer by layer."""
        monkeypatch.setattr(plans.Plans, "has_tried", lambda plans, key: True)
        model = qwen3_vl()
        for _ in range(4):
            check(model, qwen3_vl_call(GRIDS))

    def test_nothing_is_kept_of_dropped_weights(self):
        model = qwen3_vl()
        self.again(model, qwen3_vl_call(GRIDS), "hidden_states")
        assert_freed_at_once(model)
