"""MiniCPM's towers, of images side by side in one strip, against transformers' own: with the merger inside and without."""

import copy

import pytest
import reference
import torch
import zoo
from packed_towers import minicpm_strip, minicpm_tower
from stock_towers import count_reads
from torch import nn

from siglip_fast import apply_to
from siglip_fast.models.minicpm import MODULES, Positions

SIZES = {"mixed": [(4, 6), (2, 2), (6, 2), (2, 10)], "one": [(4, 2)], "equal": [(2, 4)] * 3}
MERGES = pytest.mark.parametrize("merges", [True, False], ids=["16x", "4x"])


@pytest.fixture
def stock():
    return minicpm_tower()


@pytest.fixture
def ours(stock):
    return apply_to(copy.deepcopy(stock), strict=True)


@pytest.fixture
def inputs():
    return minicpm_strip(SIZES["mixed"])


def assert_equal(actual, expected, tolerance=1e-4):
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    assert zoo.error(zoo.tensors(actual), zoo.tensors(expected)) <= tolerance


@MERGES
@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_as_stock(name, merges, stock, backend, device):
    inputs = minicpm_strip(SIZES[name]) | {"use_vit_merger": merges}
    ours = apply_to(copy.deepcopy(stock), backend=backend, strict=True).to(device)
    on_device = inputs | {"pixel_values": inputs["pixel_values"].to(device)}
    assert ours.why_not(**on_device) is None
    assert_equal(ours(**on_device), stock(**inputs))
    assert_equal(ours(**on_device, output_hidden_states=True), stock(**inputs, output_hidden_states=True))


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_each_class(name, inputs):
    stock = minicpm_tower(name)
    assert_equal(apply_to(copy.deepcopy(stock), strict=True)(**inputs), stock(**inputs))


@MERGES
@torch.no_grad()
def test_accuracy(merges, stock, inputs, dtype, backend, device):
    same_dtype = stock.to(device, dtype)
    exact = copy.deepcopy(stock).double()
    pixels, inputs["use_vit_merger"] = inputs.pop("pixel_values").to(device, dtype), merges
    ours = apply_to(copy.deepcopy(same_dtype), backend=backend, strict=True)
    outputs = [ours(pixels, **inputs), exact(pixels.double(), **inputs), same_dtype(pixels, **inputs)]
    reference.assert_accurate(*[output.last_hidden_state for output in outputs])


@torch.no_grad()
def test_positions():
    """By i / h, on sides at which it differs from Idefics' i · (1 / h)."""
    stock = minicpm_tower(image_size=8 * 70)
    embeddings = stock.embeddings
    sides = [1, 7, 25, 49, 50, 55, 70, 82, 94, 98, 100]
    sizes = torch.tensor([(side, 3) for side in sides], dtype=torch.int32)
    inputs = torch.zeros(1, 3, 8, 8 * 3 * sum(sides))
    expected = embeddings(inputs, target_sizes=sizes) - embeddings.patch_embedding(inputs).flatten(2).transpose(1, 2)
    positions = Positions(embeddings).on(torch.device("cpu"))
    actual, _ = positions.of([(side, 3) for side in sides])
    torch.testing.assert_close(actual[: len(expected[0])], expected[0], atol=1e-5, rtol=0)


