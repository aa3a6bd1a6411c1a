"""Captured forwards of images of any size (tests/helpers/recorded.py is what stands for CUDA graphs here), on Triton's kernels,
which read what a graph is given where it lies."""

import copy
import gc
import weakref

import pytest
import recorded
import torch
import zoo
from device import DEVICE
from models import drop_in, stock_model
from packed_towers import naflex_inputs, qwen3_vl_inputs, qwen3_vl_tower
from transformers import Siglip2VisionConfig

import siglip_fast
from siglip_fast.models import rotary
from siglip_fast.running import graphs

# Calls of a budget of 48 rows and four images, and what the smallest of 16, 48 and 80 is that holds them
NAFLEX = {
    "mixed": (
        [(3, 5), (4, 4), (1, 1), (1, 6)],
        16,
        48,
    ),  # 15 + 16 + 1 + 6 patches, and a padded row each but for the full one
    "one that fills it": ([(4, 4)], 16, 16),
    "one more row than patches": ([(4, 4)], 17, 48),
    "of one size": ([(2, 3)] * 3, 6, 48),
    "much padding": ([(1, 1), (1, 2)], 300, 16),
    "too many images": ([(1, 1)] * 5, 1, None),
    "too many rows": ([(9, 9)], 81, None),
}
QWEN = {
    "mixed": ([(1, 4, 6), (1, 2, 2), (2, 2, 4)], 48),
    "one that fills it": ([(1, 4, 4)], 16),
    "long": ([(1, 2, 30)], 80),
    "too many frames": ([(5, 2, 2)], None),
    "too many rows": ([(1, 2, 42)], None),
}
BUDGETS = [16, 80, 46]  # 46 has no whole squares of 2 by 2: for Qwen3-VL it is 48


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    return recorded.install(monkeypatch)


@pytest.fixture
def naflex():
    stock = stock_model(Siglip2VisionConfig(**zoo.SIGLIP2_VISION), "sdpa", "Siglip2VisionModel").to(DEVICE)
    return stock, drop_in(stock, backend="triton", strict=True).to(DEVICE)


@pytest.fixture
def qwen():
    stock = qwen3_vl_tower().to(DEVICE)
    return stock, siglip_fast.apply_to(copy.deepcopy(stock), backend="triton", strict=True)


def naflex_call(shapes, rows, **kwargs):
    return {name: value.to(DEVICE) for name, value in naflex_inputs(shapes, rows).items()} | kwargs


def qwen_call(grids, **kwargs):
    rows, grid_thw = qwen3_vl_inputs(grids)
    return {"hidden_states": rows.to(DEVICE), "grid_thw": grid_thw.to(DEVICE)} | kwargs


@torch.no_grad()
def assert_as_stock(models, call):
    stock, ours = models
    expected, actual = stock(**call), ours(**call)
    assert list(actual) == list(expected)
    assert zoo.error(zoo.tensors(actual), zoo.tensors(expected)) < 1e-4
    assert all(tensor.is_contiguous() for tensor in zoo.tensors(actual).values())


