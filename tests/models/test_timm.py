"""timm's SigLIP, alone and as the image tower of open_clip, after `apply_to`: the same model, fused."""

import contextlib
import copy
import functools
import inspect
import json
import pickle
from unittest import mock

import pytest
import torch
from models import TINY, stock_model
from peers import timm_state
from torch import nn
from transformers import SiglipVisionConfig
from without_torchvision import torchvision_or_empty_modules

from siglip_fast import apply_to, restore, towers
from siglip_fast.ops import Ops

with torchvision_or_empty_modules():
    timm = pytest.importorskip("timm", minversion="1.0.15", reason="timm 1.0.15 or newer is not installed")
    with contextlib.suppress(ImportError):
        import open_clip
    from timm.layers import SwiGLU
    from timm.layers.activations import GELUTanh
    from timm.models import vision_transformer
    from timm.models.vision_transformer import VisionTransformer

# The sizes of models.TINY
SIZES = {"img_size": 24, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 100.5 / 64}
SIGLIP = {"class_token": False, "global_pool": "map", "num_classes": 0, "act_layer": "gelu_tanh"}
MAKE = {
    "class": functools.partial(VisionTransformer, **SIGLIP),
    "create_model": functools.partial(
        timm.create_model, "vit_base_patch16_siglip_224", num_classes=0, act_layer="gelu_tanh"
    ),
    "classifier": functools.partial(VisionTransformer, **SIGLIP | {"num_classes": 5}),
    "mean of the tokens": functools.partial(timm.create_model, "vit_base_patch32_siglip_gap_256", num_classes=0),
    "a larger image": functools.partial(VisionTransformer, **SIGLIP, img_size=(30, 43)),
}


