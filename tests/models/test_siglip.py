"""The drop-in against transformers' own class: outputs, state dict, loading, gradients, wrong input."""

import copy
import re
from unittest import mock

import pytest
import reference
import torch
import transformers
from models import TINY, drop_in, stock_model
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipVisionConfig

from siglip_fast import SiglipVisionModel
from siglip_fast.models.variants import VARIANTS, config_for


@pytest.fixture
def tiny():
    return stock_model(SiglipVisionConfig(**TINY))


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(2, 3, 24, 24)


@torch.no_grad()
def assert_equal_outputs(stock, ours, pixel_values, tolerance=1e-4, **kwargs):
    """Both outputs within tolerance, and ours really by the fused path."""
    assert ours.why_not(pixel_values, **kwargs) is None
    expected, actual = stock(pixel_values, **kwargs), ours(pixel_values, **kwargs)
    assert type(actual) is type(expected)
    for name in ("last_hidden_state", "pooler_output"):
        difference = (getattr(actual, name) - getattr(expected, name)).abs().max()
        assert difference <= tolerance, f"{name}: {difference}"


# 4096 tokens: stock's eager attention takes a gigabyte and a minute
PUBLISHED = [pytest.param(name, marks=pytest.mark.slow) if name.endswith("896") else name for name in VARIANTS]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_shapes_on_the_cpu(variant):
    config = config_for(variant)
    config.num_hidden_layers = 2
    stock = stock_model(config)
    pixel_values = torch.randn(1, 3, config.image_size, config.image_size)
    for backend in ("cpu", "torch"):
        assert_equal_outputs(stock, drop_in(stock, backend=backend), pixel_values)


# Each width at its smallest image size
SMALLEST = [
    *("base-patch16-224", "base-patch32-256", "large-patch16-256"),
    *("so400m-patch14-224", "so400m-patch16-256", "giant-opt-patch16-256"),
]


# In the interpreter more than a minute each, for widths that the kernels' own tests have
ON_TRITON = [
    pytest.param(name, marks=pytest.mark.slow) if name.startswith(("giant", "so400m-patch16")) else name
    for name in SMALLEST
]


@pytest.mark.parametrize("variant", ON_TRITON)
def test_published_shapes_on_triton(variant, device):
    config = config_for(variant)
    config.num_hidden_layers = 2
    stock = stock_model(config).to(device)
    pixel_values = torch.randn(1, 3, config.image_size, config.image_size).to(device)
    assert_equal_outputs(stock, drop_in(stock, backend="triton").to(device), pixel_values)


def test_full_depth(device, backend):
    """All 12 layers of base-patch16-224; the interpreter takes minutes for it, hence one image."""
    stock = stock_model(config_for("base-patch16-224")).to(device)
    pixel_values = torch.randn(1, 3, 224, 224).to(device)
    assert_equal_outputs(stock, drop_in(stock, backend=backend).to(device), pixel_values)


