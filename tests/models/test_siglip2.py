"""The NaFlex drop-in against transformers' own class: every row of every image, whatever their sizes; what it delegates."""

import copy
import itertools

import pytest
import reference
import torch
import transformers
import zoo
from models import drop_in, stock_model
from packed_towers import NAFLEX_K as K
from packed_towers import naflex_inputs as images
from stock_towers import count_reads
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Siglip2VisionConfig

import siglip_fast
from siglip_fast.models.resized import NaflexPositions
from siglip_fast.models.siglip2 import Siglip2VisionModel

TINY = zoo.SIGLIP2_VISION  # a table of 4 × 4 positions, patches of 8 × 8 pixels
# Sizes of a call's images, in patches, and how many rows they are padded to
SHAPES = {
    "one": ([(3, 5)], 16),
    "one that is full": ([(4, 4)], 16),
    "full and of one size": ([(4, 4)] * 3, 16),
    "full, and of two": ([(3, 4), (2, 6), (4, 3)], 12),
    "of one size, padded": ([(3, 4)] * 3, 16),
    "mixed": ([(3, 5), (4, 4), (2, 8), (1, 1), (7, 2), (1, 16)], 16),
    "63 to 65, in 66": ([(7, 9), (8, 8), (5, 13), (1, 2), (6, 11)], 66),
    "much padding": ([(1, 1), (1, 2)], 300),
}


@pytest.fixture
def stock():
    return stock_model(Siglip2VisionConfig(**TINY), "sdpa", "Siglip2VisionModel")


@pytest.fixture
def inputs():
    return images(*SHAPES["mixed"])


def assert_equal(actual, expected, tolerance=1e-4):
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    assert zoo.error(zoo.tensors(actual), zoo.tensors(expected)) < tolerance


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_as_stock(name, stock, backend, device):
    ours = drop_in(stock, backend=backend, strict=True).to(device)
    inputs = images(*SHAPES[name])
    expected = stock(**inputs, output_hidden_states=True)
    on_device = {key: value.to(device) for key, value in inputs.items()}
    assert ours.why_not(**on_device) is None
    actual = ours(**on_device, output_hidden_states=True)
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    for key, tensor in zoo.tensors(expected).items():
        for row, own in zip(tensor, zoo.tensors(actual)[key], strict=True):  # an image at a time: they differ in scale
            torch.testing.assert_close(own.cpu(), row, atol=1e-4 * row.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["mixed", "63 to 65, in 66", "full and of one size"])
