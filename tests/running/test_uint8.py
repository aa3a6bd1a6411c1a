"""forward_uint8 against the image processor's own arithmetic, and the folded patch embedding against float64."""

import numpy
import pytest
import reference
import torch
import transformers
from models import TINY, drop_in, stock_model
from transformers import SiglipVisionConfig

from siglip_fast import SiglipVisionModel
from siglip_fast.ops import Ops, PatchEmbedding
from siglip_fast.running.uint8 import normalization

SIGLIP = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5), "rescale_factor": 1 / 255}
IMAGENET = SIGLIP | {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
# means far outside of what bytes can be, deviations far apart: a fold that is a little wrong is very wrong here
WILD = {"image_mean": (-2.0, 0.1, 3.0), "image_std": (0.03, 2.5, -0.3), "rescale_factor": 1 / 128}
# white is 0: whatever the shift and the products do not agree on is all that remains of a white image
BRIGHT = SIGLIP | {"image_mean": (1.0, 1.0, 1.0), "image_std": (0.02, 0.027, 0.033)}
NORMALIZATIONS = pytest.mark.parametrize(
    "settings", [SIGLIP, IMAGENET, WILD, BRIGHT], ids=["siglip", "imagenet", "wild", "bright"]
)


def normalized(images, image_mean, image_std, rescale_factor):
    mean, std = torch.tensor([image_mean, image_std], dtype=torch.float64, device=images.device)
    return (images.double() * rescale_factor - mean[:, None, None]) / std[:, None, None]


def random_images(*shape):
    torch.manual_seed(2)
    return torch.randint(0, 256, shape, dtype=torch.uint8)


IMAGES = {
    "random": random_images(2, 3, 40, 28),
    "black": torch.zeros(2, 3, 40, 28, dtype=torch.uint8),
    "white": torch.full((2, 3, 40, 28), 255, dtype=torch.uint8),
    "channels-last": random_images(2, 40, 28, 3).permute(0, 3, 1, 2),
    "cropped": random_images(2, 3, 50, 40)[:, :, 3:43, 5:33],
}


class TestOperation:
    @NORMALIZATIONS
    @pytest.mark.parametrize("name", IMAGES)
    @pytest.mark.parametrize("backend", ["triton"])
    def test_accuracy(self, name, settings, dtype, backend, device):
        """Against the processor's float32 pixels, as stock takes them, by the accuracy rule."""
        if not normalization(**settings, channels=3).folds(dtype):
            pytest.skip("not folded: see test_what_would_cancel_in_float32_is_not_folded")
        images, p, D = IMAGES[name].to(device), 14, 72
        torch.manual_seed(0)
        weight = (torch.randn(D, 3, p, p) * (3 * p * p) ** -0.5).to(device, dtype)
        bias = torch.randn(D).to(device, dtype)
        position = torch.randn(4, D).to(device, dtype)
        patch = normalization(**settings, channels=3).fold(PatchEmbedding(weight.flatten(1), bias, p))
        out, moments = Ops("triton").patch_embed(images, patch, position)
        pixels = normalized(images, **settings)
        expected = reference.patch_embed(pixels, weight, bias, position)
        cast = pixels.float().to(dtype)
        conv = torch.nn.functional.conv2d(cast, weight, bias, stride=p).flatten(2).transpose(1, 2)
        reference.assert_accurate(out, expected, conv + position)
        assert reference.relative_error(moments, reference.moments(out)) < 1e-6

    def test_equal_deviations_leave_the_weights_alone(self):
        patch = PatchEmbedding(torch.randn(8, 12).half(), torch.randn(8).half(), 2)
        assert torch.equal(normalization(**SIGLIP, channels=3).fold(patch).weight, patch.weight)

    @pytest.mark.parametrize("backend", ["torch", "cpu"])
    def test_other_backends_do_not_read_bytes(self, backend):
        patch = PatchEmbedding(torch.randn(8, 12), torch.randn(8), 2)
        with pytest.raises(TypeError, match="expected a floating dtype, got torch.uint8"):
            Ops(backend).patch_embed(random_images(1, 3, 4, 4), patch, torch.randn(4, 8))


def processor_pixels(photo, **settings):
    kind = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    processor = kind(do_resize=False, **settings)
    return processor(photo, return_tensors="pt", input_data_format="channels_last")["pixel_values"]


class TestModel:
    @pytest.mark.parametrize("settings", [SIGLIP, WILD], ids=["siglip", "wild"])
    @torch.no_grad()
    def test_a_photograph_through_the_processor(self, settings, dtype, backend, device):
        data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
        photo = numpy.ascontiguousarray(data.astronaut()[::21, ::21][:24, :24])
        pixels = processor_pixels(photo, **settings).to(device)
        exact = stock_model(SiglipVisionConfig(**TINY)).double().to(device)
        same_dtype = stock_model(SiglipVisionConfig(**TINY)).to(device, dtype)
        exact.load_state_dict(same_dtype.state_dict())
        ours = drop_in(same_dtype, backend=backend).to(device)
        images = torch.from_numpy(photo)[None].permute(0, 3, 1, 2).to(device)
        actual, expected, stocks = ours.forward_uint8(images, **settings), exact(pixels), same_dtype(pixels)
        for name in ("last_hidden_state", "pooler_output"):
            reference.assert_accurate(actual[name], expected[name], stocks[name])

    @torch.no_grad()
    def test_folded_weights_are_kept_and_vanish_with_the_others(self, device):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend="triton").to(device)
        images = random_images(1, 3, 24, 24).to(device)
        ours.forward_uint8(images)
        before, derived = ours.derived_bytes(), ours._derived[None]
        ours.forward_uint8(images, **IMAGENET)
        assert ours._derived.get(None) is derived and derived.for_uint8(normalization(**IMAGENET, channels=3)) is (
            derived.for_uint8(normalization(**IMAGENET, channels=3))
        )
        assert ours.derived_bytes() == before + 64 * (3 * 8 * 8 + 1) * 4
        ours.get_input_embeddings().weight.mul_(3)
        expected = ours((images / 255 - 0.5) / 0.5)
        torch.testing.assert_close(ours.forward_uint8(images)[:], expected[:], atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_what_would_cancel_in_float32_is_not_folded(self, device):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend="triton").to(device)
        white = torch.full((1, 3, 24, 24), 255, dtype=torch.uint8, device=device)
        expected = ours(normalization(**BRIGHT, channels=3)(white))
        assert torch.equal(ours.forward_uint8(white, **BRIGHT)[0], expected[0])
        assert not torch.equal(ours.forward_uint8(white)[0], ours(torch.ones(1, 3, 24, 24, device=device))[0])

    @torch.no_grad()
    def test_interpolated_positions_and_tuple(self, backend, device):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend=backend).to(device)
        images = random_images(2, 3, 40, 25).to(device)
        pixels = normalized(images, **SIGLIP).float()
        expected = ours(pixels, interpolate_pos_encoding=True, return_dict=False)
        actual = ours.forward_uint8(images, interpolate_pos_encoding=True, return_dict=False)
        assert type(actual) is tuple
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="40×25 pixels are 15 patches of 8×8, but the model has 9"):
            ours.forward_uint8(images)

    @torch.no_grad()
    def test_hidden_states(self, backend, device):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend=backend, strict=True).to(device)
        images = random_images(2, 3, 24, 24).to(device)
        expected = ours(normalized(images, **IMAGENET).float(), output_hidden_states=True)
        actual = ours.forward_uint8(images, **IMAGENET, output_hidden_states=True)
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states, atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_what_is_not_fused_gets_normalised_pixels(self, backend, device, caplog):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend=backend).to(device)
        images = random_images(2, 3, 24, 24).to(device)
        pixels = normalized(images, **IMAGENET).float()
        output = ours.forward_uint8(images, **IMAGENET, output_attentions=True)
        torch.testing.assert_close(output.pooler_output, ours(pixels).pooler_output, atol=1e-4, rtol=0)
        ours.strict = True
        with pytest.raises(RuntimeError, match="output_attentions was asked for"):
            ours.forward_uint8(images, **IMAGENET, output_attentions=True)

    @torch.no_grad()
    def test_hooks_on_the_model_run(self, backend, device):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend=backend).to(device)
        images = random_images(2, 3, 24, 24).to(device)
        plain = ours.forward_uint8(images)[0]
        ours.register_forward_hook(lambda module, args, output: output[0] + 1)
        torch.testing.assert_close(ours.forward_uint8(images), plain + 1, atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_a_subclass_around_the_forward(self, backend, device):
        class Zeroed(SiglipVisionModel):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                output.pooler_output.zero_()
                return output

        ours = Zeroed(SiglipVisionConfig(**TINY), backend=backend).eval().to(device)
        images = random_images(1, 3, 24, 24).to(device)
        assert not ours.forward_uint8(images).pooler_output.any()

    @torch.no_grad()
    def test_nothing_is_folded_inside_a_capture(self, device, monkeypatch):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend="triton").to(device)
        images = random_images(1, 3, 24, 24).to(device)
        expected = ours(normalized(images, **SIGLIP).float())
        monkeypatch.setattr("siglip_fast.models.weights.is_capturing", lambda tensor: True)
        actual = ours.forward_uint8(images)
        assert not ours._derived[None]._uint8
        torch.testing.assert_close(actual[:], expected[:], atol=1e-5, rtol=0)

    def test_gradients(self):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)))
        ours.forward_uint8(random_images(2, 3, 24, 24)).pooler_output.sum().backward()
        assert ours.get_input_embeddings().weight.grad is not None

    @torch.no_grad()
    def test_compiled(self, backend, device):
        torch._dynamo.reset()
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)), backend=backend).to(device)
        images = random_images(2, 3, 24, 24).to(device)
        compiled = torch.compile(ours.forward_uint8, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images)[:], ours.forward_uint8(images)[:], atol=1e-4, rtol=0)