def with_weights(model: nn.Module) -> nn.Module:
    """Nothing is left at its neutral value."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name and name.endswith("weight")
        nn.init.normal_(parameter, 1.0 if is_gain else 0.0, 0.2)
    return model.eval()


def tiny(**settings) -> VisionTransformer:
    return with_weights(VisionTransformer(**SIZES | SIGLIP | settings))


def fast(stock: nn.Module, **kwargs) -> nn.Module:
    model = copy.deepcopy(stock)
    apply_to(model, **kwargs)
    return model


def calls(model: nn.Module, *args) -> int:
    """How many operations a forward of the model ran."""
    with mock.patch.object(Ops, "layernorm_linear", autospec=True, side_effect=Ops.layernorm_linear) as spy:
        model(*args)
    return spy.call_count


@pytest.fixture
def stock():
    return tiny()


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(2, 3, 24, 24)


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_outputs(name, backend, device):
    make = MAKE[name]
    stock = with_weights(make(**SIZES | getattr(make, "keywords", {}))).to(device)
    ours = fast(stock, backend=backend, strict=True)
    pixels = torch.randn(3, 3, *stock.patch_embed.img_size, device=device)
    for forward in ("forward", "forward_features"):
        expected, actual = (getattr(model, forward)(pixels) for model in (stock, ours))
        assert actual.shape == expected.shape
        assert (actual - expected).norm() <= 1e-4 * expected.norm()
    assert calls(ours, pixels) == 2 * len(stock.blocks) + (stock.attn_pool is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_accuracy_in_16_bits(dtype, backend, device, pixels, stock):
    stock, pixels = stock.to(device, dtype), pixels.to(device, dtype)
    exact = copy.deepcopy(stock).double()(pixels.double())
    ours = fast(stock, backend=backend, strict=True)
    theirs, actual = (model(pixels).double() for model in (stock, ours))
    assert (actual - exact).norm() <= 2 * (theirs - exact).norm() + 1e-6 * exact.norm()


@torch.no_grad()
def test_weights_of_transformers(pixels):
    stock = stock_model(SiglipVisionConfig(**TINY))
    model = tiny()
    model.load_state_dict(timm_state(stock.state_dict()))
    ours = fast(model, strict=True)
    torch.testing.assert_close(ours(pixels), stock(pixels).pooler_output, atol=1e-4, rtol=0)
    expected = stock(pixels).last_hidden_state
    torch.testing.assert_close(ours.forward_features(pixels), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_in_place_and_back(stock, pixels):
    model = nn.ModuleDict({"tower": copy.deepcopy(stock)})
    tower, parameters, state = model["tower"], list(model.parameters()), model.state_dict()
    apply_to(model, strict=True)
    tower(pixels)
    assert model["tower"] is tower and isinstance(tower, VisionTransformer)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    restore(model)
    assert type(tower) is VisionTransformer and vars(tower).keys() == vars(stock).keys()
    assert torch.equal(tower(pixels), stock(pixels))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies(copied, stock, pixels):
    ours = fast(stock, strict=True)
    expected = ours(pixels)
    twin = copied(ours)
    ours.blocks[0].attn.qkv.weight.zero_()
    assert torch.equal(twin(pixels), expected) and calls(twin, pixels)


def test_gradients_are_timms(stock, pixels):
    ours = fast(stock)
    for model in (stock, ours):
        model(pixels).square().sum().backward()
    for (name, expected), actual in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad), name
    assert calls(ours, pixels) == 0


EDITS = {
    "position": lambda model: model.pos_embed.mul_(2),
    "qkv": lambda model: model.blocks[1].attn.qkv.weight[:64].mul_(3),
    "latent": lambda model: model.attn_pool.latent.mul_(3),
    "kv": lambda model: model.attn_pool.kv.weight.mul_(2),
    "eps": lambda model: setattr(model.norm, "eps", 0.5),
    "a new norm": lambda model: setattr(model, "norm", type(model.norm)(64, eps=0.1)),
    "no pool": lambda model: model.reset_classifier(0, "avg"),
    "a new classifier": lambda model: model.reset_classifier(64) or model.head.weight.copy_(torch.eye(64)),
    "state dict": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}),
    "another size": lambda model: model.set_input_size((24, 24), patch_size=(12, 12)),
}


@pytest.mark.parametrize("name", EDITS)
@torch.no_grad()
def test_edits_are_seen(name, stock, pixels):
    ours = fast(stock, strict=True)
    before = ours(pixels)
    for model in (stock, ours):
        torch.manual_seed(2)
        EDITS[name](model)
    expected = stock(pixels)
    assert (ours(pixels) - expected).norm() <= 1e-4 * expected.norm()
    assert name == "a new classifier" or not torch.allclose(before, expected, rtol=1e-2)


SETTINGS = {
    "act_layer": "relu",
    "attn_drop_rate": 0.1,
    "attn_layer": "diff",
    "block_fn": vision_transformer.ResPostBlock,
    "class_token": True,
    "drop_path_rate": 0.1,
    "dynamic_img_pad": True,
    "dynamic_img_size": True,
    "embed_norm_layer": "layernorm",
    "final_norm": False,
    "global_pool": "avg",
    "init_values": 0.1,
    "mlp_layer": SwiGLU,
    "norm_layer": "rmsnorm",
    "num_heads": 1,
    "patch_drop_rate": 0.1,
    "patch_size": (8, 4),
    "pos_drop_rate": 0.1,
    "pos_embed": "none",
    "pre_norm": True,
    "proj_bias": False,
    "proj_drop_rate": 0.1,
    "qk_norm": True,
    "qkv_bias": False,
    "reg_tokens": 1,
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
}


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_other_settings_are_timms(name, pixels):
    if name not in inspect.signature(VisionTransformer).parameters:
        pytest.skip("of a later version of timm")
    settings = {name: SETTINGS[name]}
    if name == "num_heads":
        settings["embed_dim"] = 144  # wider than the kernel takes
    stock = tiny(**settings)
    ours = fast(stock)
    if name in ("class_token", "reg_tokens"):
        assert type(ours) is VisionTransformer and towers(ours)[0].reason.startswith("it has a class token")
    else:
        assert ours.why_not(pixels)
    assert calls(ours, pixels) == 0
    assert torch.equal(ours(pixels), stock(pixels))
    assert torch.equal(ours.forward_features(pixels), stock.forward_features(pixels))


def double(module: nn.Module, name: str = "forward") -> None:
    stock = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: 2 * stock(*args, **kwargs))


class Headless(nn.Module):
    def forward(self, x, **kwargs):
        return x.cumsum(1)


CHANGES = {
    "hook": lambda model: model.blocks[1].attn.register_forward_hook(lambda *args: 2 * args[-1]),
    "hook on the classifier": lambda model: model.head.register_forward_hook(lambda *args: 2 * args[-1]),
    "forward of a block": lambda model: double(model.blocks[0]),
    "forward_features": lambda model: double(model, "forward_features"),
    "forward_head": lambda model: double(model, "forward_head"),
    "pool": lambda model: double(model, "pool"),
    "_pos_embed": lambda model: double(model, "_pos_embed"),
    "activation of the head": lambda model: setattr(model.attn_pool.mlp, "act", nn.ReLU()),
    "one layer's scale": lambda model: setattr(model.blocks[1], "ls1", nn.Hardtanh()),
    "norm_pre": lambda model: setattr(model, "norm_pre", nn.Hardtanh()),
    "a class token": lambda model: setattr(model, "cls_token", nn.Parameter(torch.ones(1, 1, 64))),
    "norm of the queries": lambda model: setattr(model.attn_pool, "q_norm", nn.Hardtanh()),
    "another linear": lambda model: setattr(model.blocks[0].mlp, "fc1", nn.Sequential(model.blocks[0].mlp.fc1, nn.ReLU())),
    "an mlp without linear": lambda model: setattr(model.blocks[0], "mlp", nn.Hardtanh()),
    "an attention without heads": lambda model: setattr(model.blocks[0], "attn", Headless()),
    "no final norm": lambda model: setattr(model, "norm", nn.Identity()),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changed_models_are_timms(name, when, stock, pixels):
    """Also where the change comes after a fused forward."""
    ours = fast(stock)
    if when == "after":
        ours(pixels)
    for model in (stock, ours):
        torch.manual_seed(2)
        CHANGES[name](model)
        if name == "a class token":
            model.no_embed_class = True
    assert ours.why_not(pixels)
    assert torch.equal(ours(pixels), stock(pixels))


@pytest.mark.parametrize("name", ["forward_features", "forward_head", "_pos_embed", "pool"])
@torch.no_grad()
def test_patched_classes_are_timms(name, stock, pixels, monkeypatch):
    ours = fast(stock)
    ours(pixels)
    original = getattr(VisionTransformer, name)
    monkeypatch.setattr(VisionTransformer, name, lambda self, *a, **k: 2 * original(self, *a, **k))
    assert ours.why_not(pixels) == f"{name} is replaced"
    assert torch.equal(ours(pixels), stock(pixels))


@torch.no_grad()
def test_what_else_timm_has(stock, pixels):
    ours = fast(stock)
    for call in (
        lambda model: model.forward_intermediates(pixels, 2, norm=True, intermediates_only=True),
        lambda model: model.get_intermediate_layers(pixels, 2),
        lambda model: model.forward_head(stock.forward_features(pixels)),
        lambda model: torch.compile(model, backend="eager", fullgraph=True)(pixels),
        lambda model: torch.export.export(model, (pixels,)).module()(pixels),
    ):
        torch.testing.assert_close(call(ours), call(stock), atol=0, rtol=0)


@torch.no_grad()
def test_masks_are_timms(stock, pixels):
    if "attn_mask" not in inspect.signature(VisionTransformer.forward).parameters:
        pytest.skip("of a later version of timm")
    ours, mask = fast(stock), torch.eye(9, dtype=torch.bool)
    assert torch.equal(ours(pixels, attn_mask=mask), stock(pixels, attn_mask=mask))
    assert torch.equal(ours.forward_features(pixels, mask), stock.forward_features(pixels, mask))
    assert "mask" in ours.why_not(pixels, attn_mask=mask)
    assert ours.why_not(pixels, attn_mask=None) is None


@pytest.mark.parametrize("wrong", [(2, 3, 32, 24), (2, 1, 24, 24), (3, 24, 24)], ids=str)
@torch.no_grad()
def test_wrong_images_raise_what_timm_raises(wrong, stock):
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011
        stock(torch.randn(wrong))
    with pytest.raises(expected.type) as actual:
        fast(stock)(torch.randn(wrong))
    assert str(actual.value) == str(expected.value)


@torch.no_grad()
def test_images_of_another_dtype_raise_what_timm_raises(stock, pixels):
    with pytest.raises(RuntimeError, match="should be the same"):
        fast(stock.bfloat16())(pixels)


@torch.no_grad()
def test_exact_gelu(pixels, backend):
    """Most of timm's SigLIP has it by default, though SigLIP was trained with the other."""
    stock = tiny(act_layer="gelu")
    for block in stock.blocks:  # wide enough for the two to differ
        block.mlp.fc1.weight.mul_(3)
    expected, ours = stock(pixels), fast(stock, backend=backend, strict=True)
    torch.testing.assert_close(ours(pixels), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.forward_features(pixels), stock.forward_features(pixels), atol=1e-4, rtol=1e-4)
    for mlp in (*(block.mlp for block in stock.blocks), stock.attn_pool.mlp):
        mlp.act = GELUTanh()
    assert not torch.allclose(stock(pixels), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_two_kinds_of_gelu_delegate(stock, pixels):
    stock.attn_pool.mlp.act = nn.GELU()
    ours = fast(stock)
    assert "attn_pool.mlp.act" in ours.why_not(pixels)
    assert torch.equal(ours(pixels), stock(pixels))


class TestOpenClip:
    @pytest.fixture
    def model(self, tmp_path, monkeypatch):
        """open_clip's own construction from a config, of timm's own model; both tiny."""
        if "open_clip" not in globals():
            pytest.skip("open_clip is not installed")
        name = "ViT-tiny-SigLIP"
        config = open_clip.get_model_config("ViT-L-16-SigLIP2-512")
        config["embed_dim"] = config["text_cfg"]["width"] = 64
        config["vision_cfg"]["image_size"] = 24
        config["text_cfg"] |= {"layers": 1, "heads": 4, "vocab_size": 100, "context_length": 8}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path])
        monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
        open_clip.add_model_config(tmp_path / f"{name}.json")
        monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **SIZES))
        return with_weights(open_clip.create_model(name))

    @torch.no_grad()
    def test_encode_image(self, model, pixels):
        expected, text = model.encode_image(pixels, normalize=True), torch.arange(8)[None]
        expected_text = model.encode_text(text)
        apply_to(model, strict=True)
        assert calls(model.encode_image, pixels) == 5
        torch.testing.assert_close(model.encode_image(pixels, normalize=True), expected, atol=1e-5, rtol=0)
        assert torch.equal(model.encode_text(text), expected_text)

    @torch.no_grad()
    def test_in_16_bits(self, model, pixels):
        model.to(torch.bfloat16)
        expected = model.encode_image(pixels.bfloat16())
        apply_to(model, strict=True)
        actual = model.encode_image(pixels.bfloat16())
        assert (actual - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("head", ["class", "classifier", "mean of the tokens"])
@pytest.mark.parametrize("batch_invariant", [True, False])
@torch.no_grad()
def test_batch_invariant(head, batch_invariant, pixels, monkeypatch):
    """What timm computes behind the tower, too: with a library whose results depend on the number of rows."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *args: linear(x, *args) + 1e-3 * x[..., 0].numel())
    settings = {
        "class": {},
        "classifier": {"num_classes": 5},
        "mean of the tokens": {"num_classes": 5, "global_pool": "avg", "fc_norm": False},
    }[head]
    model, images = fast(tiny(**settings), strict=True, backend="torch", batch_invariant=batch_invariant), pixels
    for forward in (model, model.forward_features):
        rows = forward(images)
        equal = [torch.equal(forward(images[i : i + 1])[0], row) for i, row in enumerate(rows)]
        assert equal == [batch_invariant] * len(images)