@torch.no_grad()
def test_accuracy(name, dtype, backend, device):
    """The accuracy rule, for the outputs and the mean of an image's valid rows."""
    config = Siglip2VisionConfig(**TINY | {"num_hidden_layers": 4})
    same_dtype = stock_model(config, "sdpa", "Siglip2VisionModel").to(device, dtype)
    exact = copy.deepcopy(same_dtype).double()
    ours = drop_in(same_dtype, backend=backend, strict=True).to(device)
    inputs = {key: value.to(device) for key, value in images(*SHAPES[name]).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    mask = inputs["pixel_attention_mask"][..., None]
    expected = exact(**inputs | {"pixel_values": inputs["pixel_values"].double()})
    actual, stocks = ours(**inputs), same_dtype(**inputs)
    for get in (
        lambda o: o.last_hidden_state,
        lambda o: (o.last_hidden_state * mask).sum(1) / mask.sum(1),
        lambda o: o.pooler_output,
    ):
        reference.assert_accurate(*map(get, (actual, expected, stocks)))


@torch.no_grad()
def test_real_width(backend, device):
    """Of base-naflex, two layers, heads of 64."""
    if backend == "triton":
        pytest.skip("test_as_stock has the kernels, tests/kernels their widths")
    config = Siglip2VisionConfig(num_hidden_layers=2)
    stock = stock_model(config, "sdpa", "Siglip2VisionModel")
    inputs = images([(16, 16), (9, 20), (13, 13)], 256, 768)
    assert_equal(drop_in(stock, backend=backend, strict=True)(**inputs), stock(**inputs))


class TestForms:
    @torch.no_grad()
    def test_tuple_and_no_head(self, inputs):
        config = Siglip2VisionConfig(**TINY, vision_use_head=False)
        stock = stock_model(config, "sdpa", "Siglip2VisionModel")
        expected, actual = stock(**inputs), drop_in(stock, strict=True)(**inputs)
        assert actual.pooler_output is None
        assert_equal(actual, expected)
        as_tuple = drop_in(stock, strict=True)(**inputs, return_dict=False)
        assert type(as_tuple) is tuple and torch.equal(as_tuple[0], actual.last_hidden_state)

    @torch.no_grad()
    def test_positional_arguments_and_dtypes_of_masks(self, stock, inputs):
        ours = drop_in(stock, strict=True)
        expected = stock(**inputs)
        pixel_values, mask, shapes = inputs.values()
        for kind in (torch.bool, torch.int64, torch.float32, torch.uint8):
            assert_equal(ours(pixel_values, mask.to(kind), shapes), expected)
        assert_equal(ours(pixel_values.double(), mask, shapes.int()), expected)

    @torch.no_grad()
    def test_no_mask_where_nothing_is_padded(self, stock):
        pixel_values, _, shapes = images(*SHAPES["full, and of two"]).values()
        ours = drop_in(stock, strict=True)
        assert_equal(ours(pixel_values, None, shapes), stock(pixel_values, None, shapes))

    @torch.no_grad()
    def test_what_padding_holds(self, stock, inputs):
        """Any pixels, if all rows are alike: stock's padded rows show them."""
        mask = inputs["pixel_attention_mask"][..., None]
        inputs["pixel_values"] = torch.where(mask.bool(), inputs["pixel_values"], 0.7)
        assert_equal(drop_in(stock, strict=True)(**inputs), stock(**inputs))

    def test_state_dict_and_loading(self, stock, tmp_path, inputs):
        assert [*drop_in(stock).state_dict()] == [*stock.state_dict()]
        stock.save_pretrained(tmp_path)
        ours = Siglip2VisionModel.from_pretrained(tmp_path, strict=True)
        with torch.no_grad():
            assert_equal(ours.eval()(**inputs), stock(**inputs))

    @torch.no_grad()
    def test_batch_invariant(self, stock, inputs):
        for backend in ("cpu", "torch"):
            ours = drop_in(stock, backend=backend, strict=True, batch_invariant=True)
            together = ours(**inputs)
            for i in range(len(inputs["pixel_values"])):
                alone = ours(**{key: value[i : i + 1] for key, value in inputs.items()})
                assert torch.equal(alone.last_hidden_state[0], together.last_hidden_state[i])
                assert torch.equal(alone.pooler_output[0], together.pooler_output[i])

    @torch.no_grad()
    def test_in_parts(self, stock, inputs, monkeypatch):
        """As the cpu backend takes large batches."""
        monkeypatch.setattr("siglip_fast.backends.cpu.rows_at_once", lambda: 32)
        actual = drop_in(stock, backend="cpu", strict=True)(**inputs, output_hidden_states=True)
        assert_equal(actual, stock(**inputs, output_hidden_states=True))


class TestWeights:
    @torch.no_grad()
    def test_edits_are_seen(self, stock, inputs):
        ours = drop_in(stock, strict=True)
        for name, parameter in stock.named_parameters():
            before = ours(**inputs)
            for model in (stock, ours):
                model.get_parameter(name).mul_(1.5).add_(0.1)
            if not name.endswith("k_proj.bias"):  # it cancels in the softmax
                assert zoo.error(zoo.tensors(ours(**inputs)), zoo.tensors(before)) > 1e-6, name
            assert_equal(ours(**inputs), stock(**inputs), tolerance=1e-3)
            assert parameter is stock.get_parameter(name)

    @torch.no_grad()
    def test_cast(self, stock, inputs):
        ours = drop_in(stock, strict=True)
        ours(**inputs)
        halves = [model.to(torch.bfloat16)(**inputs) for model in (ours, stock)]
        assert_equal(*halves, tolerance=0.02)

    def test_many_sizes_are_forgotten(self, stock, monkeypatch):
        monkeypatch.setattr("siglip_fast.models.resized.MOST_ROWS", 40)
        ours = drop_in(stock, strict=True)
        with torch.no_grad():
            for height in range(1, 9):
                inputs = images([(height, 2), (2, height), (3, 3)], 16)
                assert_equal(ours(**inputs), stock(**inputs))

    @torch.no_grad()
    def test_new_sizes_lie_behind_the_others(self, stock, monkeypatch):
        """In the same table, which plans and calls may hold, until it has no room; then in one of twice the rows."""
        monkeypatch.setattr("siglip_fast.models.resized.FEWEST_ROWS", 16)
        ours, tables, first = drop_in(stock, strict=True), [], images([(1, 3), (2, 1)], 4)
        for shape in ((1, 3), (2, 2), (3, 3), (4, 4), (8, 2), (7, 3)):
            inputs = images([shape, (2, 1)], 22)
            assert_equal(ours(**inputs), stock(**inputs))
            assert_equal(ours(**first), stock(**first))
            table, _ = ours._current().kept(NaflexPositions).of([shape])
            tables.append(table)
        sizes = [len(table) for table in tables]
        assert sizes == [16, 16, 32, 64, 64, 128]
        assert all((a is b) == (len(a) == len(b)) for a, b in itertools.pairwise(tables))


def with_holes(inputs):
    inputs["pixel_attention_mask"][0, 3] = 0


def with_more_than_the_image(inputs):
    inputs["pixel_attention_mask"][0] = 1


def with_unequal_padding(inputs):
    inputs["pixel_values"][3, -1] = 1


def without_a_mask(inputs):
    inputs["pixel_attention_mask"] = None


def with_attentions(inputs):
    inputs["output_attentions"] = True


def with_grad(inputs):
    inputs["pixel_values"].requires_grad_()


DELEGATED = {
    with_holes: "pixel_attention_mask is not true for exactly the first height·width rows of each image",
    with_more_than_the_image: "pixel_attention_mask is not true for exactly the first height·width rows of each image",
    with_unequal_padding: "the rows that pad an image differ from each other",
    without_a_mask: "pixel_attention_mask is not true for exactly the first height·width rows of each image",
    with_attentions: "output_attentions was asked for",
    with_grad: "gradients are needed (use torch.no_grad or torch.inference_mode for inference)",
}


class TestDelegated:
    @pytest.mark.parametrize("change", DELEGATED, ids=lambda change: change.__name__)
    def test_reasons(self, change, stock, inputs):
        ours = drop_in(stock)
        change(inputs)
        with torch.set_grad_enabled(change is with_grad):
            assert ours.why_not(**inputs) == DELEGATED[change]
            assert_equal(ours(**inputs), stock(**inputs), tolerance=1e-6)
            ours.strict = True
            with pytest.raises(RuntimeError, match="the fused forward does not apply"):
                ours(**inputs)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"spatial_shapes": torch.tensor([[0, 5]] * 6)},
            {"spatial_shapes": torch.tensor([[5, 5]] * 6)},
            {"pixel_values": torch.zeros(6, 16, K + 1)},
            {"pixel_values": torch.zeros(6, 16)},
            {"pixel_values": torch.zeros(6, 0, K)},
            {"pixel_values": torch.zeros(())},
        ],
        ids=["nothing", "too many", "other patches", "flat", "no rows", "a number"],
    )
    @torch.no_grad()
    def test_errors_are_those_of_stock(self, wrong, stock, inputs):
        errors = []
        for model in (stock, drop_in(stock)):
            with pytest.raises(Exception) as raised:  # noqa: PT011
                model(**inputs | wrong)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]

    @torch.no_grad()
    def test_hooks_and_replaced_modules(self, stock, inputs):
        ours = drop_in(stock)
        encoder = getattr(ours, "vision_model", ours).encoder
        handle = encoder.layers[0].register_forward_hook(lambda *args: None)
        assert "has forward hooks" in ours.why_not(**inputs)
        handle.remove()
        assert ours.why_not(**inputs) is None
        encoder.layers[1].mlp.activation_fn = nn.ReLU()
        assert "encoder.layers.1.mlp" in ours.why_not(**inputs)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def nothing_compiled_before(self):
        torch._dynamo.reset()

    @pytest.fixture
    def graphs(self):
        return CompileCounterWithBackend("eager")

    @torch.no_grad()
    def test_any_sizes_in_one_graph(self, stock, graphs):
        """Whatever the sizes of images, their number and what they are padded to: one operation, traced once."""
        compiled = torch.compile(drop_in(stock, strict=True), fullgraph=True, dynamic=True, backend=graphs)
        for name in ("mixed", "63 to 65, in 66", "full, and of two", "of one size, padded"):
            inputs = images(*SHAPES[name])
            assert_equal(compiled(**inputs), stock(**inputs))
        assert graphs.frame_count == 1
        assert any("naflex_tower" in str(node.target) for node in graphs.graphs[0].graph.nodes)

    @torch.no_grad()
    def test_delegates_as_it_runs(self, stock, inputs, graphs):
        compiled = torch.compile(drop_in(stock), fullgraph=True, backend=graphs)
        assert_equal(compiled(**inputs), stock(**inputs))
        with_holes(inputs)
        assert_equal(compiled(**inputs), stock(**inputs))
        assert graphs.frame_count == 1

    @torch.no_grad()
    def test_without_head_and_edited(self, inputs, graphs):
        stock = stock_model(Siglip2VisionConfig(**TINY, vision_use_head=False), "sdpa", "Siglip2VisionModel")
        ours = drop_in(stock, strict=True)
        compiled = torch.compile(ours, fullgraph=True, backend=graphs)
        for _ in range(2):
            output = compiled(**inputs)
            assert output.pooler_output is None
            torch.testing.assert_close(output[0], stock(**inputs)[0], atol=1e-3, rtol=1e-3)
            for model in (stock, ours):
                getattr(model, "vision_model", model).post_layernorm.weight.mul_(3)

    @torch.no_grad()
    def test_stock_is_traced_for_hidden_states(self, stock, inputs):
        ours = torch.compile(drop_in(stock), backend="eager")
        assert_equal(ours(**inputs, output_hidden_states=True), stock(**inputs, output_hidden_states=True))


class TestWaits:
    """What a forward asks the device for, counted on the CPU: values that the host needs."""

    @torch.no_grad()
    def test_one_read(self, stock, inputs, monkeypatch):
        ours = drop_in(stock, strict=True)
        ours(**inputs)
        reads = count_reads(monkeypatch)
        ours(**inputs)
        # The one `tolist` is the read of sizes and flags.
        assert reads == ["tolist"]


class TestAround:
    def test_unequal_padding_delegates(self):
        model, inputs = zoo.build("siglip2")
        inputs |= zoo.naflex(2, 3) | {"pixel_values": zoo.pixels(2).view(2, 16, 192)}
        expected = zoo.run(model, inputs)
        siglip_fast.apply_to(model)
        with zoo.fused_attentions() as attentions:
            assert zoo.error(zoo.run(model, inputs), expected) < 1e-6 and not attentions

    def test_public_name(self):
        assert siglip_fast.Siglip2VisionModel is Siglip2VisionModel
        assert issubclass(Siglip2VisionModel, transformers.Siglip2VisionModel)