@torch.no_grad()
def check_half_precision(config, dtype, backend, device):
    """The accuracy rule for the whole model: both outputs, and the mean over the tokens, where a rounding that is
    the same for every token would show."""
    exact = stock_model(config).double().to(device)
    same_dtype = stock_model(config).to(device, dtype)
    exact.load_state_dict(same_dtype.state_dict())
    ours = drop_in(same_dtype, backend=backend).to(device)
    pixel_values = torch.randn(2, 3, config.image_size, config.image_size).to(device, dtype)
    assert ours.why_not(pixel_values) is None
    expected, actual, stocks = exact(pixel_values.double()), ours(pixel_values), same_dtype(pixel_values)
    for get in (lambda o: o.last_hidden_state, lambda o: o.last_hidden_state.mean(1), lambda o: o.pooler_output):
        reference.assert_accurate(get(actual), get(expected), get(stocks))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_at_real_width(dtype, backend, device):
    config = config_for("base-patch16-224")
    config.num_hidden_layers = 2
    check_half_precision(config, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("variant", SMALLEST)
@pytest.mark.slow
def test_half_precision_of_every_variant(variant, dtype, backend, device):
    config = config_for(variant)
    config.num_hidden_layers = 2
    check_half_precision(config, dtype, backend, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_of_a_deep_model(dtype, backend, device):
    config = SiglipVisionConfig(**TINY | {"num_hidden_layers": 12})
    check_half_precision(config, dtype, backend, device)


class TestOutputs:
    def test_tuple_when_asked(self, tiny, pixels):
        with torch.no_grad():
            expected, actual = tiny(pixels, return_dict=False), drop_in(tiny)(pixels, return_dict=False)
        assert type(actual) is tuple and len(actual) == len(expected) == 2
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    def test_head_switched_off_later(self, tiny, pixels):
        ours = drop_in(tiny)
        with torch.no_grad():
            assert ours(pixels).pooler_output is not None
            getattr(ours, "vision_model", ours).use_head = False
            assert ours.why_not(pixels) is None
            assert ours(pixels).pooler_output is None

    def test_config_shared_with_another_model(self, tiny, pixels):
        """The heads are those that the layers were built with, whatever became of the config."""
        ours = drop_in(tiny)
        ours.config.num_attention_heads = 2
        with torch.no_grad():
            torch.testing.assert_close(ours(pixels)[:], tiny(pixels)[:], atol=1e-5, rtol=0)

    def test_without_head(self, pixels):
        stock = stock_model(SiglipVisionConfig(**TINY, vision_use_head=False))
        with torch.no_grad():
            output = drop_in(stock)(pixels)
            expected = stock(pixels)
        assert output.pooler_output is None and expected.pooler_output is None
        assert len(output.to_tuple()) == len(expected.to_tuple()) == 1
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("height, width", [(24, 24), (40, 24), (33, 50), (8, 8)])
    def test_interpolated_positions(self, tiny, height, width, backend, device):
        pixel_values = torch.randn(2, 3, height, width).to(device)
        ours = drop_in(tiny, backend=backend).to(device)
        assert_equal_outputs(tiny.to(device), ours, pixel_values, interpolate_pos_encoding=True)

    def test_pixels_that_do_not_fill_the_last_patch(self, tiny, backend, device):
        pixel_values = torch.randn(2, 3, 31, 25).to(device)
        assert_equal_outputs(tiny.to(device), drop_in(tiny, backend=backend).to(device), pixel_values)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.float16])
    def test_pixels_are_cast_to_the_weights_dtype(self, tiny, dtype, backend, device):
        pixel_values = (torch.randn(2, 3, 24, 24) * 3).abs().to(device, dtype)
        assert_equal_outputs(tiny.to(device), drop_in(tiny, backend=backend).to(device), pixel_values)

    def test_lazily_negated_pixels(self, tiny, pixels, backend, device):
        """A view whose memory holds the opposite sign."""
        negated = torch.complex(pixels, -pixels).conj().imag.to(device)
        assert negated.is_neg() or device == "cuda"
        assert_equal_outputs(tiny.to(device), drop_in(tiny, backend=backend).to(device), negated)

    def test_a_nan_image_stays_alone(self, tiny, pixels, backend, device):
        pixels[1, 0, 3, 3] = float("nan")
        ours = drop_in(tiny, backend=backend).to(device)
        with torch.no_grad():
            actual, expected = ours(pixels.to(device)), tiny.to(device)(pixels.to(device))
        for name in ("last_hidden_state", "pooler_output"):
            assert torch.equal(getattr(actual, name).isnan(), getattr(expected, name).isnan())
            assert getattr(actual, name)[1].isnan().all() and not getattr(actual, name)[0].isnan().any()

    def test_same_bits_every_time(self, tiny, pixels, backend, device):
        ours = drop_in(tiny, backend=backend).to(device)
        with torch.no_grad():
            first, second = ours(pixels.to(device)), ours(pixels.to(device))
        assert torch.equal(first.last_hidden_state, second.last_hidden_state)
        assert torch.equal(first.pooler_output, second.pooler_output)

    def test_outputs_are_not_overwritten_by_the_next_call(self, tiny, pixels):
        ours = drop_in(tiny)
        with torch.no_grad():
            first = ours(pixels)
            kept = first.last_hidden_state.clone(), first.pooler_output.clone()
            ours(pixels * 2)
        assert torch.equal(first.last_hidden_state, kept[0]) and torch.equal(first.pooler_output, kept[1])

    def test_contiguous(self, tiny, pixels):
        with torch.no_grad():
            assert drop_in(tiny)(pixels).last_hidden_state.is_contiguous()


