"""Under torch.compile and torch.export: the tower's operation where it applies, stock's code elsewhere, never stale."""

import copy
import gc
import pickle

import pytest
import torch
import transformers
from models import TINY, drop_in, stock_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import SiglipVisionConfig

from siglip_fast import SiglipVisionModel


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def stock(device):
    return stock_model(SiglipVisionConfig(**TINY), "sdpa").to(device)


@pytest.fixture
def pixels(device):
    torch.manual_seed(1)
    return torch.randn(2, 3, 24, 24).to(device)


def tower(model):
    return getattr(model, "vision_model", model)


def weight(model):
    return tower(model).encoder.layers[0].mlp.fc1.weight


def recorder(backend="eager"):
    return CompileCounterWithBackend(backend)


def has_operation(graph_module) -> bool:
    return any("vision_tower" in str(node.target) for node in graph_module.graph.nodes)


def assert_close(actual, expected):
    torch.testing.assert_close(actual[:], expected[:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_one_operation_without_a_break(stock, pixels, backend, device, grad_mode):
    stock, ours, pixels = stock.to(device), drop_in(stock, backend=backend).to(device), pixels.to(device)
    graphs = recorder("inductor")
    with grad_mode():
        compiled = torch.compile(ours, fullgraph=True, backend=graphs)
        for _ in range(2):
            output = compiled(pixels)
            assert_close(output, stock(pixels))
            assert torch.equal(output.last_hidden_state, ours(pixels).last_hidden_state)
    (graph,) = graphs.graphs
    assert has_operation(graph)


@torch.no_grad()
def test_batch_invariant(stock):
    """To the bit, compiled or not."""
    ours, graphs = drop_in(stock, backend="torch", batch_invariant=True), recorder()
    compiled, images = torch.compile(ours, fullgraph=True, backend=graphs, dynamic=True), torch.randn(5, 3, 24, 24)
    for i, row in enumerate(compiled(images.to(ours.device)).pooler_output):
        assert torch.equal(row, ours(images[i : i + 1].to(ours.device)).pooler_output[0])
    assert has_operation(graphs.graphs[0])


@torch.no_grad()
def test_batch_sizes_share_a_graph(stock, pixels):
    ours, graphs = drop_in(stock), recorder("inductor")
    compiled = torch.compile(ours, fullgraph=True, backend=graphs, dynamic=True)
    for images in (pixels, *(torch.randn(b, 3, 24, 24).to(pixels.device) for b in (3, 7))):
        assert_close(compiled(images), stock(images))
    assert graphs.frame_count == 1


@torch.no_grad()
def test_marked_dynamic(stock, pixels):
    ours, graphs = drop_in(stock), recorder()
    torch._dynamo.mark_dynamic(pixels, 0)
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    for images in (pixels, torch.randn(5, 3, 24, 24).to(pixels.device)):
        assert_close(compiled(images), stock(images))
    assert graphs.frame_count == 1


@torch.no_grad()
def test_interpolated_positions_of_any_size(stock):
    ours, graphs = drop_in(stock), recorder()
    compiled = torch.compile(ours, fullgraph=True, backend=graphs, dynamic=True)
    for height, width in ((40, 24), (33, 50)):
        images = torch.randn(2, 3, height, width, device=next(stock.parameters()).device)
        expected = stock(images, interpolate_pos_encoding=True)
        assert_close(compiled(images, interpolate_pos_encoding=True), expected)
    assert graphs.frame_count == 1


@torch.no_grad()
def test_without_head(pixels):
    stock = stock_model(SiglipVisionConfig(**TINY, vision_use_head=False), "sdpa").to(pixels.device)
    output = torch.compile(drop_in(stock), fullgraph=True, backend="eager")(pixels)
    assert output.pooler_output is None
    torch.testing.assert_close(output[0], stock(pixels)[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_tuple_when_asked(stock, pixels):
    output = torch.compile(drop_in(stock), fullgraph=True, backend="eager")(pixels, return_dict=False)
    assert type(output) is tuple
    assert_close(output, stock(pixels))


@torch.no_grad()
def test_many_models_share_a_graph_and_keep_their_weights(stock, pixels):
    """More of them than torch.compile would compile one function for."""
    graphs = recorder()
    for factor in range(10):
        ours, theirs = drop_in(stock), copy.deepcopy(stock)
        weight(ours).mul_(factor), weight(theirs).mul_(factor)
        assert_close(torch.compile(ours, fullgraph=True, backend=graphs)(pixels), theirs(pixels))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies_have_a_handle_of_their_own(stock, pixels, make_copy):
    ours = drop_in(stock)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    expected = compiled(pixels)
    copied = make_copy(ours)
    tower(copied).post_layernorm.weight.zero_()
    output = torch.compile(copied, fullgraph=True, backend="eager")(pixels)
    bias = tower(copied).post_layernorm.bias.expand(2, 9, 64)
    torch.testing.assert_close(output[0], bias, atol=1e-6, rtol=0)
    assert_close(compiled(pixels), expected)


@torch.no_grad()
def test_a_copy_of_the_compiled_model(stock, pixels):
    compiled = torch.compile(drop_in(stock), fullgraph=True, backend="eager")
    expected = compiled(pixels)
    copied = copy.deepcopy(compiled)
    tower(copied._orig_mod).post_layernorm.weight.zero_()
    assert not torch.equal(copied(pixels)[0], expected[0])
    assert_close(compiled(pixels), expected)


def edit_in_place(model):
    weight(model).mul_(2)


def edit_by_index(model):
    """Inductor writes this one where the weight lies, and passes the operation that memory."""
    weight(model)[torch.tensor([1, 2])] = 3.0


def load_other_weights(model):
    torch.manual_seed(5)
    model.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()})


@pytest.mark.parametrize("change", [edit_in_place, load_other_weights])
@torch.no_grad()
def test_weights_changed_between_two_runs(stock, pixels, change):
    ours = drop_in(stock)
    compiled = torch.compile(ours, fullgraph=True, backend="inductor")
    compiled(pixels)
    change(stock), change(ours)
    for _ in range(2):
        assert_close(compiled(pixels), stock(pixels))
    derived = ours._derived.get(None)  # after a change it takes two runs until they are kept
    compiled(pixels)
    assert derived is not None and ours._derived.get(None) is derived


@torch.no_grad()
def test_old_weights_are_let_go_when_the_model_is_moved(stock, pixels):
    ours = drop_in(stock)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    compiled(pixels)
    edit_in_place(ours)
    compiled(pixels)
    assert ours._handle._source is not None
    ours.to(torch.float16)
    assert ours._handle._source is None


def edit_and_run(model, pixels, edit):
    edit(model)
    return model(pixels)[:]


def run_and_edit(model, pixels, edit):
    output = model(pixels)[:]
    edit(model)
    return output


def run_edit_and_run(model, pixels, edit):
    first = model(pixels)[:]
    edit(model)
    return *first, *model(pixels)[:]


@pytest.mark.parametrize("edit", [edit_in_place, edit_by_index])
@pytest.mark.parametrize("function", [edit_and_run, run_and_edit, run_edit_and_run])
@torch.no_grad()
def test_weights_changed_by_the_graph(stock, pixels, function, edit):
    """Also for whoever runs the model afterwards: the graph counts its edit before it runs, not where it edits."""
    ours = drop_in(stock)
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    for _ in range(2):
        expected = function(stock, pixels, edit)
        torch.testing.assert_close(compiled(ours, pixels, edit), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(pixels)[:], stock(pixels)[:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_functional_call(stock, pixels):
    ours = drop_in(stock)
    doubled = {name: 2 * p for name, p in ours.named_parameters()}

    def call(model, weights, pixels):
        return torch.func.functional_call(model, weights, (pixels,)).pooler_output

    actual = torch.compile(call, fullgraph=True, backend="eager")(ours, doubled, pixels)
    torch.testing.assert_close(actual, call(stock, doubled, pixels), atol=1e-4, rtol=0)


@torch.no_grad()
def test_frozen_weights(stock, pixels, caplog):
    """They become constants of the graph, as a handle would, which another process's graph could then have."""
    ours = drop_in(stock)
    with torch._inductor.config.patch(freezing=True):
        assert_close(torch.compile(ours, fullgraph=True)(pixels), stock(pixels))
    assert "Inductor's freezing is on" in caplog.text


@torch.no_grad()
def test_hook_added_after_compilation(stock, pixels):
    ours = drop_in(stock)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    compiled(pixels)
    for model in (stock, ours):
        tower(model).encoder.layers[1].register_forward_hook(lambda module, args, output: output + 1)
    assert_close(compiled(pixels), stock(pixels))


@torch.no_grad()
def test_a_tower_that_is_not_stocks_is_traced_as_it_is(stock, pixels, caplog):
    ours, graphs = drop_in(stock), recorder()
    for model in (stock, ours):
        tower(model).encoder.layers[0].mlp.fc1 = torch.nn.Sequential(tower(model).encoder.layers[0].mlp.fc1)
    assert_close(torch.compile(ours, fullgraph=True, backend=graphs)(pixels), stock(pixels))
    assert not has_operation(graphs.graphs[0])
    assert "fc1 is a Sequential" in caplog.text


def test_gradients(stock, pixels):
    ours, graphs = drop_in(stock), recorder("aot_eager")
    with torch.no_grad():
        ours(pixels)
    gradients = []
    for model in (stock, torch.compile(ours, fullgraph=True, backend=graphs)):
        model(pixels).pooler_output.square().sum().backward()
    gradients = [[p.grad for p in model.parameters()] for model in (stock, ours)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert not has_operation(graphs.graphs[0])
    assert not ours._derived  # as in eager mode: the weights are about to change


def test_frozen_parameters_with_gradients_enabled(stock, pixels):
    ours, graphs = drop_in(stock).requires_grad_(False), recorder("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    assert_close(compiled(pixels), stock(pixels))
    assert has_operation(graphs.graphs[0])
    compiled(pixels.requires_grad_()).pooler_output.sum().backward()
    assert pixels.grad is not None


def test_no_grad_inside_the_graph(stock, pixels):
    ours, graphs = drop_in(stock), recorder("aot_eager")
    scale = torch.ones((), requires_grad=True)

    @torch.compile(fullgraph=True, backend=graphs)
    def loss(pixels, scale):
        with torch.no_grad():
            pooled = ours(pixels).pooler_output
        return (pooled * scale).sum()

    loss(pixels, scale).backward()
    with torch.no_grad():
        torch.testing.assert_close(scale.grad, stock(pixels).pooler_output.sum(), atol=1e-3, rtol=0)
    assert has_operation(graphs.graphs[0])


@torch.no_grad()
def test_autocast(stock, pixels):
    ours, graphs = drop_in(stock), recorder()
    compiled = torch.compile(ours, fullgraph=True, backend=graphs)
    compiled(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(pixels).pooler_output.dtype == torch.bfloat16
    assert [has_operation(g) for g in graphs.graphs] == [True, False]


@torch.no_grad()
def test_hidden_states(stock, pixels):
    """Asked for first in eager mode, of stock's code: the other way round transformers 5.x does not compile."""
    stock(pixels, output_hidden_states=True)
    ours, graphs = drop_in(stock), recorder()
    transformers.SiglipVisionModel.forward(ours, pixels, output_hidden_states=True)
    output = torch.compile(ours, backend=graphs)(pixels, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states, stock(pixels, output_hidden_states=True).hidden_states)
    assert not any(map(has_operation, graphs.graphs))


@torch.no_grad()
def test_vmap(stock, pixels):
    ours = drop_in(stock)
    mapped = torch.compile(torch.vmap(lambda x: ours(x).pooler_output), fullgraph=True, backend="eager")
    expected = stock(pixels).pooler_output
    torch.testing.assert_close(mapped(pixels[:, None])[:, 0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_strict(stock, pixels):
    ours = drop_in(stock, strict=True)
    compiled = torch.compile(ours, backend="eager")
    compiled(pixels)
    with pytest.raises(RuntimeError, match="output_hidden_states was asked for"):
        compiled(pixels, output_hidden_states=True)
    tower(ours).encoder.layers[1].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(RuntimeError, match="has forward hooks"):
        compiled(pixels)


@torch.no_grad()
def test_wrong_shapes(stock, pixels):
    compiled = torch.compile(drop_in(stock), backend="eager")
    with pytest.raises((ValueError, RuntimeError), match="pixel_values: expected shape"):
        compiled(pixels[:, :2])
    with pytest.raises(ValueError, match="32×32 pixels are 16 patches"):
        compiled(torch.randn(2, 3, 32, 32).to(pixels.device))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@torch.no_grad()
def test_modes(stock, pixels, mode):
    """Also where a CUDA graph of Inductor's would replay without a look at the weights."""
    ours = drop_in(stock)
    compiled = torch.compile(ours, fullgraph=True, mode=mode)
    for _ in range(3):
        assert_close(compiled(pixels), stock(pixels))
    edit_in_place(stock), edit_in_place(ours)
    assert_close(compiled(pixels), stock(pixels))


@pytest.mark.parametrize("head", [True, False])
@torch.no_grad()
def test_opcheck(stock, pixels, head):
    ours = drop_in(stock)
    tower(ours).use_head = head
    tensors = [ours.get_input_embeddings().weight, *ours.parameters(), *ours.buffers()]
    args = (pixels, [t.detach() for t in tensors], ours._handle.tensor, False, head)
    torch.library.opcheck(torch.ops.siglip_fast.vision_tower.default, args)
    assert torch.Tag.cudagraph_unsafe in torch.ops.siglip_fast.vision_tower.default.tags


@torch.no_grad()
def test_a_model_that_is_gone(stock, pixels):
    ours = drop_in(stock)
    graphs = recorder()
    torch.compile(ours, fullgraph=True, backend=graphs)(pixels)
    tensors = [ours.get_input_embeddings().weight, *ours.parameters(), *ours.buffers()]
    args = (pixels, tensors, ours._handle.tensor, False, True)
    del ours
    torch._dynamo.reset()
    graphs.graphs.clear()
    gc.collect()
    with pytest.raises(RuntimeError, match="does not exist any more"):
        torch.ops.siglip_fast.vision_tower(*args)


@torch.no_grad()
def test_a_subclass_around_the_forward(stock, pixels):
    """Its own code is in the graph already, so the operation must not run it again; and it may have parameters."""

    class Plus(SiglipVisionModel):
        def __init__(self, config):
            super().__init__(config)
            self.one = torch.nn.Parameter(torch.ones(1))

        def forward(self, pixel_values, **kwargs):
            return super().forward(pixel_values, **kwargs).last_hidden_state + self.one

    ours, graphs = Plus(stock.config).eval(), recorder()
    ours.load_state_dict(stock.state_dict(), strict=False)
    actual = torch.compile(ours, fullgraph=True, backend=graphs)(pixels)
    assert has_operation(graphs.graphs[0])
    torch.testing.assert_close(actual, stock(pixels)[0] + 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(stock, pixels, strict):
    """The program is stock's: it needs nothing of this package."""
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"pixel_values": {0: batch}, "interpolate_pos_encoding": None}
    with torch.no_grad():
        program = torch.export.export(
            drop_in(stock, strict=True), (pixels, False), dynamic_shapes=shapes, strict=strict
        )
        for images in (pixels, torch.randn(5, 3, 24, 24).to(pixels.device)):
            torch.testing.assert_close(program.module()(images, False)[1], stock(images)[1], atol=1e-4, rtol=0)
    assert not has_operation(program.graph_module)
