"""Towers whose images are padded under a mask of their patches, against transformers' own: every row of every image,
whatever the sizes and the pixels that pad them; what is delegated. `test_idefics.py` has images that are not padded."""

import copy

import pytest
import reference
import torch
import zoo
from packed_towers import PADDED_IN, padded_inputs, padded_tower
from stock_towers import count_reads

from siglip_fast import apply_to
from siglip_fast.models.resized import nearest
from siglip_fast.ops import Ops

SHAPES = {  # of the images, in patches, and what they are padded to
    "mixed": ([(3, 5), (5, 6), (5, 2), (1, 6), (1, 1), (4, 4), (3, 5)], (5, 6)),
    "one": ([(2, 3)], (4, 3)),
    "in one row": ([(1, 4), (1, 7)], (1, 7)),
}


@pytest.fixture(params=PADDED_IN)
def stock(request):
    return padded_tower(request.param)


@pytest.fixture
def ours(stock):
    return apply_to(copy.deepcopy(stock), strict=True)


@pytest.fixture
def inputs():
    return padded_inputs(*SHAPES["mixed"])


def assert_equal(actual, expected, tolerance=1e-4):
    """An image at a time: they differ in scale."""
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    for key, tensor in zoo.tensors(expected).items():
        for row, own in zip(tensor, zoo.tensors(actual)[key], strict=True):
            torch.testing.assert_close(own.cpu(), row, atol=tolerance * row.abs().max().item(), rtol=0)


@pytest.mark.parametrize("fill", [0.0, None], ids=["alike", "others"])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_as_stock(name, fill, stock, backend, device):
    inputs = padded_inputs(*SHAPES[name], fill)
    expected = stock(**inputs, output_hidden_states=True)
    ours = apply_to(copy.deepcopy(stock), backend=backend, strict=True).to(device)
    on_device = {key: value.to(device) for key, value in inputs.items()}
    assert ours.why_not(**on_device) is None
    assert_equal(ours(**on_device, output_hidden_states=True), expected)


