"""Under torch.autocast the fused path runs in its dtype, and gives what stock gives there: dtypes, and as small an error."""

import copy
import importlib.util

import pytest
import reference
import torch
from models import TINY, drop_in, stock_model
from packed_towers import naflex_inputs
from stock_towers import without_neutral_values
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig

from siglip_fast import apply_to
from siglip_fast.ops import Ops

REAL_WIDTH = SiglipVisionConfig(num_hidden_layers=3, image_size=64)  # of B/16
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def stock():
    return stock_model(SiglipVisionConfig(**TINY), "sdpa")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["torch", "cpu"])
def backend(request) -> str:  # Triton runs no bf16 here; tests/kernels/test_float32_stream.py has its operations
    return request.param


def assert_like_stock(ours, stock, pixels, **kwargs):
    actual, expected = ours(pixels, **kwargs), stock(pixels, **kwargs)
    assert actual.keys() == expected.keys()
    for a, b in zip(
        torch.utils._pytree.tree_leaves(dict(actual)), torch.utils._pytree.tree_leaves(dict(expected)), strict=True
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_accuracy(backend):
    stock = stock_model(REAL_WIDTH, "sdpa")
    ours = drop_in(stock, backend=backend, strict=True)
    pixels = torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(stock).double()(pixels.double())
    with torch.autocast("cpu", BF16):
        actual, same = ours(pixels), stock(pixels)
    for name in ("last_hidden_state", "pooler_output"):
        reference.assert_accurate(actual[name], exact[name], same[name])
    means = [output.last_hidden_state.mean(1) for output in (actual, exact, same)]
    reference.assert_accurate(*means)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_dtypes_are_stocks(attention, backend, pixels):
    stock = stock_model(SiglipVisionConfig(**TINY), attention)
    ours = drop_in(stock, backend=backend, strict=True)
    for given in (pixels, pixels.to(BF16), pixels.double()):
        with torch.autocast("cpu", BF16):
            assert_like_stock(ours, stock, given, output_hidden_states=True)


@torch.no_grad()
def test_regions_in_regions(stock, pixels):
    ours = drop_in(stock, strict=True)
    exact = stock(pixels)
    with torch.autocast("cpu", BF16):
        assert_like_stock(ours, stock, pixels)
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(ours(pixels)[:], exact[:])
            with torch.autocast("cpu", BF16, cache_enabled=False):
                assert_like_stock(ours, stock, pixels)
        first = ours(pixels)
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(ours(pixels)[:], exact[:])
    with torch.autocast("cpu", BF16):
        assert torch.equal(ours(pixels).pooler_output, first.pooler_output)


@torch.no_grad()
def test_weights_stay_and_their_copies_are_counted(stock, pixels):
    ours = drop_in(stock, backend="torch", strict=True)
    before = {name: (tensor, tensor.clone()) for name, tensor in ours.state_dict(keep_vars=True).items()}
    ours(pixels)
    alone = ours.derived_bytes()
    with torch.autocast("cpu", BF16):
        ours(pixels)
    parameters = sum(p.numel() for p in ours.parameters())
    assert alone < ours.derived_bytes() <= alone + 2.5 * parameters
    after = ours.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is same and torch.equal(same, value) for name, (same, value) in before.items())


@torch.no_grad()
def test_edits_are_seen_in_both(pixels):
    stock = stock_model(SiglipVisionConfig(**TINY), "sdpa")
    ours = drop_in(stock, strict=True)
    ours(pixels)
    with torch.autocast("cpu", BF16):
        ours(pixels)
    for model in (ours, stock):
        tower = getattr(model, "vision_model", model)
        tower.encoder.layers[0].mlp.fc1.weight.mul_(3)
        tower.post_layernorm.weight.add_(1)
    with torch.autocast("cpu", BF16):
        assert_like_stock(ours, stock, pixels)
    torch.testing.assert_close(ours(pixels)[:], stock(pixels)[:])


@torch.no_grad()
def test_only_what_can_run_is_kept(pixels):
    ours = drop_in(stock_model(SiglipVisionConfig(**TINY), "sdpa"))
    ours(pixels)
    with torch.autocast("cpu", torch.float16):
        ours.why_not(pixels)
    assert list(ours._derived) == [None]
    tower = getattr(ours, "vision_model", ours)
    tower.encoder.layers[0].mlp.fc1.weight.mul_(3)
    with torch.autocast("cpu", BF16):
        ours(pixels)
    assert list(ours._derived) == [BF16]  # the other was out of date


@torch.no_grad()
def test_bytes_and_interpolated_positions(stock):
    ours = drop_in(stock, strict=True)
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    with torch.autocast("cpu", BF16):
        expected = stock((images / 255 - 0.5) / 0.5)
        actual = ours.forward_uint8(images)
        assert actual.pooler_output.dtype == expected.pooler_output.dtype
        torch.testing.assert_close(actual[:], expected[:], atol=0.05, rtol=0.05)
        assert_like_stock(ours, stock, torch.randn(1, 3, 16, 32), interpolate_pos_encoding=True)


