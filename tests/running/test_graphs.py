"""Captured forwards of images of one size (tests/helpers/recorded.py is what stands for CUDA graphs here)."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import recorded
import torch
from device import DEVICE
from models import TINY, drop_in, stock_model
from transformers import SiglipVisionConfig

from siglip_fast.models.source import Source
from siglip_fast.running import graphs


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    return recorded.install(monkeypatch)


@pytest.fixture
def stock():
    return stock_model(SiglipVisionConfig(**TINY)).to(DEVICE)


@pytest.fixture
def model(stock):
    return drop_in(stock).to(DEVICE)


def pixels(batch_size: int, size: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 3, size, size, generator=generator).to(DEVICE)


@torch.no_grad()
def assert_equal(model, stock, pixel_values, **kwargs):
    expected, actual = stock(pixel_values, **kwargs), model(pixel_values, **kwargs)
    for key in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(actual[key], expected[key], atol=1e-4, rtol=0)
        assert actual[key].is_contiguous()


@pytest.mark.parametrize("batch_size, runs_on", [(1, 1), (2, None), (3, 4), (4, 4), (5, 8), (8, 8), (9, None)])
def test_the_graph_of_a_batch(model, stock, recorder, batch_size, runs_on):
    """The next larger one; none of twice the size."""
    model.capture([1, 4, 8])
    assert_equal(model, stock, pixels(batch_size))
    assert recorder.replayed == ([] if runs_on is None else [runs_on])


def test_outputs_survive_later_replays(model):
    model.capture([2])
    with torch.no_grad():
        first = model(pixels(2, seed=1))
        before = copy.deepcopy(first)
        second = model(pixels(2, seed=2))
        torch.testing.assert_close(first[:], before[:], atol=0, rtol=0)
        assert not torch.equal(first.pooler_output, second.pooler_output)
        first.last_hidden_state.zero_()  # nor do they share memory with what a replay writes
        torch.testing.assert_close(model(pixels(2, seed=1))[:], before[:], atol=0, rtol=0)


def test_a_smaller_batch_after_a_larger_one(model, stock):
    """What the larger one left in the graph's input must not show."""
    model.capture([4])
    with torch.no_grad():
        model(pixels(4, seed=5) * float("inf"))
    assert_equal(model, stock, pixels(3))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.no_grad()
def test_batch_invariant_in_a_larger_graph(stock, recorder, backend):
    """To the bit: alone without a graph, and padded into one of another size, beside whatever images."""
    model = drop_in(stock, backend=backend, batch_invariant=True).to(DEVICE)
    images = pixels(6)
    alone = [model(images[i : i + 1]) for i in range(6)]
    model.capture([1, 4, 8])
    model(pixels(8, seed=1))
    for batch in ([0], [5, 1, 2], [3, 4, 0, 1, 2]):
        output = model(images[batch])
        for key in ("last_hidden_state", "pooler_output"):
            assert all(torch.equal(row, alone[i][key][0]) for i, row in zip(batch, output[key], strict=True))
    assert recorder.replayed == [8, 1, 4, 8]


def test_weight_edits_are_seen(model, stock, recorder):
    model.capture([2])
    assert recorder.recorded == 1
    for net in (model, stock):
        tower = getattr(net, "vision_model", net)
        with torch.no_grad():
            tower.encoder.layers[0].self_attn.q_proj.weight.mul_(3)  # goes into a copy
            tower.encoder.layers[1].mlp.fc2.weight.mul_(0.5)  # is read in place
            tower.embeddings.position_embedding.weight.add_(1)
    assert_equal(model, stock, pixels(2))
    assert recorder.recorded == 2 and recorder.replayed == [2]
    assert_equal(model, stock, pixels(2, seed=3))
    assert recorder.recorded == 2


def test_training_drops_them_and_evaluation_records_again(model, stock, recorder):
    model.capture([2])
    model.train()
    assert not model._derived
    loss = model(pixels(2)).pooler_output.sum()
    loss.backward()
    model.eval()
    assert_equal(model, stock, pixels(2))
    assert recorder.recorded == 2 and recorder.replayed == [2]