@pytest.mark.parametrize("name", ["mixed", "one"])
@torch.no_grad()
def test_accuracy(name, dtype, backend, device):
    """The accuracy rule; of Phi-4's tower, which has a head beside what the others have."""
    tower = padded_tower("Phi4MultimodalVisionModel", num_hidden_layers=4)
    same_dtype = tower.to(device, dtype)
    exact = copy.deepcopy(same_dtype).double()
    inputs = {key: value.to(device) for key, value in padded_inputs(*SHAPES[name]).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected = exact(inputs["pixel_values"].double(), inputs["patch_attention_mask"])
    ours = apply_to(copy.deepcopy(same_dtype), backend=backend, strict=True)
    actual, stocks = ours(**inputs), same_dtype(**inputs)
    mask = inputs["patch_attention_mask"].flatten(1)[..., None]
    for get in (
        lambda o: o.last_hidden_state,
        lambda o: (o.last_hidden_state * mask).sum(1) / mask.sum(1),
        lambda o: o.pooler_output,
    ):
        reference.assert_accurate(*map(get, (actual, expected, stocks)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_positions(stock, dtype):
    """Of images with as many patches a side as show how fractions of a side are rounded, each by its own class."""
    large = padded_tower(type(stock).__name__, image_size=8 * 70, num_hidden_layers=1).to(dtype)
    embeddings, sides = large.embeddings, [1, 7, 25, 49, 50, 55, 69, 70, 71, 82, 94, 98, 100]
    for side in sides:
        inputs = padded_inputs([(side, 3), (2, side)], (max(side, 2), max(side, 3)))
        pixels, mask = inputs["pixel_values"].to(dtype), inputs["patch_attention_mask"]
        expected = embeddings(pixels, mask) - embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        for i, shape in enumerate([(side, 3), (2, side)]):
            torch.testing.assert_close(nearest(embeddings, *shape), expected[i, mask[i].flatten()], atol=0.05, rtol=0)


@torch.no_grad()
def test_a_large_grid(stock):
    """Positions of a published tower's table, on sides at which formulas differ."""
    large = padded_tower(type(stock).__name__, image_size=8 * 70, num_hidden_layers=1)
    inputs = padded_inputs([(25, 49), (50, 20), (9, 55)], (50, 55))
    assert_equal(apply_to(copy.deepcopy(large), strict=True)(**inputs), large(**inputs))


@pytest.mark.parametrize(
    ("fill", "rows"), [(0.0, [16, 30, 11, 7, 2, 17, 16]), (None, [30] * 7)], ids=["alike", "others"]
)
@torch.no_grad()
def test_rows(fill, rows, monkeypatch):
    """What pads an image is one row if it is alike, each a row if it is not."""
    segments, attention = [], Ops.attention
    monkeypatch.setattr(Ops, "attention", lambda self, *args: segments.append(args[1]) or attention(self, *args))
    ours = apply_to(padded_tower("Idefics3VisionTransformer"), strict=True)
    ours(**padded_inputs(*SHAPES["mixed"], fill))
    assert sorted(segments[0].queries) == sorted(rows)
    assert sorted(segments[0].keys) == [1, 6, 10, 15, 15, 16, 30]


class TestForms:
    @torch.no_grad()
    def test_tuple(self, stock, ours, inputs):
        expected, actual = (m(**inputs, return_dict=False, output_hidden_states=True) for m in (stock, ours))
        assert type(actual) is type(expected) is tuple and [*map(type, actual)] == [*map(type, expected)]
        assert zoo.error(zoo.tensors(actual), zoo.tensors(expected)) < 1e-4

    @pytest.mark.parametrize("asked", [False, 1, -2, [0, -1], []], ids=str)
    @torch.no_grad()
    def test_hidden_states(self, asked, stock, ours, inputs):
        """By index, in the versions that take such."""
        assert_equal(ours(**inputs, output_hidden_states=asked), stock(**inputs, output_hidden_states=asked))

    @torch.no_grad()
    def test_batch_invariant(self, stock, inputs, monkeypatch):
        """With a library whose results depend on the number of rows."""
        linear = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
        for batch_invariant in (True, False):
            ours = apply_to(copy.deepcopy(stock), backend="torch", strict=True, batch_invariant=batch_invariant)
            rows = ours(**inputs).last_hidden_state
            alone = [ours(**{key: value[i : i + 1] for key, value in inputs.items()}) for i in (0, 2)]
            equal = [torch.equal(own.last_hidden_state[0], rows[i]) for own, i in zip(alone, (0, 2), strict=True)]
            assert equal == [batch_invariant] * 2

    @torch.no_grad()
    def test_in_parts(self, stock, inputs, monkeypatch):
        """As the cpu backend takes large batches."""
        monkeypatch.setattr("siglip_fast.backends.cpu.rows_at_once", lambda: 32)
        ours = apply_to(copy.deepcopy(stock), backend="cpu", strict=True)
        assert_equal(ours(**inputs, output_hidden_states=True), stock(**inputs, output_hidden_states=True))

    @torch.no_grad()
    def test_a_nan_image_stays_alone(self, stock, ours, inputs):
        expected = stock(**inputs).last_hidden_state
        inputs["pixel_values"][2, :, 0, 0] = torch.nan
        actual = ours(**inputs).last_hidden_state
        assert actual[2].isnan().all() and stock(**inputs).last_hidden_state[2].isnan().all()
        others = [0, 1, 3, 4, 5, 6]
        assert zoo.error({"": actual[others]}, {"": expected[others]}) < 1e-4

    @torch.no_grad()
    def test_edits_are_seen(self, stock, ours, inputs):
        for name, parameter in stock.named_parameters():
            before = ours(**inputs)
            for model in (stock, ours):
                model.get_parameter(name).mul_(1.5).add_(0.1)
            if not name.endswith(("k_proj.bias", "in_proj_bias")):  # it cancels in the softmax
                assert zoo.error(zoo.tensors(ours(**inputs)), zoo.tensors(before)) > 1e-6, name
            assert_equal(ours(**inputs), stock(**inputs), tolerance=1e-3)
            assert parameter is stock.get_parameter(name)


def with_a_hole(inputs):
    inputs["patch_attention_mask"][1, 2, 2] = False


def with_a_rectangle_elsewhere(inputs):
    inputs["patch_attention_mask"][0] = inputs["patch_attention_mask"][0].flip(0)


def with_nothing_of_an_image(inputs):
    inputs["patch_attention_mask"][4] = False


def with_infinite_padding(inputs):
    inputs["pixel_values"][0, :, -1, -1] = torch.inf


def with_attentions(inputs):
    inputs["output_attentions"] = True


NO_RECTANGLE = "patch_attention_mask is not true for exactly a rectangle in the upper left of each image"
DELEGATED = {
    with_a_hole: NO_RECTANGLE,
    with_a_rectangle_elsewhere: NO_RECTANGLE,
    with_nothing_of_an_image: NO_RECTANGLE,
    with_infinite_padding: "images are padded with pixels that are not finite",
    with_attentions: "output_attentions was asked for",
}


class TestDelegated:
    @pytest.mark.parametrize("change", DELEGATED, ids=lambda change: change.__name__)
    @torch.no_grad()
    def test_reasons(self, change, stock, ours, inputs):
        change(inputs)
        assert ours.why_not(**inputs) == DELEGATED[change]
        with pytest.raises(RuntimeError, match="the fused forward does not apply"):
            ours(**inputs)
        ours.strict = False
        try:
            expected = stock(**inputs)
        except RuntimeError as error:  # of a mask without a rectangle, before transformers 5
            with pytest.raises(RuntimeError) as raised:
                ours(**inputs)
            assert str(raised.value) == str(error)
        else:
            assert torch.equal(ours(**inputs)[0].nan_to_num(7), expected[0].nan_to_num(7))

    @torch.no_grad()
    def test_padding_under_other_attentions(self, ours, inputs):
        """FlashAttention gives padded rows zeros, and is as good as sdpa where there are none."""
        ours.config._attn_implementation = "flash_attention_2"
        assert "'flash_attention_2' was asked for, on padded images" in ours.why_not(**inputs)

    @torch.no_grad()
    def test_states_tied_by_the_config(self, ours, inputs):
        ours.config.tie_last_hidden_states = True
        assert ours.why_not(**inputs) is None
        assert "the config ties the last" in ours.why_not(**inputs, output_hidden_states=True)

    @torch.no_grad()
    def test_autocast(self, ours, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            assert ours.why_not(**inputs) == "autocast to torch.bfloat16 is active, on padded images"

    def test_gradients(self, stock, ours, inputs):
        ours.strict = False
        for model in (stock, ours):
            model(**inputs).last_hidden_state.square().sum().backward()
        for expected, actual in zip(stock.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)

    @torch.no_grad()
    def test_a_mask_elsewhere(self, ours, inputs):
        inputs["patch_attention_mask"] = inputs["patch_attention_mask"].to("meta")
        assert ours.why_not(**inputs) == "patch_attention_mask is on meta, pixel_values on cpu"

    @torch.no_grad()
    def test_compiled(self, stock, ours, inputs):
        ours.strict = False
        assert_equal(torch.compile(ours, backend="eager")(**inputs), stock(**inputs))


class TestWaits:
    """What a forward asks the device for, counted on the CPU: values that the host needs."""

    @pytest.mark.parametrize("is_padded", [True, False])
    @torch.no_grad()
    def test_reads(self, is_padded, ours, inputs, monkeypatch):
        if not is_padded:
            ours.strict = ours.unpadded_reason is None  # of Phi-4
            inputs["patch_attention_mask"][:] = True
        ours(**inputs)
        reads = count_reads(monkeypatch)
        ours(**inputs)
        # Sizes are read, and what pads images, if anything does.
        if ours.strict:
            assert reads == ["tolist"] * (1 + is_padded)


class TestCausal:
    """Phi-4's attention calls itself causal: stock's sdpa is, where it is given no mask."""

    @pytest.fixture
    def stock(self):
        return padded_tower("Phi4MultimodalVisionModel")

    @pytest.fixture
    def first_row_of(self, inputs):
        def first_row_of(tower, mask):
            """Whether that of the image that nothing pads depends on the last patch."""
            states = []
            for change in (0, 1):
                pixels = inputs["pixel_values"].clone()
                pixels[1, :, -8:, -8:] += change
                states.append(tower(pixels, mask).last_hidden_state[1, 0])
            return not torch.equal(*states)

        return first_row_of

    @torch.no_grad()
    def test_as_stock(self, stock, ours, inputs, first_row_of):
        padded, full = inputs["patch_attention_mask"], torch.ones_like(inputs["patch_attention_mask"])
        ours.strict = False
        for tower in (stock, ours):
            assert [first_row_of(tower, mask) for mask in (padded, full, None)] == [True, False, False]
        for mask in (full, None):
            assert ours.why_not(inputs["pixel_values"], mask) == "its attention is causal where nothing is padded"
            assert_equal(ours(inputs["pixel_values"], mask), stock(inputs["pixel_values"], mask), 0)