class TestForms:
    @torch.no_grad()
    def test_tuple(self, stock, ours, inputs):
        expected, actual = (m(**inputs, return_dict=False, output_hidden_states=True) for m in (stock, ours))
        assert type(actual) is type(expected) is tuple and [*map(type, actual)] == [*map(type, expected)]
        assert zoo.error(zoo.tensors(actual), zoo.tensors(expected)) < 1e-4

    @MERGES
    @pytest.mark.parametrize("asked", [False, 1, -1, -2, [0, -1], []], ids=str)
    @torch.no_grad()
    def test_hidden_states(self, asked, merges, stock, ours, inputs):
        """The last is last_hidden_state, unless the config says otherwise."""
        inputs |= {"use_vit_merger": merges, "output_hidden_states": asked}
        assert_equal(ours(**inputs), stock(**inputs))
        for model in (ours, stock):
            model.config.tie_last_hidden_states = False
        assert_equal(ours(**inputs), stock(**inputs))

    @MERGES
    @torch.no_grad()
    def test_batch_invariant_and_in_parts(self, merges, stock, inputs, monkeypatch):
        """With a library whose results depend on the number of rows; and as the cpu backend takes large batches."""
        linear, inputs["use_vit_merger"] = torch.nn.functional.linear, merges
        monkeypatch.setattr("siglip_fast.backends.cpu.rows_at_once", lambda: 32)
        parts = apply_to(copy.deepcopy(stock), backend="cpu", strict=True)
        assert_equal(parts(**inputs, output_hidden_states=True), stock(**inputs, output_hidden_states=True))
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
        for batch_invariant in (True, False):
            ours = apply_to(copy.deepcopy(stock), backend="torch", strict=True, batch_invariant=batch_invariant)
            first = ours(inputs["pixel_values"][..., : 8 * 24], inputs["target_sizes"][:1], merges).last_hidden_state
            assert torch.equal(ours(**inputs).last_hidden_state[:, : first.shape[1]], first) == batch_invariant

    @MERGES
    @torch.no_grad()
    def test_a_nan_image_stays_alone(self, merges, stock, ours, inputs):
        inputs["use_vit_merger"] = merges
        expected = stock(**inputs).last_hidden_state
        inputs["pixel_values"][0, 0, 0, 8 * 24] = torch.nan  # of the second image
        actual, (begin, end) = ours(**inputs).last_hidden_state, (6, 7) if merges else (24, 28)
        assert actual[:, begin:end].isnan().all()
        for rows in (slice(begin), slice(end, None)):
            assert zoo.error({"": actual[:, rows]}, {"": expected[:, rows]}) < 1e-4

    @torch.no_grad()
    def test_edits_are_seen(self, stock, ours, inputs):
        for name, parameter in stock.named_parameters():
            before = ours(**inputs)
            for model in (stock, ours):
                model.get_parameter(name).mul_(1.5).add_(0.1)
            if not name.endswith("k_proj.bias"):  # it cancels in the softmax
                assert zoo.error(zoo.tensors(ours(**inputs)), zoo.tensors(before)) > 1e-6, name
            assert_equal(ours(**inputs), stock(**inputs), tolerance=1e-3)
            assert parameter is stock.get_parameter(name)

    @pytest.mark.parametrize("after", [-1, 0, 3, 4])
    @torch.no_grad()
    def test_where_it_merges(self, after, stock, ours, inputs):
        """Behind any layer, as the config says when the forward runs; or behind none."""
        ours(**inputs)
        for model in (stock, ours):
            model.config.insert_layer_id = after
        assert_equal(ours(**inputs, output_hidden_states=True), stock(**inputs, output_hidden_states=True))


class TestDelegated:
    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            ({"target_sizes": None}, "target_sizes are no tensor"),
            ({"target_sizes": torch.tensor([[4, 6], [2, 2], [6, 2], [4, 5]])}, "no multiples of 2"),
            ({"target_sizes": torch.tensor([[4, 6], [2, 2]])}, "60 patches, by target_sizes 28"),
            ({"pixel_values": torch.zeros(3, 8, 480)}, r"pixel_values are torch.float32, \[3, 8, 480\]"),
            ({"pixel_values": torch.zeros(1, 3, 8, 480).double()}, "pixel_values are torch.float64"),
            ({"position_ids": torch.zeros(60, dtype=torch.int64)}, "keyword arguments position_ids"),
            ({"output_attentions": True}, "output_attentions was asked for"),
        ],
        ids=lambda value: "" if isinstance(value, dict) else value,
    )
    @torch.no_grad()
    def test_what_is_wrong_is_stocks_to_judge(self, wrong, reason, stock, ours, inputs):
        with pytest.raises(RuntimeError, match=reason):
            ours(**inputs | wrong)
        ours.strict = False
        try:
            expected = stock(**inputs | wrong)
        except Exception as error:
            with pytest.raises(type(error)) as raised:
                ours(**inputs | wrong)
            assert str(raised.value) == str(error)
        else:
            assert_equal(ours(**inputs | wrong), expected, tolerance=0)

    @torch.no_grad()
    def test_odd_sides_without_the_merger(self, stock, ours):
        inputs = minicpm_strip([(3, 5), (1, 1)]) | {"use_vit_merger": False}
        assert_equal(ours(**inputs), stock(**inputs))

    @torch.no_grad()
    def test_configs(self):
        stock = minicpm_tower(hidden_size=32)
        assert "hidden_size is no multiple of 64" in apply_to(stock).why_not(**minicpm_strip([(2, 2)]))

    @torch.no_grad()
    def test_an_edited_merger(self, ours, inputs):
        ours.vit_merger.act = nn.ReLU()
        assert "vit_merger" in ours.why_not(**inputs)


class TestWaits:
    @torch.no_grad()
    def test_one_read(self, ours, inputs, monkeypatch):
        """Of the sizes; what a forward asks the device for, counted on the CPU: values that the host needs."""
        ours(**inputs)
        reads = count_reads(monkeypatch)
        ours(**inputs)
        assert reads == ["tolist"]
