"""Launch plans give the bits of the forward that they were made from, whatever memory they run in, and go with its weights."""

import gc
import threading
import weakref

import pytest
import torch
import triton
from interpreted import Chosen, Compiled, assert_freed_at_once, in_place_of_a_gpu, vendors
from models import TINY, drop_in, stock_model
from torch.utils._pytree import tree_leaves
from transformers import SiglipVisionConfig

from siglip_fast.backends import triton as triton_backend
from siglip_fast.backends.choice import Choice
from siglip_fast.running import plans
from siglip_fast.running.recorder import ALIGNMENT, Recorder, arrange


@pytest.fixture(autouse=True)
def interpreted(request):
    with in_place_of_a_gpu(request.function is test_on_a_gpu):
        yield


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: real kernels, real addresses, streams")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype):
    model = make_model(dtype, num_hidden_layers=2).cuda()
    streams, kept = [torch.cuda.Stream() for _ in range(3)], []
    for turn in range(12):
        pixels = images(1 + turn % 4, dtype=dtype).cuda() + turn
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[turn % 3]), torch.no_grad():
            kept.append((model(pixels), pixels))
    torch.cuda.synchronize()
    assert all(plan_of(model)) and len(plan_of(model)) == 4
    for output, pixels in kept:
        assert torch.equal(output.last_hidden_state, unplanned(model, pixels).last_hidden_state)


@pytest.fixture
def model():
    return make_model()


def make_model(dtype=torch.float32, batch_invariant=False, **changes):
    small = TINY | {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    stock = stock_model(SiglipVisionConfig(**small | changes)).to(dtype)
    return drop_in(stock, backend="triton", strict=True, batch_invariant=batch_invariant)


def images(count, size=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, size, size, generator=generator).to(dtype)


def unplanned(model, pixels, **kwargs):
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(plans, "applies", lambda tensor: False)
        return model(pixels, **kwargs)


def check(model, pixels, launched=True, **kwargs):
    """Three forwards on different images, each equal to what is launched operation by operation."""
    kept = []
    for shift in range(3):
        Compiled.launched = 0
        with torch.no_grad():
            output = model(pixels + shift, **kwargs)
        assert (Compiled.launched > 0) == (launched and shift > 0)
        kept.append((output, unplanned(model, pixels + shift, **kwargs)))
    for output, expected in kept:  # afterwards: a later forward must not write into an earlier one's output
        for tensor, wanted in zip(tree_leaves(dict(output)), tree_leaves(dict(expected)), strict=True):
            assert tensor is wanted or torch.equal(tensor, wanted)  # None where it was not asked for


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bits(count, dtype):
    check(make_model(dtype), images(count, dtype=dtype))


def test_outputs_that_are_kept(model, monkeypatch):
    """As torch's CUDA allocator has it: the piece of memory lies where it lay, the outputs do not, since the last are kept."""
    pieces, empty = {}, torch.empty

    def allocate(*shape, dtype=None, **options):
        if dtype != torch.uint8:
            return empty(*shape, dtype=dtype, **options)
        return pieces.setdefault(shape, empty(*shape, dtype=dtype, **options))

    monkeypatch.setattr(torch, "empty", allocate)
    check(model, images(2))
    assert len(pieces) == 1


def test_batch_sizes_in_turns(model):
    for count in (1, 3, 1, 2, 3):
        with torch.no_grad():
            output = model(images(count))
        assert torch.equal(output.pooler_output, unplanned(model, images(count)).pooler_output)


def test_without_head():
    check(make_model(vision_use_head=False), images(2))


def test_interpolated_positions(model):
    check(model, images(2, 32), interpolate_pos_encoding=True)


PIXELS = {
    "transposed": lambda: images(2).permute(0, 1, 3, 2),
    "every second": lambda: images(4)[::2],
    "of another dtype": lambda: images(2).half(),
    "at an odd address": lambda: torch.cat([torch.zeros(1), images(2).flatten()])[1:].view(2, 3, 24, 24),
    "negated": lambda: torch._neg_view(images(2)),
}


@pytest.mark.parametrize("pixels", PIXELS)
def test_pixels(model, pixels):
    pixels = PIXELS[pixels]()
    expected = unplanned(model, pixels)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(pixels).last_hidden_state, expected.last_hidden_state)


def test_batch_invariant():
    """Which lays out pixels anew where it has to: a call, in the middle of a plan."""
    model, alone = make_model(batch_invariant=True), PIXELS["transposed"]()
    check(model, alone)
    with torch.no_grad():
        rows = [model(image[None]).pooler_output for image in alone]
        assert torch.equal(torch.cat(rows), model(alone).pooler_output)