class TestWrongInput:
    @pytest.mark.parametrize(
        "images, settings, error, message",
        [
            (torch.zeros(2, 3, 24, 24), {}, TypeError, r"images: expected torch.uint8, got torch.float32"),
            ([1], {}, TypeError, "images: expected a torch.Tensor, got list"),
            (random_images(3, 24, 24), {}, ValueError, r"images: expected shape \[any, 3, any, any\], got \[3, 24"),
            (random_images(2, 24, 24, 3), {}, ValueError, r"images: expected shape \[any, 3, any, any\], got \[2, 24"),
            (None, {"image_mean": 0.5}, TypeError, "image_mean: expected numbers, 3 of them, got 0.5"),
            (None, {"image_std": ("a", 1, 1)}, TypeError, "image_std: expected numbers, 3 of them"),
            (None, {"rescale_factor": None}, TypeError, r"rescale_factor: expected numbers, 1 of them, got \[None\]"),
            (None, {"image_mean": (0.5,)}, ValueError, r"image_mean: expected 3 values, .*got \[0.5\]"),
            (None, {"image_std": (0.5,) * 4}, ValueError, "image_std: expected 3 values"),
            (None, {"image_std": (0.5, 0, 1)}, ValueError, r"image_std: expected no zero, got \[0.5, 0, 1\]"),
            (None, {"image_mean": (0.5, float("nan"), 1)}, ValueError, "expected finite numbers"),
            (None, {"rescale_factor": 0}, ValueError, "rescale_factor: expected not zero"),
        ],
    )  # fmt: skip
    @torch.no_grad()
    def test_errors(self, images, settings, error, message):
        ours = drop_in(stock_model(SiglipVisionConfig(**TINY)))
        with pytest.raises(error, match=message):
            ours.forward_uint8(random_images(2, 3, 24, 24) if images is None else images, **settings)