def test_released_by_to_copies_pickles_and_an_empty_capture(model, recorder):
    model.capture([2])
    graph = weakref.ref(model._derived[None].graphs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._derived and other._to_capture is None
    model.to(torch.float64).to(torch.float32)
    gc.collect()
    assert graph() is None
    with torch.no_grad():
        model(pixels(2))
    assert recorder.replayed == [] and recorder.recorded == 1
    model.capture([2])
    model.capture([])
    with torch.no_grad():
        model(pixels(2))
    assert recorder.replayed == []


def test_another_size_runs_without_a_graph(model, stock, recorder):
    model.capture([2])
    assert_equal(model, stock, pixels(2, size=32), interpolate_pos_encoding=True)
    assert recorder.replayed == []
    with torch.no_grad(), pytest.raises(ValueError, match="32×32 pixels"):
        model(pixels(2, size=32))


@pytest.mark.parametrize("shape", [(), (3, 24, 24), (2, 1, 24, 24)])
def test_wrong_shapes_are_told_as_without_a_graph(model, shape):
    model.capture([2])
    with torch.no_grad(), pytest.raises(ValueError, match="pixel_values: expected shape"):
        model(torch.zeros(shape, device=DEVICE))


def test_captured_at_another_size(model, stock, recorder):
    model.capture([2], image_size=32)
    assert_equal(model, stock, pixels(2, size=32), interpolate_pos_encoding=True)
    assert recorder.replayed == [2]
    with torch.no_grad(), pytest.raises(ValueError, match="32×32 pixels"):
        model(pixels(2, size=32))  # as without a graph


def test_other_dtypes_and_strides_are_copied_in(model, stock, recorder):
    model.capture([2])
    channels_last = pixels(2).to(memory_format=torch.channels_last)
    assert_equal(model, stock, channels_last)
    with torch.no_grad():
        expected = model(pixels(2).double().float())
        torch.testing.assert_close(model(pixels(2).double())[:], expected[:])
    assert recorder.replayed == [2, 2, 2]


def test_inference_mode_and_no_grad_can_be_mixed(model, stock):
    with torch.inference_mode():
        model.capture([2])
    assert_equal(model, stock, pixels(2))
    with torch.inference_mode():
        assert model(pixels(2)).pooler_output.is_inference()
    assert_equal(model, stock, pixels(2))


def test_delegation_goes_past_them(model, recorder):
    model.capture([2])
    model(pixels(2)).pooler_output.sum().backward()
    with torch.no_grad():
        assert model(pixels(2), output_hidden_states=True).hidden_states is not None
    assert recorder.replayed == []


def test_two_threads(model, stock):
    model.capture([1, 2])
    with torch.no_grad():
        expected = [stock(pixels(2, seed=seed)).pooler_output for seed in range(8)]
    failures = []

    def work(seed):
        with torch.no_grad():
            for _ in range(5):
                if not torch.allclose(model(pixels(2, seed=seed)).pooler_output, expected[seed], atol=1e-4):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("change", ["weights", "capture"])
def test_threads_while_something_changes(model, stock, change):
    """Each records, or waits for who does, or launches; none fails."""
    model.capture([2])
    failures = []

    def work():
        with torch.no_grad():
            for _ in range(10):
                try:
                    model(pixels(2))
                except Exception as error:
                    failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        if change == "capture":
            model.capture([2])
        else:
            with torch.no_grad():
                getattr(model, "vision_model", model).encoder.layers[0].mlp.fc1.weight.mul_(1.0)
    for thread in threads:
        thread.join()
    assert failures == []
    assert_equal(model, stock, pixels(2))


def test_recording_again_fails(model, stock, recorder, monkeypatch, caplog):
    """The forward goes on without graphs."""
    model.capture([2])
    with torch.no_grad():
        getattr(model, "vision_model", model).encoder.layers[0].mlp.fc1.weight.mul_(1.0)

    def fail(self, run):
        raise torch.OutOfMemoryError("of 80 GB")

    monkeypatch.setattr(graphs.Recorder, "record", fail)
    with caplog.at_level("WARNING"):
        assert_equal(model, stock, pixels(2))
        assert_equal(model, stock, pixels(2))
    assert caplog.text.count("recording CUDA graphs again failed") == 1 and "of 80 GB" in caplog.text
    assert recorder.replayed == []


def test_pickled_before_there_were_graphs(model):
    state = model.__getstate__()
    assert not {"_derived", "_to_capture", "_handle"} & set(state)
    old = type(model).__new__(type(model))
    old.__setstate__(state)
    with torch.no_grad():
        torch.testing.assert_close(old(pixels(2))[:], model(pixels(2))[:])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0],), "batch_sizes: expected positive integers, got 0"),
        (([2.0],), "batch_sizes: expected positive integers, got 2.0"),
        (([1], -24), "image_size: expected positive integers, got -24"),
    ],
)
def test_wrong_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.capture(*arguments)