def test_kernels_are_told_apart_by_the_alignment_of_pixels(model):
    """The stand-in for a compiled kernel refuses another one."""
    odd = PIXELS["at an odd address"]()
    with torch.no_grad():
        for pixels in (odd.clone(), odd, odd.clone(), odd):
            assert torch.equal(model(pixels).pooler_output, unplanned(model, pixels).pooler_output)
    assert len([plan for plan in plan_of(model) if plan]) == 2


def test_bytes(model):
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        outputs = [model.forward_uint8(pixels + shift) for shift in range(3)]
    assert Compiled.launched
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(plans, "applies", lambda tensor: False)
        for shift, output in enumerate(outputs):
            assert torch.equal(output.pooler_output, model.forward_uint8(pixels + shift).pooler_output)


SPLIT = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8, "SPLIT_K": 2, "num_warps": 4, "num_stages": 3}
BODY = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8, "num_warps": 4, "num_stages": 3}


@pytest.mark.parametrize("config", [SPLIT, BODY | {"TAIL": BODY | {"BLOCK_N": 128}}, BODY | {"PERSISTENT": True}])
def test_other_configurations(config, monkeypatch):
    chosen = Chosen(linear_residual=Choice("triton", config))
    monkeypatch.setattr("siglip_fast.models.weights._selection_on", lambda device: chosen)
    check(make_model(), images(5))


@pytest.mark.parametrize("names", [["attention"], ["linear_residual"], ["layernorm"], [*triton_backend.RUN]])
def test_vendors_routes(names, monkeypatch):
    monkeypatch.setattr("siglip_fast.models.weights._selection_on", lambda device: vendors(*names))
    check(make_model(), images(2), launched=len(names) == 1)


def test_a_plan_of_calls_alone_is_one(monkeypatch):
    monkeypatch.setattr("siglip_fast.models.weights._selection_on", lambda device: vendors(*triton_backend.RUN))
    model = make_model()
    with torch.no_grad():
        model(images(2))
    assert all(plan_of(model))


def plan_of(model):
    return [*model._current().kept(plans.Plans)._plans.values()]


@pytest.mark.parametrize("asked", [True, [0], [-1, 1]])
def test_hidden_states(asked):
    """One after the other: each that is asked for is an output, and plans are told apart by it."""
    model = make_model(num_hidden_layers=2)
    check(model, images(2), output_hidden_states=asked)
    check(model, images(2))


def test_hidden_states_asked_for_in_turns(model):
    for asked in (True, [1], [0], True, False, [1], [0]):
        with torch.no_grad():
            output = model(images(2), output_hidden_states=asked)
        expected = unplanned(model, images(2), output_hidden_states=asked)
        assert [*map(type, tree_leaves(dict(output)))] == [*map(type, tree_leaves(dict(expected)))]
        for tensor, wanted in zip(tree_leaves(dict(output)), tree_leaves(dict(expected)), strict=True):
            assert tensor is wanted or torch.equal(tensor, wanted)


def test_autocast(model):
    """The cast before the pooling head is a step of the plan."""
    with torch.autocast("cpu", torch.bfloat16):
        check(model, images(2))


def test_calls_run_as_at_first(monkeypatch):
    """Inside of autocast a forward runs its operations with autocast off, and so does a plan."""
    monkeypatch.setattr("siglip_fast.models.weights._selection_on", lambda device: vendors("attention"))
    modes, run = [], triton_backend.RUN["attention"]

    def watched(*args):
        modes.append(torch.is_autocast_enabled("cpu"))
        return run(*args)

    monkeypatch.setitem(triton_backend.RUN, "attention", watched)
    model = make_model(vision_use_head=False)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(3):
            model(images(2))
    assert Compiled.launched and modes == 3 * [False]


def test_results_of_calls_go_when_they_were_read(monkeypatch):
    """As where operations run one by one; else a deep model would keep those of all layers."""
    monkeypatch.setattr("siglip_fast.models.weights._selection_on", lambda device: vendors("layernorm_linear"))
    alive, counts = weakref.WeakSet(), []
    run = triton_backend.RUN["layernorm_linear"]

    def counted(*args):
        result = run(*args)
        alive.add(result)
        counts.append(len(alive))
        return result

    monkeypatch.setitem(triton_backend.RUN, "layernorm_linear", counted)
    model = make_model(num_hidden_layers=4, vision_use_head=False)
    most = []
    with torch.no_grad():
        for _ in range(3):
            counts.clear()
            model(images(1))
            assert len(counts) >= 8  # two a layer
            most.append(max(counts))
    assert most[1] == most[2] <= most[0] < 8