class TestWrongInput:
    @pytest.mark.parametrize(
        "shape, message",
        [
            ((3, 24, 24), r"expected shape \[batch, 3, height, width\], got \[3, 24, 24\]"),
            ((2, 4, 24, 24), r"expected shape \[batch, 3, height, width\], got \[2, 4, 24, 24\]"),
            ((1, 3, 7, 24), "expected at least one patch of 8×8 pixels, got 7×24"),
            ((1, 3, 32, 32), "32×32 pixels are 16 patches of 8×8, but the model has 9 positions"),
        ],
    )
    def test_shapes(self, tiny, shape, message):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            drop_in(tiny)(torch.randn(shape))

    def test_empty_batch_is_stocks(self, tiny, pixels):
        """An error or empty outputs, by its version."""
        outcomes = []
        for model in (tiny, drop_in(tiny)):
            with torch.no_grad():
                try:
                    outcomes.append(model(pixels[:0]).pooler_output.shape)
                except RuntimeError as error:
                    outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]

    def test_no_tensor(self, tiny):
        with torch.no_grad(), pytest.raises(TypeError, match="pixel_values: expected a torch.Tensor, got list"):
            drop_in(tiny)([1, 2])

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match="backend: expected one of auto, triton, cpu, torch, got 'cuda'"):
            SiglipVisionModel(SiglipVisionConfig(**TINY), backend="cuda")

    def test_backend_of_the_environment(self, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_BACKEND", "torch")
        assert SiglipVisionModel(SiglipVisionConfig(**TINY)).backend_for("cpu") == "torch"
        assert SiglipVisionModel(SiglipVisionConfig(**TINY), backend="cpu").backend_for("cpu") == "cpu"


class TestLoading:
    def test_state_dict_is_stocks(self, tiny):
        assert {k: v.shape for k, v in drop_in(tiny).state_dict().items()} == {
            k: v.shape for k, v in tiny.state_dict().items()
        }

    def test_save_pretrained_both_ways(self, tiny, pixels, tmp_path):
        tiny.save_pretrained(tmp_path / "stock")
        ours = SiglipVisionModel.from_pretrained(tmp_path / "stock", strict=True)
        with torch.no_grad():
            torch.testing.assert_close(ours(pixels)[:], tiny(pixels)[:], atol=1e-5, rtol=0)
        ours.save_pretrained(tmp_path / "ours")
        back = transformers.SiglipVisionModel.from_pretrained(tmp_path / "ours")
        assert all(torch.equal(v, back.state_dict()[k]) for k, v in tiny.state_dict().items())
        assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "stock/config.json").read_text()

    def test_options_of_from_pretrained(self, tiny, tmp_path):
        tiny.save_pretrained(tmp_path)
        ours = SiglipVisionModel.from_pretrained(tmp_path, backend="torch", strict=True, dtype=torch.bfloat16)
        assert (ours.backend, ours.strict, ours.dtype) == ("torch", True, torch.bfloat16)

    def test_vision_weights_inside_a_full_checkpoint(self, tiny, pixels, tmp_path):
        text = {k: v for k, v in TINY.items() if "size" in k or "num" in k} | {"vocab_size": 50}
        full = transformers.SiglipModel(SiglipConfig(text_config=text, vision_config=TINY)).eval()
        full.save_pretrained(tmp_path)
        ours = SiglipVisionModel.from_pretrained(tmp_path)
        with torch.no_grad():
            expected, actual = full.vision_model(pixels), ours(pixels)
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)

    def test_composite_checkpoint_of_the_nested_layout(self, pixels, tmp_path):
        """Keys as transformers < 5.6 wrote them, `vision_tower.vision_model.…`, into a composite around our tower."""
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
        config = transformers.LlavaConfig(
            vision_config=SiglipVisionConfig(**TINY, vision_use_head=False),
            text_config=transformers.LlamaConfig(**text, num_attention_heads=2, num_key_value_heads=2),
        )
        stock = transformers.LlavaForConditionalGeneration(config)
        stock.save_pretrained(tmp_path)
        old = {
            re.sub(r"vision_tower\.(?!vision_model)", "vision_tower.vision_model.", key): value
            for key, value in load_file(tmp_path / "model.safetensors").items()
        }
        save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
        towers = transformers.AutoModel._model_mapping._extra_content
        # Not AutoModel.register, which some versions of transformers (5.17) ignore for configs of their own.
        with mock.patch.dict(towers, {SiglipVisionConfig: SiglipVisionModel}):
            ours = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
        (tower,) = (m for m in ours.modules() if isinstance(m, SiglipVisionModel))
        (stock_tower,) = (m for m in stock.modules() if isinstance(m, transformers.SiglipVisionModel))
        with torch.no_grad():
            torch.testing.assert_close(tower(pixels)[0], stock_tower(pixels)[0], atol=1e-5, rtol=0)

    def test_copies_and_pickles(self, tiny, pixels, tmp_path):
        ours = drop_in(tiny)
        with torch.no_grad():
            expected = ours(pixels).pooler_output
            copied = copy.deepcopy(ours)
            assert torch.equal(copied(pixels).pooler_output, expected)
            copied.get_input_embeddings().weight.zero_()
            assert torch.equal(ours(pixels).pooler_output, expected)
            assert not torch.equal(copied(pixels).pooler_output, expected)
            torch.save(ours, tmp_path / "model.pt")
            assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(pixels)[1], expected)


