"""Towers of crops or tiles of one size beside SigLIP's, against transformers' own: Molmo 2's, Granite Docling's and Janus'."""

import copy

import fixed_towers
import pytest
import reference
import torch
import zoo
from fixed_towers import TOWERS

from siglip_fast import apply_to


@pytest.fixture(params=TOWERS)
def name(request):
    return request.param


@pytest.fixture
def stock(name):
    return TOWERS[name]()


@pytest.fixture
def ours(stock):
    return apply_to(copy.deepcopy(stock), strict=True)


@pytest.fixture
def pixels(name):
    return fixed_towers.inputs(name)


@pytest.fixture
def states(ours):
    """Asks for the hidden states, where stock's tower returns them."""
    return {"output_hidden_states": True} if ours.returns_hidden_states else {}


def assert_equal(actual, expected, tolerance=1e-4):
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    assert zoo.error(zoo.tensors(actual), zoo.tensors(expected)) <= tolerance


@pytest.mark.parametrize("images", [1, 3])
@torch.no_grad()
def test_as_stock(images, name, stock, states, backend, device):
    pixels = fixed_towers.inputs(name, images)
    ours = apply_to(copy.deepcopy(stock), backend=backend, strict=True).to(device)
    assert ours.why_not(pixels.to(device)) is None
    assert_equal(ours(pixels.to(device)), stock(pixels))
    assert_equal(ours(pixels.to(device), **states), stock(pixels, **states))


@torch.no_grad()
def test_accuracy(name, stock, pixels, dtype, backend, device):
    """The accuracy rule, for every output."""
    same_dtype, pixels = stock.to(device, dtype), pixels.to(device, dtype)
    exact = zoo.tensors(copy.deepcopy(stock).double()(pixels.double()))
    ours = apply_to(copy.deepcopy(same_dtype), backend=backend, strict=True)
    actual, stocks = zoo.tensors(ours(pixels)), zoo.tensors(same_dtype(pixels))
    assert actual.keys() == exact.keys()
    for key, expected in exact.items():
        reference.assert_accurate(actual[key], expected, stocks[key])


@pytest.mark.parametrize("name", ["molmo2", "janus"])
@torch.no_grad()
def test_attention_without_bias(name, pixels):
    stock = TOWERS[name](attention_bias=False)
    assert_equal(apply_to(copy.deepcopy(stock), strict=True)(pixels), stock(pixels))


class TestForms:
    @torch.no_grad()
    def test_tuple(self, stock, ours, states, pixels):
        expected, actual = (m(pixels, return_dict=False, **states) for m in (stock, ours))
        assert type(actual) is type(expected) is tuple and [*map(type, actual)] == [*map(type, expected)]
        assert zoo.error(zoo.tensors(actual), zoo.tensors(expected)) < 1e-4

    @pytest.mark.parametrize("asked", [False, 1, -2, [0, -1], []], ids=str)
    @torch.no_grad()
    def test_hidden_states(self, asked, stock, ours, pixels):
        if not ours.returns_hidden_states:
            ours.strict = False
            assert not asked or ours.why_not(pixels, output_hidden_states=asked) == "output_hidden_states was asked for"
        assert_equal(ours(pixels, output_hidden_states=asked), stock(pixels, output_hidden_states=asked))

    @torch.no_grad()
    def test_other_dtypes_of_pixels(self, stock, ours, pixels):
        assert_equal(ours(pixels.double()), stock(pixels.double()))

    @torch.no_grad()
    def test_batch_invariant_and_in_parts(self, name, stock, states, monkeypatch):
        """With a library whose results depend on the number of rows; and as the cpu backend takes large batches."""
        linear, pixels = torch.nn.functional.linear, fixed_towers.inputs(name, 4)
        monkeypatch.setattr("siglip_fast.backends.cpu.rows_at_once", lambda: 32)
        parts = apply_to(copy.deepcopy(stock), backend="cpu", strict=True)
        assert_equal(parts(pixels, **states), stock(pixels, **states))
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
        for batch_invariant in (True, False):
            ours = apply_to(copy.deepcopy(stock), backend="torch", strict=True, batch_invariant=batch_invariant)
            together = zoo.tensors(ours(pixels))
            for i in range(len(pixels)):
                alone = zoo.tensors(ours(pixels[i : i + 1]))
                equal = [torch.equal(own.chunk(len(pixels))[i], alone[key]) for key, own in together.items()]
                assert equal == [batch_invariant] * len(alone)

    @torch.no_grad()
    def test_a_nan_image_stays_alone(self, stock, ours, pixels):
        expected = stock(pixels).last_hidden_state
        pixels[1].view(-1)[0] = torch.nan
        actual = ours(pixels).last_hidden_state
        assert actual[1].isnan().all()
        assert zoo.error({"": actual[[0, 2]]}, {"": expected[[0, 2]]}) < 1e-4

    @torch.no_grad()
    def test_edits_are_seen(self, stock, ours, pixels):
        for name, parameter in stock.named_parameters():
            before = ours(pixels)
            for model in (stock, ours):
                model.get_parameter(name).mul_(1.5).add_(0.1)
            if not name.endswith("k_proj.bias") and "connector.fine" not in name:  # it cancels in the softmax
                assert zoo.error(zoo.tensors(ours(pixels)), zoo.tensors(before)) > 1e-6, name
            assert_equal(ours(pixels), stock(pixels), tolerance=1e-3)
            assert parameter is stock.get_parameter(name)


