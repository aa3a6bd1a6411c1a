"""Swapped models in the hands of the libraries that change or move weights: fused where nothing of theirs is in the
way, delegated where something is, with the outputs that the stock model has in the same hands."""

import pytest
import torch
import transformers
import zoo
from torch import nn

import siglip_fast

TOLERANCE = 1e-4


@pytest.fixture
def attentions():
    with zoo.fused_attentions() as calls:
        yield calls


@pytest.fixture(params=["siglip", "paligemma", "llava", "smolvlm"])
def case(request):
    return zoo.build(request.param)


@pytest.fixture(params=["before", "after"])
def swapped(request):
    """`swapped(model, change)`: apply_to, and what the library does, in either order."""

    def both(model, change):
        if request.param == "before":
            changed = change(siglip_fast.apply_to(model))
            assert any(tower.fast for tower in siglip_fast.towers(changed))
            return changed
        return siglip_fast.apply_to(change(model))

    return both


def tower_of(model):
    return siglip_fast.towers(model)[0].module


def equal(actual, expected):
    return actual.keys() == expected.keys() and all(torch.equal(actual[n], expected[n]) for n in expected)


class TestPeft:
    @pytest.fixture
    def adapt(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")

        def adapt(model):
            config = peft.LoraConfig(target_modules=r".*vision.*(q_proj|fc1)")
            adapted = peft.get_peft_model(model, config)
            torch.manual_seed(3)
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter)
            return adapted.eval()

        return adapt

    def test_adapters_delegate_and_merged_ones_are_fused(self, case, swapped, adapt, attentions):
        model, inputs = case
        plain = zoo.run(model, inputs)
        adapted = swapped(model, adapt)
        expected = zoo.run(adapted, inputs)
        assert not attentions
        assert zoo.error(expected, plain) > 1000 * TOLERANCE
        merged = siglip_fast.apply_to(adapted.merge_and_unload(), strict=True)
        assert zoo.error(zoo.run(merged, inputs), expected) < TOLERANCE
        assert len(attentions) == 2

    def test_as_stock_adapted(self, case, adapt, attentions):
        model, inputs = case
        adapted = adapt(model)
        expected = zoo.run(adapted, inputs)
        siglip_fast.apply_to(adapted)
        assert equal(zoo.run(adapted, inputs), expected)
        assert not attentions
        with adapted.disable_adapter():  # the layers are still the library's
            assert zoo.error(zoo.run(adapted, inputs), expected) > 1000 * TOLERANCE
        assert not attentions

    def test_adapters_elsewhere_do_not_disturb(self, attentions):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model, inputs = zoo.build("paligemma")
        config = peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        expected = zoo.run(adapted, inputs)
        siglip_fast.apply_to(adapted)
        assert zoo.error(zoo.run(adapted, inputs), expected) < TOLERANCE
        assert len(attentions) == 2


# It reads its Linears' weights past their hooks
POOLING = ["SiglipMultiheadAttentionPoolingHead"]


def with_one_on_disk(accelerate, part, folder):
    """PaliGemma's parts in memory, but for one."""
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    places = dict.fromkeys(parts, "cpu") | {part: "disk"}
    return lambda model: accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


class TestAccelerate:
    @pytest.fixture
    def accelerate(self):
        return pytest.importorskip("accelerate", reason="accelerate is not installed")

    def test_cpu_offload_delegates(self, case, swapped, accelerate, attentions):
        """Its hooks bring the weights for the time of a module's forward."""
        model, inputs = case
        expected = zoo.run(model, inputs)

        def offload(m):
            accelerate.cpu_offload(m, execution_device="cpu", preload_module_classes=POOLING)
            return m

        model = swapped(model, offload)
        assert equal(zoo.run(model, inputs), expected)
        assert not attentions
        accelerate.hooks.remove_hook_from_submodules(model)

    def test_a_tower_on_disk_delegates(self, swapped, accelerate, attentions, tmp_path):
        model, inputs = zoo.build("paligemma")
        expected = zoo.run(model, inputs)
        model = swapped(model, with_one_on_disk(accelerate, "model.vision_tower", tmp_path))
        assert equal(zoo.run(model, inputs), expected)
        assert not attentions

    def test_a_tower_in_place_beside_an_offloaded_language_model(self, swapped, accelerate, attentions, tmp_path):
        model, inputs = zoo.build("paligemma")
        expected = zoo.run(model, inputs)
        model = swapped(model, with_one_on_disk(accelerate, "model.language_model", tmp_path))
        assert zoo.error(zoo.run(model, inputs), expected) < TOLERANCE

    def test_unhooked_it_is_fused_again(self, case, accelerate, attentions):
        model, inputs = case
        expected = zoo.run(model, inputs)
        siglip_fast.apply_to(model)
        accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
        assert zoo.error(zoo.run(model, inputs), expected) < TOLERANCE
        accelerate.hooks.remove_hook_from_submodules(model)
        attentions.clear()
        assert zoo.error(zoo.run(model, inputs), expected) < TOLERANCE
        assert len(attentions) == 2