def test_what_does_not_apply(model):
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="capture: the fused forward does not apply: .*'eager'"):
        model.capture([1])
    assert model._to_capture is None


def test_a_failed_capture_leaves_the_model_as_it_was(model, stock, recorder, monkeypatch):
    def fail(self, run):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs.Recorder, "record", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.capture([2])
    assert_equal(model, stock, pixels(2))


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU there are graphs")
def test_on_a_cpu(model, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device; the model is on cpu"):
        model.capture([1])
    assert model._to_capture is None


class TestInsideAnotherCapture:
    @pytest.fixture(autouse=True)
    def capturing(self, monkeypatch):
        if DEVICE != "cpu":
            pytest.skip("pretends to capture; test_outer_capture really does")
        self.active = False
        for home in ("base", "captured", "tuned"):
            monkeypatch.setattr(f"siglip_fast.models.{home}.is_capturing", lambda tensor: self.active)

    def test_kernels_go_into_the_outer_one(self, model, stock, recorder):
        model.capture([2])
        self.active = True
        assert_equal(model, stock, pixels(2))
        assert recorder.replayed == [] and recorder.recorded == 1

    def test_nothing_is_derived_in_there(self, model, stock):
        self.active = True
        assert "before the weights were derived" in model.why_not(pixels(2))
        assert_equal(model, stock, pixels(2))
        assert not model._derived or model._derived[None].weights is None
        self.active = False
        assert_equal(model, stock, pixels(2))
        self.active = True
        assert model.why_not(pixels(2)) is None or "gradients" in model.why_not(pixels(2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_a_second_gpu(model, stock):
    model.capture([2])
    other, other_stock = copy.deepcopy(model).to("cuda:1"), copy.deepcopy(stock).to("cuda:1")
    other.capture([2])
    for seed in (1, 2):
        assert_equal(other, other_stock, pixels(2, seed=seed).to("cuda:1"))
        assert_equal(model, stock, pixels(2, seed=seed))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_outer_capture(model, stock):
    model.capture([2])
    static, side = pixels(2), torch.cuda.Stream()
    with torch.cuda.stream(side):
        model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(static)
    static.copy_(pixels(2, seed=7))
    graph.replay()
    torch.testing.assert_close(output[:], stock(pixels(2, seed=7))[:], atol=1e-4, rtol=0)


def test_a_replay_begins_before_the_weights_are_checked(model, recorder, monkeypatch):
    model.capture([1])
    pixels = torch.randn(1, 3, 24, 24).to(DEVICE)
    with torch.no_grad():
        model(pixels)
        recorder.replayed.clear()
        begun = []
        monkeypatch.setattr(Source, "is_unchanged", lambda self: begun.append(len(recorder.replayed)) or True)
        model(pixels)
    assert begun == [1] and recorder.replayed == [1]


def test_a_replay_on_what_was_edited_is_dropped(model, recorder):
    model.capture([1])
    pixels = torch.randn(1, 3, 24, 24).to(DEVICE)
    with torch.no_grad():
        before = model(pixels).pooler_output
        next(model.parameters()).mul_(2)
        recorder.replayed.clear()
        after = model(pixels).pooler_output
        assert recorder.replayed == [1, 1]  # the old graph's, dropped, and the new one's
        model._forget_graphs()
        torch.testing.assert_close(after, model(pixels).pooler_output, rtol=0, atol=0)
    assert not torch.equal(before, after)


def test_nothing_is_replayed_in_vain_again_and_again(model, recorder):
    model.capture([1])
    pixels = torch.randn(1, 3, 24, 24).to(DEVICE)
    seen = []
    with torch.no_grad():
        model(pixels)
        layer = model.get_submodule(next(name for name, m in model.named_modules() if name.endswith("fc1")))
        layer.register_forward_hook(lambda *_: seen.append(1))
        recorder.replayed.clear()
        for _ in range(3):
            model(pixels)
    assert recorder.replayed == [1] and len(seen) >= 3