def expected_replays(budget, multiple=1):
    return [] if budget is None else [-(-budget // multiple) * multiple]


@torch.no_grad()
def test_naflex_calls(naflex, recorder):
    """One after the other: nothing that one left in a graph shows in the next."""
    naflex[1].capture(token_budgets=[16, 80, 48], max_images=4)
    assert recorder.recorded == 3
    naflex[1](**naflex_call([(4, 9)], 36) | {"pixel_values": torch.full((1, 36, 192), float("inf")).to(DEVICE)})
    for shapes, rows, budget in NAFLEX.values():
        recorder.replayed.clear()
        assert_as_stock(naflex, naflex_call(shapes, rows))
        assert recorder.replayed == expected_replays(budget)


@torch.no_grad()
def test_qwen3_vl_calls(qwen, recorder):
    qwen[1].capture(token_budgets=BUDGETS, max_images=4)
    qwen[1](**qwen_call([(1, 6, 8)]) | {"hidden_states": torch.full((48, 96), float("inf")).to(DEVICE)})
    for grids, budget in QWEN.values():
        recorder.replayed.clear()
        assert_as_stock(qwen, qwen_call(grids))
        assert recorder.replayed == expected_replays(budget)


def test_outputs_survive_later_replays(naflex, qwen):
    of_naflex = naflex_call([(3, 5), (2, 2)], 16), naflex_call([(4, 4)], 16)
    of_qwen = qwen_call([(1, 4, 6)]), qwen_call([(1, 2, 2)])
    for (_, model), (first, second) in ((naflex, of_naflex), (qwen, of_qwen)):
        model.capture([48], max_images=3)
        with torch.no_grad():
            kept = zoo.tensors(model(**first))
            before = {name: tensor.clone() for name, tensor in kept.items()}
            model(**second)
            assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
            for tensor in kept.values():  # nor do they share memory with what a replay writes
                tensor.zero_()
            again = zoo.tensors(model(**first))
        assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_batch_invariant(recorder):
    """To the bit: alone without a graph, and beside others in one."""
    stock = stock_model(Siglip2VisionConfig(**zoo.SIGLIP2_VISION), "sdpa", "Siglip2VisionModel")
    model = drop_in(stock, backend="triton", batch_invariant=True).to(DEVICE)
    call = naflex_call([(3, 5), (4, 4), (1, 6)], 16)
    alone = [model(**{name: value[i : i + 1] for name, value in call.items()}) for i in range(3)]
    model.capture([64], max_images=4)
    together = model(**call)
    assert recorder.replayed == [64]
    for name in ("last_hidden_state", "pooler_output"):
        assert all(torch.equal(together[name][i], alone[i][name][0]) for i in range(3))


def test_pixels_of_another_dtype_are_cast(naflex, recorder):
    naflex[1].capture([48], max_images=3)
    call = naflex_call([(3, 5), (2, 2)], 16)
    with torch.no_grad():
        expected = naflex[0](**call | {"pixel_values": call["pixel_values"].half().float()})
        actual = naflex[1](**call | {"pixel_values": call["pixel_values"].half()})
    assert zoo.error(zoo.tensors(actual), zoo.tensors(expected)) < 1e-4
    assert recorder.replayed == [48]


def test_hidden_states_are_launched(qwen, recorder):
    qwen[1].capture([48], max_images=3)
    assert_as_stock(qwen, qwen_call([(1, 4, 6)], output_hidden_states=True))
    assert recorder.replayed == []


def test_weight_edits_are_seen(qwen, recorder):
    stock, model = qwen
    model.capture([48], max_images=3)
    for tower in qwen:
        with torch.no_grad():
            tower.blocks[1].mlp.linear_fc1.weight.mul_(1.5)
            tower.pos_embed.weight.add_(0.5)
    assert_as_stock(qwen, qwen_call([(1, 4, 6)]))
    assert (recorder.recorded, recorder.replayed) == (2, [48])


def test_a_longer_image_than_the_table_of_the_rotation(qwen, recorder, monkeypatch):
    """The table is made anew, and the graphs read the old one."""
    made = rotary.RotaryTable._make
    monkeypatch.setattr(rotary.RotaryTable, "_make", lambda self, side: made(self, min(side, 16)))
    qwen[1].capture([80], max_images=1)
    monkeypatch.undo()
    assert_as_stock(qwen, qwen_call([(1, 2, 40)]))
    assert_as_stock(qwen, qwen_call([(1, 4, 6)]))
    assert recorder.replayed == []


def test_sizes_that_are_new_move_the_table_of_positions(naflex):
    naflex[1].capture([48], max_images=3)
    for shapes in ([(3, 5)], [(2, 7)], [(3, 5), (5, 2)]):
        assert_as_stock(naflex, naflex_call(shapes, 16))


def test_released_by_to_and_an_empty_capture(naflex, recorder):
    model, call = naflex[1], naflex_call([(3, 5)], 16)
    for release in (lambda: model.to(DEVICE), lambda: model.capture([])):
        model.capture([48], max_images=3)
        graph = weakref.ref(model._derived[None].graphs)
        release()
        gc.collect()
        assert graph() is None
        recorder.replayed.clear()
        assert_as_stock(naflex, call)
        assert recorder.replayed == []


@pytest.mark.parametrize(
    "arguments, name", [(([0],), "token_budgets"), ((["8"],), "token_budgets"), (([8], 0), "max_images")]
)
def test_wrong_arguments(naflex, arguments, name):
    with pytest.raises(ValueError, match=f"{name}: expected positive integers"):
        naflex[1].capture(*arguments)


def test_what_does_not_apply(naflex):
    naflex[1]._tower.encoder.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="the fused forward does not apply: a .* has forward hooks"):
        naflex[1].capture([48])


def test_other_backends(naflex):
    with pytest.raises(RuntimeError, match="need the triton backend, got 'torch'"):
        drop_in(naflex[0], backend="torch").to(DEVICE).capture([48], max_images=3)


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_on_a_cpu(naflex, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device"):
        naflex[1].capture([48], max_images=3)
    assert graphs.Recorder is not recorded.FakeRecorder