class MyLinear(nn.Linear):
    """What a library of quantised layers may put in the place of a Linear."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def replace_linears(tower, kind):
    for module in list(tower.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, kind(child))


def own_kind(linear):
    quantised = MyLinear(linear.in_features, linear.out_features)
    quantised.load_state_dict(linear.state_dict())
    return quantised


def bitsandbytes(name):
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def kind(linear):
        arguments = {"has_fp16_weights": False} if name == "Linear8bitLt" else {"compute_dtype": torch.float32}
        quantised = getattr(library.nn, name)(linear.in_features, linear.out_features, **arguments)
        quantised.load_state_dict(linear.state_dict())
        return quantised.to("cpu")

    return lambda tower: replace_linears(tower, kind)


def torchao(name):
    library = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return lambda tower: library.quantize_(tower, getattr(library, name)())


QUANTISATIONS = {
    "own": lambda: lambda tower: replace_linears(tower, own_kind),
    "bitsandbytes-int8": lambda: bitsandbytes("Linear8bitLt"),
    "bitsandbytes-nf4": lambda: bitsandbytes("Linear4bit"),
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
}


@pytest.mark.parametrize("name", QUANTISATIONS)
class TestQuantised:
    def test_delegates_beside_a_fused_tower(self, name, swapped, attentions):
        quantise = QUANTISATIONS[name]()
        models = nn.ModuleDict({key: zoo.build("siglip_vision")[0] for key in ("quantised", "plain")})
        twin, inputs = zoo.build("siglip_vision")
        plain = zoo.run(twin, inputs)
        quantise(twin)
        expected = zoo.run(twin, inputs)
        assert zoo.error(expected, plain) > 10 * TOLERANCE

        def change(models):
            quantise(models["quantised"])
            return models

        swapped(models, change)
        assert zoo.error(zoo.run(models["quantised"], inputs), expected) < 1e-6
        assert not attentions
        assert zoo.error(zoo.run(models["plain"], inputs), plain) < TOLERANCE
        assert len(attentions) == 2

    def test_after_a_fused_forward(self, name, case, attentions):
        quantise = QUANTISATIONS[name]()
        model, inputs = case
        plain = zoo.run(model, inputs)
        siglip_fast.apply_to(model)
        zoo.run(model, inputs)
        attentions.clear()
        quantise(tower_of(model))
        actual = zoo.run(model, inputs)
        assert not attentions
        assert zoo.error(actual, plain) > TOLERANCE
        siglip_fast.restore(model)
        assert zoo.error(actual, zoo.run(model, inputs)) < 1e-6


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_loaded_quantised(bits, tmp_path, attentions):
    """By transformers' own integration, under register() and with apply_to after it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, inputs = zoo.build("paligemma")
    model.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**{bits: True})
    load = {"quantization_config": config, "device_map": "cpu", "dtype": torch.float32}
    stock = type(model).from_pretrained(tmp_path, **load)
    expected = zoo.run(stock, inputs)
    assert zoo.error(expected, zoo.run(model, inputs)) > TOLERANCE
    siglip_fast.register()
    try:
        loaded = type(model).from_pretrained(tmp_path, **load)
    finally:
        siglip_fast.unregister()
    for quantised in (loaded, siglip_fast.apply_to(stock)):
        assert zoo.error(zoo.run(quantised, inputs), expected) < 1e-6
    assert not attentions