class TestDelegated:
    @torch.no_grad()
    def test_attentions(self, stock, ours, pixels):
        ours.strict = False
        asked = {"output_attentions": True, "output_hidden_states": True}
        assert "output_attentions was asked for" in ours.why_not(pixels, **asked)
        assert_equal(ours(pixels, **asked), stock(pixels, **asked), tolerance=0)

    @torch.no_grad()
    def test_compiled(self, stock, ours, pixels):
        ours.strict = False
        assert_equal(torch.compile(ours, backend="eager")(pixels), stock(pixels))

    def test_gradients(self, stock, ours, pixels):
        ours.strict = False
        for model in (stock, ours):
            model(pixels).last_hidden_state.square().sum().backward()
        for expected, actual in zip(stock.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)

    @pytest.mark.parametrize("wrong", [lambda x: x[..., :-1], lambda x: x[0], lambda x: x[:, :1], lambda x: x[:0]])
    @torch.no_grad()
    def test_what_is_wrong_is_stocks_to_judge(self, wrong, stock, ours, pixels):
        ours.strict = False
        assert ours.why_not(wrong(pixels))
        try:
            expected = stock(wrong(pixels))
        except Exception as error:
            with pytest.raises(type(error)) as raised:
                ours(wrong(pixels))
            assert str(raised.value) == str(error)
        else:
            assert_equal(ours(wrong(pixels)), expected, tolerance=0)

    @pytest.mark.parametrize(
        ("name", "values", "reason"),
        [
            ("molmo2", {"num_key_value_heads": 1}, "2 heads share a key"),
            ("molmo2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'gelu_pytorch_tanh'"),
            ("granite_docling", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'gelu_pytorch_tanh'"),
            ("janus", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh', not 'gelu'"),
            ("janus", {"use_qk_norm": True, "num_attention_heads": 1}, "use_qk_norm is True"),
        ],
    )
    def test_configs(self, name, values, reason, pixels):
        with torch.no_grad():
            assert apply_to(TOWERS[name](**values)).why_not(pixels) == reason

    @torch.no_grad()
    def test_dropout(self, name, pixels):
        ours = apply_to(TOWERS[name](attention_dropout=0.5))
        assert ours.why_not(pixels) is None
        assert ours.train().why_not(pixels) == "attention dropout is active"


class TestGraniteDocling:
    @pytest.fixture
    def name(self):
        return "granite_docling"

    @torch.no_grad()
    def test_fine(self, stock, ours, pixels):
        assert_equal(ours(pixels, fine=True), stock(pixels, fine=True))
        assert ours.why_not(pixels, fine=True) is None

    @torch.no_grad()
    def test_encode(self, stock, ours, pixels):
        with zoo.fused_attentions() as attentions:
            actual = ours.encode(pixels)
        assert len(attentions) == 3 and [*map(type, actual)] == [torch.Tensor, list]
        assert zoo.error(zoo.tensors(actual), zoo.tensors(stock.encode(pixels))) < 1e-4
        with pytest.raises(RuntimeError, match="not of 32 pixels a side"):
            ours.encode(pixels[..., :24])

    @torch.no_grad()
    def test_taps_behind_layers_that_are_not_there(self, pixels):
        """As -1 and 7 of three layers: stock leaves them out."""
        stock = fixed_towers.granite_docling(deepstack_visual_indexes=[-1, 1, 7])
        ours = apply_to(copy.deepcopy(stock), strict=True)
        assert len(ours.encode(pixels)[1]) == 1
        assert zoo.error(zoo.tensors(ours.encode(pixels)), zoo.tensors(stock.encode(pixels))) < 1e-4

    @torch.no_grad()
    def test_autocast(self, stock, ours, pixels):
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(ours(pixels), stock(pixels), tolerance=0.02)
            actual, expected = ours(pixels), stock(pixels)
        dtypes = [[t.dtype for t in zoo.tensors(output).values()] for output in (actual, expected)]
        assert dtypes[0] == dtypes[1]


class TestJanus:
    @pytest.fixture
    def name(self):
        return "janus"

    @pytest.mark.parametrize("rate", ["hidden_dropout_rate", "projection_dropout"])
    @torch.no_grad()
    def test_dropout(self, rate, pixels):
        ours = apply_to(TOWERS["janus"](**{rate: 0.5}))
        assert ours.why_not(pixels) is None
        assert ours.train().why_not(pixels) == "dropout is active"

    @torch.no_grad()
    def test_interpolated_positions(self, stock, ours, pixels):
        pixels = pixels[..., :24, :]
        assert_equal(ours(pixels, True), stock(pixels, True))
        assert_equal(ours(pixels, interpolate_pos_encoding=True), stock(pixels, interpolate_pos_encoding=True))
        assert "not of 32 pixels a side" in ours.why_not(pixels)