def test_edits_are_seen(model):
    check(model, images(2))
    with torch.no_grad():
        model.get_parameter("encoder.layers.0.mlp.fc2.weight" if not hasattr(model, "vision_model") else
                            "vision_model.encoder.layers.0.mlp.fc2.weight").mul_(1.5)  # fmt: skip
    check(model, images(2))
    model.half()
    check(model, images(2).half())


def test_nothing_is_kept_of_dropped_weights(model):
    check(model, images(2))
    assert_freed_at_once(model)


def test_no_memory_between_forwards(model):
    check(model, images(2))
    gc.collect()
    (plan,) = [plan for plan in plan_of(model) if plan]
    held = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype == torch.uint8]
    assert not [t for t in held if t.numel() == plan.workspace]


def test_the_workspace_is_no_larger_than_needed(model):
    with torch.no_grad():
        model(images(5))
    (plan,) = plan_of(model)
    rows, D, F = 5 * 9, 32, 48
    # At most the stream and its successor, what lies between them, moments, and what alignment takes.
    assert plan.workspace <= 4 * rows * (2 * D + max(3 * D + D, F)) + 2 * 8 * rows + 8 * ALIGNMENT


def test_profilers_see_each_launch(model, monkeypatch):
    check(model, images(2))
    Compiled.launched = 0
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    with torch.no_grad():
        model(images(2))
    assert not Compiled.launched


def test_threads(model):
    expected = {count: unplanned(model, images(count)) for count in (1, 2, 3)}
    right = []

    def work(count):
        for _ in range(4):
            with torch.no_grad():
                right.append(torch.equal(model(images(count)).pooler_output, expected[count].pooler_output))

    threads = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3, 1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == 24 * [True]


def test_so_many_are_kept(model, monkeypatch):
    monkeypatch.setattr(plans, "MOST", 2)
    for count in (1, 2, 3):
        check(model, images(count))
    assert len(plan_of(model)) <= 2


class TestRecorder:
    def test_memory_that_no_operation_wrote(self):
        recorder = Recorder([torch.zeros(2)], [])
        recorder.launched("compiled", (1,), {"x": torch.zeros(3)})
        assert "comes from no operation" in recorder.reason

    def test_an_input_as_an_output(self):
        pixels = torch.zeros(2)
        recorder = Recorder([pixels], [])
        assert recorder.output(pixels) is None and "not a buffer of its own" in recorder.reason

    def test_a_part_of_a_buffer_as_an_output(self):
        recorder, made = Recorder([], []), torch.zeros(4)
        recorder.allocated(made)
        assert recorder.output(made[:2]) is None and recorder.reason

    def test_inputs_that_share_memory(self):
        x = torch.zeros(4)
        assert "shares memory" in Recorder([x[:2], x[2:]], []).reason

    def test_memory_that_is_used_again_is_another_buffer(self):
        """As torch's allocator hands out what was freed."""
        recorder = Recorder([], [])
        memory = bytearray(64)
        for _ in range(2):
            tensor = torch.frombuffer(memory, dtype=torch.float32)
            recorder.allocated(tensor)
            del tensor
        assert recorder.reason is None and len(recorder.buffers) == 2


def test_buffers_in_use_at_once_do_not_overlap():
    generator = torch.Generator().manual_seed(0)

    def random(most):
        return int(torch.randint(most, (), generator=generator))

    for _ in range(200):
        recorder = Recorder([], [])
        for _ in range(random(20)):
            recorder.allocated(torch.zeros(random(3000), dtype=torch.uint8))
            buffer = recorder.buffers[-1]
            buffer.first, buffer.last = sorted([random(10), random(10)])
            buffer.own = random(4) > 0
        offsets, size = arrange(recorder.buffers)
        assert set(offsets) == {i for i, buffer in enumerate(recorder.buffers) if buffer.own}
        for i, a in offsets.items():
            own = recorder.buffers[i]
            assert a % ALIGNMENT == 0 and a + own.size <= size
            for j, b in offsets.items():
                other = recorder.buffers[j]
                if i < j and own.first <= other.last and other.first <= own.last:
                    assert a + own.size <= b or b + other.size <= a