@torch.no_grad()
def test_what_is_left_to_stock(stock, pixels):
    ours, half = drop_in(stock), drop_in(copy.deepcopy(stock).to(BF16))
    with torch.autocast("cpu", torch.float16):
        assert ours.why_not(pixels) == "autocast to torch.float16 is active on cpu"
        assert_like_stock(ours, stock, pixels)
    with torch.autocast("cpu", BF16):
        assert half.why_not(pixels) == "autocast to torch.bfloat16 is active on torch.bfloat16 parameters"
    with torch.autocast("cpu", BF16), torch.enable_grad():
        assert "gradients are needed" in ours.why_not(pixels)
        assert ours(pixels).pooler_output.requires_grad


@pytest.fixture(scope="module")
def naflex():
    torch.manual_seed(0)
    config = Siglip2VisionConfig(num_hidden_layers=3)  # of base
    config._attn_implementation = "sdpa"
    return without_neutral_values(Siglip2VisionModel(config).eval())


@pytest.fixture(scope="module")
def images():
    return naflex_inputs([(5, 7), (3, 3), (6, 8)], rows=48, patch=768)


class TestNaFlex:
    """SigLIP 2's tower for images of any size."""

    @torch.no_grad()
    def test_accuracy(self, naflex, images, backend):
        ours = apply_to(copy.deepcopy(naflex), backend=backend, strict=True)
        exact = copy.deepcopy(naflex).double()(**images | {"pixel_values": images["pixel_values"].double()})
        with torch.autocast("cpu", BF16):
            actual, same = ours(**images), naflex(**images)
        for name in ("last_hidden_state", "pooler_output"):
            reference.assert_accurate(actual[name], exact[name], same[name])

    @pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
    @torch.no_grad()
    def test_dtypes_are_stocks(self, naflex, images, dtype, backend):
        ours = apply_to(copy.deepcopy(naflex), backend=backend, strict=True)
        given = images | {"pixel_values": images["pixel_values"].to(dtype)}
        with torch.autocast("cpu", BF16):
            actual, expected = (model(**given, output_hidden_states=True) for model in (ours, naflex))
        assert actual.keys() == expected.keys()
        for a, b in zip(*(torch.utils._pytree.tree_leaves(dict(o)) for o in (actual, expected)), strict=True):
            assert a.dtype == b.dtype
            assert reference.relative_error(a, b) < 0.05

    @torch.no_grad()
    def test_operations_choose_their_own_dtypes(self, naflex, images, monkeypatch):
        modes, own = [], Ops.layernorm
        note = lambda self, *args: modes.append(torch.is_autocast_enabled("cpu")) or own(self, *args)  # noqa: E731
        monkeypatch.setattr(Ops, "layernorm", note)
        with torch.autocast("cpu", BF16):
            apply_to(copy.deepcopy(naflex), strict=True)(**images)
        assert modes == [False]

    @torch.no_grad()
    def test_weights_of_both_dtypes(self, naflex, images):
        ours = apply_to(copy.deepcopy(naflex), strict=True)
        outside = ours(**images).pooler_output
        with torch.autocast("cpu", BF16):
            inside = ours(**images).pooler_output
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(ours(**images).pooler_output, outside)
            getattr(ours, "vision_model", ours).post_layernorm.weight.mul_(3)
            assert not torch.equal(ours(**images).pooler_output, inside)
        assert not torch.equal(ours(**images).pooler_output, outside)

    @torch.no_grad()
    def test_what_is_left_to_stock(self, naflex, images):
        ours = apply_to(copy.deepcopy(naflex))
        with torch.autocast("cpu", torch.float16):
            assert ours.why_not(**images) == "autocast to torch.float16 is active on cpu"
        with torch.autocast("cpu", BF16), torch.enable_grad():
            assert "gradients are needed" in ours.why_not(**images)


@torch.no_grad()
def test_in_a_model_around(pixels):
    import zoo

    model, inputs = zoo.siglip()
    stock = copy.deepcopy(model)
    apply_to(model, strict=True)
    with torch.autocast("cpu", BF16):
        actual, expected = (m.get_image_features(inputs["pixel_values"]) for m in (model, stock))
    actual, expected = (getattr(features, "pooler_output", features) for features in (actual, expected))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
@torch.no_grad()
def test_timm(pixels):
    from without_torchvision import torchvision_or_empty_modules

    with torchvision_or_empty_modules():
        import timm
    torch.manual_seed(0)
    stock = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, depth=2, img_size=32).eval()
    ours = apply_to(copy.deepcopy(stock), strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", BF16):
        for method in ("forward", "forward_features"):
            actual, expected = getattr(ours, method)(images), getattr(stock, method)(images)
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)