class TestTraining:
    @pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
    def test_gradients_equal_stocks(self, tiny, pixels, checkpointing):
        ours = drop_in(tiny)
        tiny.config._attn_implementation = "sdpa"
        gradients = []
        for model in (tiny, ours):
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            x = pixels.clone().requires_grad_()
            model(x).pooler_output.square().sum().backward()
            gradients.append([x.grad, *(p.grad for p in model.parameters())])
        for actual, expected in zip(gradients[1], gradients[0], strict=True):
            assert torch.equal(actual, expected)

    def test_uncounted_step_between_two_inferences(self, tiny, pixels):
        """`p.data.add_` leaves no trace, but the backward pass before it came through our forward."""
        ours = drop_in(tiny)
        for model in (ours, tiny):
            with torch.no_grad():
                model(pixels)
            model(pixels).pooler_output.square().sum().backward()
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-0.01)
        with torch.no_grad():
            assert ours.why_not(pixels) is None
            torch.testing.assert_close(ours(pixels)[:], tiny(pixels)[:], atol=1e-4, rtol=0)

    def test_gradient_of_the_pixels_alone(self, tiny, pixels):
        ours = drop_in(tiny).requires_grad_(False)
        ours(pixels.requires_grad_()).last_hidden_state.sum().backward()
        assert pixels.grad is not None

    def test_forward_mode_derivative_delegates(self, tiny, pixels):
        ours = drop_in(tiny).requires_grad_(False)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(pixels, torch.ones_like(pixels))
            assert "forward-mode" in ours.why_not(dual)

    def test_frozen_model_is_fused_with_gradients_enabled(self, tiny, pixels):
        ours = drop_in(tiny).requires_grad_(False)
        assert ours.why_not(pixels) is None
        assert not ours(pixels).last_hidden_state.requires_grad
