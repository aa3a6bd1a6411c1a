"""`apply_to`, `restore` and `register` on the models that hold a SigLIP vision tower: fused, and with stock's results."""

import copy
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
import zoo
from packaging.version import Version
from torch import nn
from transformers import AutoModel

import siglip_fast

TOLERANCE = 1e-4  # relative, of any tensor of the output
UNTOUCHED = {"qwen2_5_vl"}
DELEGATED = {"phi4_multimodal"}  # its attention is causal where nothing is padded
FUSED = [name for name in zoo.ZOO if name not in UNTOUCHED | DELEGATED]
# Those that build the tower by AutoModel.from_config
BY_AUTOMODEL = ["paligemma", "colpali", "gemma3", "shieldgemma2", "llava", "llava_next", "llava_onevision"]
BY_AUTOMODEL += ["aya_vision", "cohere2_vision", "deepseek_vl", "aria"]
VERSION = Version(transformers.__version__)
PATCHES = importlib.util.find_spec("transformers.monkey_patching") is not None  # transformers 5.3 or newer
if PATCHES:
    patching = importlib.import_module("transformers.monkey_patching")


@pytest.fixture
def attentions():
    with zoo.fused_attentions() as calls:
        yield calls


@pytest.fixture
def registered():
    siglip_fast.register()
    yield
    siglip_fast.unregister()


def fast_towers(model):
    return [tower.module for tower in siglip_fast.towers(model) if tower.fast]


def assert_fused(model, inputs, expected, attentions):
    attentions.clear()
    assert zoo.error(zoo.run(model, inputs), expected) < TOLERANCE
    mergers = sum(type(module).__name__.endswith("WindowAttentionMerger") for module in model.modules())
    assert len(attentions) == 2 + mergers  # layers, and MiniCPM's merger


def modules(model):
    """What the swap may not touch: every module and tensor, by name and identity."""
    named = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
    return [(name, id(thing)) for name, thing in named]


class TestApplyTo:
    @pytest.mark.parametrize("name", FUSED)
    def test_fused_and_restored(self, name, attentions):
        model, inputs = zoo.build(name)
        expected, before = zoo.run(model, inputs), modules(model)
        keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
        assert siglip_fast.apply_to(model, strict=True) is model
        assert fast_towers(model)
        assert_fused(model, inputs, expected, attentions)
        assert modules(model) == before
        assert list(model.state_dict()) == keys
        attentions.clear()
        assert siglip_fast.restore(model) is model
        assert [type(m) for m in model.modules()] == classes
        restored = zoo.run(model, inputs)
        assert restored.keys() == expected.keys()
        assert all(torch.equal(restored[n], expected[n]) for n in expected)
        assert not attentions

    @pytest.mark.parametrize("name", sorted(UNTOUCHED))
    def test_untouched(self, name, attentions, caplog):
        model, inputs = zoo.build(name)
        expected, classes = zoo.run(model, inputs), [type(m) for m in model.modules()]
        siglip_fast.apply_to(model)
        assert [type(m) for m in model.modules()] == classes
        (tower,) = siglip_fast.towers(model)
        assert not tower.fast
        assert tower.reason
        assert tower.reason in caplog.text
        actual = zoo.run(model, inputs)
        assert all(torch.equal(actual[n], expected[n]) for n in expected)
        assert not attentions

    @pytest.mark.parametrize("name", sorted(DELEGATED))
    def test_delegated(self, name, attentions):
        model, inputs = zoo.build(name)
        expected = zoo.run(model, inputs)
        siglip_fast.apply_to(model)
        actual = zoo.run(model, inputs)
        assert all(torch.equal(actual[n], expected[n]) for n in expected)
        assert not attentions
        siglip_fast.restore(model)
        siglip_fast.apply_to(model, strict=True)
        with pytest.raises(RuntimeError, match="causal"):
            zoo.run(model, inputs)

    @pytest.mark.parametrize("name", zoo.ZOO)
    def test_the_outputs_depend_on_the_image(self, name):
        """Else the comparisons above would say nothing."""
        model, inputs = zoo.build(name)
        name = next(name for name in inputs if name.endswith("pixel_values"))
        changed = inputs | {name: inputs[name].flip(-1)}
        actual, expected = zoo.run(model, changed), zoo.run(model, inputs)
        assert zoo.error(actual, expected) > 1000 * TOLERANCE

    @pytest.mark.parametrize("name", zoo.quick(FUSED))
    def test_gradients_are_stocks(self, name, attentions):
        model, inputs = zoo.build(name)
        expected = gradients(model, inputs)
        siglip_fast.apply_to(model)
        zoo.run(model, inputs)  # weights derived; training has to forget them
        assert attentions
        attentions.clear()
        actual = gradients(model, inputs)
        assert not attentions
        assert actual.keys() == expected.keys()
        # GLM-Image makes tokens of its images, through which there is no gradient; 5.24 gives back what they are made of
        assert any("patch_embed" in n for n in actual) or name == "glm_image"
        for parameter, gradient in expected.items():
            torch.testing.assert_close(actual[parameter], gradient, atol=0, rtol=0)

    @pytest.mark.parametrize("name", zoo.QUICK)
    def test_trained_weights_are_seen(self, name, attentions):
        model, inputs = zoo.build(name)
        siglip_fast.apply_to(model)
        zoo.run(model, inputs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss(model, inputs).backward()
        optimizer.step()
        expected = zoo.run(siglip_fast.restore(copy.deepcopy(model)), inputs)
        assert_fused(model, inputs, expected, attentions)

    @pytest.mark.parametrize("name", ["siglip_vision", "siglip", "llava", "smolvlm"])
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
    )
    def test_copies_stay_fast(self, name, copied, attentions):
        model, inputs = zoo.build(name)
        expected = zoo.run(zoo.build(name)[0], inputs)  # another: stock's hooks, once installed, cannot be pickled
        siglip_fast.apply_to(model, backend="torch", strict=True)
        zoo.run(model, inputs)
        twin = copied(model)
        assert_fused(twin, inputs, expected, attentions)
        assert set(attentions) == {"torch"}
        with torch.no_grad():  # the twin's weights are its own
            next(p for n, p in twin.named_parameters() if "patch_embedding.weight" in n).zero_()
        assert zoo.error(zoo.run(twin, inputs), expected) > 1000 * TOLERANCE
        assert_fused(model, inputs, expected, attentions)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["siglip", "llava", "smolvlm"])
    def test_unpickled_by_another_process(self, name, tmp_path):
        """Where no model was constructed, which is when transformers notes what hidden states a class records."""
        if name == "llava" and Version("5.2") <= VERSION < Version("5.6"):
            pytest.skip("a stock tower inside of the fast one records nothing either")
        model, inputs = zoo.build(name)
        expected = zoo.run(zoo.build(name)[0], inputs)
        siglip_fast.apply_to(model)
        torch.save((model, inputs, expected), tmp_path / "all.pt")
        script = f"""
import sys, torch
sys.path.insert(0, {os.path.dirname(zoo.__file__)!r})
import zoo
model, inputs, expected = torch.load({str(tmp_path / "all.pt")!r}, weights_only=False)
with zoo.fused_attentions() as attentions:
    assert zoo.error(zoo.run(model, inputs), expected) < 1e-4
    assert len(attentions) == 2
    assert zoo.error(zoo.tensors(model(**inputs)), expected) < 1e-4  # with gradients: delegated
    assert len(attentions) == 2
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    @pytest.mark.parametrize("name", ["siglip_vision", "siglip", "llava", "smolvlm"])
    def test_saved_models_load_in_stock(self, name, tmp_path, attentions):
        model, inputs = zoo.build(name)
        expected, files = zoo.run(model, inputs), [tmp_path / "stock", tmp_path / "fast"]
        model.save_pretrained(files[0])
        siglip_fast.apply_to(model).save_pretrained(files[1])
        for file in ("config.json", "model.safetensors"):
            assert (files[0] / file).read_bytes() == (files[1] / file).read_bytes()
        loaded = from_pretrained(type(siglip_fast.restore(model)), files[1])
        actual = zoo.run(loaded, inputs)
        assert all(torch.equal(actual[n], expected[n]) for n in expected)
        siglip_fast.apply_to(loaded, strict=True)
        assert_fused(loaded, inputs, expected, attentions)

    @pytest.mark.parametrize("name", ["paligemma", "llava"])
    def test_generate(self, name, attentions):
        model, inputs = zoo.build(name)
        model.generation_config.eos_token_id = None  # as many tokens as are asked for
        arguments = inputs | {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(**arguments)
        siglip_fast.apply_to(model, strict=True)
        assert torch.equal(model.generate(**arguments), expected)
        assert len(attentions) == 2  # one forward of the tower for all tokens
        changed = arguments | {"pixel_values": inputs["pixel_values"].flip(-1)}
        assert not torch.equal(model.generate(**changed), expected)

    def test_idempotent(self, attentions):
        model, inputs = zoo.build("siglip")
        expected = zoo.run(model, inputs)
        siglip_fast.apply_to(siglip_fast.apply_to(model))
        assert_fused(model, inputs, expected, attentions)
        siglip_fast.restore(siglip_fast.restore(model))
        assert not fast_towers(model)

    def test_the_towers_are_still_instances_of_stocks_classes(self):
        model, _ = zoo.build("llava")
        tower = siglip_fast.towers(model)[0].module
        stock = type(tower)
        siglip_fast.apply_to(model)
        assert type(tower) is not stock
        assert isinstance(tower, stock)

    @pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
    def test_the_backend_asked_for(self, backend, attentions):
        model, inputs = zoo.build("siglip")
        expected = zoo.run(model, inputs)
        siglip_fast.apply_to(model, backend=backend, strict=True)
        assert_fused(model, inputs, expected, attentions)
        assert set(attentions) == {backend}

    def test_an_unknown_backend_changes_nothing(self):
        model, _ = zoo.build("siglip")
        with pytest.raises(ValueError, match="backend: .*'cuda'"):
            siglip_fast.apply_to(model, backend="cuda")
        assert not fast_towers(model)

    def test_without_a_vision_tower(self):
        with pytest.raises(ValueError, match="Linear"):
            siglip_fast.apply_to(nn.Linear(2, 2))
        config = transformers.SiglipTextConfig(**zoo.SIGLIP_TEXT)
        with pytest.raises(ValueError, match="SiglipTextModel"):
            siglip_fast.apply_to(transformers.SiglipTextModel(config))

    def test_the_list_prints_a_line_a_tower(self):
        model = nn.ModuleDict({"a": zoo.siglip_vision()[0], "b": zoo.qwen2_5_vl()[0]})
        apply_to = siglip_fast.apply_to(model["a"])
        name = type(siglip_fast.towers(apply_to)[0].module).__name__
        lines = repr(siglip_fast.towers(model)).splitlines()
        assert lines[0] == f"a: {name}, fast"
        assert lines[1].startswith("b.model.visual: Qwen2_5_Vision") and "left alone: RMSNorm" in lines[1]
        assert len(lines) == 2 and str(siglip_fast.towers(nn.Linear(1, 1))) == "no SigLIP vision tower"

    def test_several_towers_and_one_that_cannot(self, attentions, caplog):
        models = nn.ModuleDict({name: zoo.build("siglip_vision")[0] for name in ("a", "b")})
        config = transformers.SiglipVisionConfig(**zoo.SIZE | {"hidden_act": "relu"}, **zoo.PATCHES)
        models["relu"] = transformers.SiglipVisionModel(config).eval()
        siglip_fast.apply_to(models)
        towers = {tower.name.partition(".")[0]: tower for tower in siglip_fast.towers(models)}
        assert list(towers) == ["a", "b", "relu"]
        _, inputs = zoo.build("siglip_vision")
        for model in models.values():
            zoo.run(model, inputs)
        assert len(attentions) == 4
        assert "relu" in caplog.text

    def test_a_subclass_is_left_alone(self, caplog):
        class Theirs(transformers.SiglipVisionModel):
            def forward(self, pixel_values, **kwargs):
                return 1

        config = transformers.SiglipVisionConfig(**zoo.SIZE, **zoo.PATCHES)
        model = Theirs(config)
        siglip_fast.apply_to(model)
        assert model(zoo.pixels(1)) == 1
        assert siglip_fast.towers(model)[0].reason in caplog.text


def loss(model, inputs):
    outputs = zoo.tensors(model(**inputs)).values()
    return sum(t.square().mean() for t in outputs if t.requires_grad)


def gradients(model, inputs):
    model.zero_grad()
    loss(model, inputs).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def from_pretrained(architecture, folder):
    model, report = architecture.from_pretrained(folder, output_loading_info=True)
    keys = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in report[kind]]
    if keys == ["model.lm_head.weight"]:
        pytest.skip("this transformers loses the head of ShieldGemma 2, with stock towers too")
    assert not keys
    return model.eval()


def everything_global():
    """What a registration could change: transformers' mappings, and what SigLIP's names mean in its modules."""
    mapping = AutoModel._model_mapping
    mappings = [dict(mapping._extra_content), mapping[transformers.SiglipVisionConfig]]
    if PATCHES:
        mappings.append(patching.get_patch_mapping())
    modules = [(name, vars(m)) for name, m in sys.modules.items() if name.startswith("transformers")]
    names = {
        (module, name): value
        for module, names in modules
        for name, value in names.items()
        if "Siglip" in name and isinstance(value, type)
    }
    attributes = {
        (c.__name__, name): value for c in names.values() for name, value in vars(c).items() if callable(value)
    }
    return mappings, names, attributes


class TestRegister:
    @pytest.mark.parametrize("name", zoo.quick(BY_AUTOMODEL))
    def test_constructed(self, name, registered, attentions):
        model, inputs = zoo.build(name)
        assert fast_towers(model)
        actual = zoo.run(model, inputs)
        assert len(attentions) == 2
        assert zoo.error(actual, zoo.run(siglip_fast.restore(model), inputs)) < TOLERANCE

    @pytest.mark.parametrize("name", zoo.quick(FUSED))
    def test_loaded(self, name, tmp_path, attentions):
        """Under register(), where transformers can patch what from_pretrained builds, or with apply_to after it."""
        model, inputs = zoo.build(name)
        expected = zoo.run(model, inputs)
        model.save_pretrained(tmp_path)
        siglip_fast.register()
        try:
            loaded = from_pretrained(type(model), tmp_path)
        finally:
            siglip_fast.unregister()
        by_name = VERSION >= Version("5.6")  # SiglipModel names SiglipVisionModel
        if name in BY_AUTOMODEL or (by_name and name in ("siglip", "siglip_classification")):
            assert fast_towers(loaded)
        siglip_fast.apply_to(loaded)
        assert_fused(loaded, inputs, expected, attentions)

    def test_automodel(self, registered, tmp_path, attentions):
        model, inputs = zoo.build("siglip_vision")
        expected = zoo.run(siglip_fast.restore(model), inputs)
        model.save_pretrained(tmp_path)
        loaded = from_pretrained(AutoModel, tmp_path)
        assert type(loaded) is siglip_fast.SiglipVisionModel
        assert_fused(loaded, inputs, expected, attentions)
        assert type(AutoModel.from_config(model.config)) is siglip_fast.SiglipVisionModel

    @pytest.mark.parametrize("name", ["siglip", "paligemma"])
    def test_nothing_is_left_behind(self, name, tmp_path):
        model, _ = zoo.build(name)
        model.save_pretrained(tmp_path)
        siglip_fast.register()  # transformers imports modules, and looks names up that it keeps
        from_pretrained(type(model), tmp_path)
        siglip_fast.unregister()
        before = everything_global()
        siglip_fast.register()
        siglip_fast.register()
        from_pretrained(type(model), tmp_path)
        siglip_fast.unregister()
        siglip_fast.unregister()
        assert everything_global() == before
        assert not fast_towers(zoo.build(name)[0])
        assert not fast_towers(from_pretrained(type(model), tmp_path))

    @pytest.mark.skipif(not PATCHES, reason="this transformers has no patch mapping")
    def test_names_that_begin_alike_are_left_alone(self, registered):
        """The mapping's keys are patterns to transformers."""
        if not patching.get_patch_mapping():
            pytest.skip("this transformers' patching fails without torchvision")
        home = transformers.models.siglip.modeling_siglip
        stock, output = home.SiglipVisionModel, home.SiglipVisionModelOutput
        with patching.apply_patches():
            assert home.SiglipVisionModel is siglip_fast.SiglipVisionModel
            assert home.SiglipVisionModelOutput is output
        assert home.SiglipVisionModel is stock

    @pytest.mark.skipif(not PATCHES, reason="this transformers has no patch mapping")
    def test_unregister_mends_what_a_failed_build_left(self):
        config, home = zoo.build("siglip")[0].config, transformers.models.siglip.modeling_siglip
        stock = home.SiglipVisionModel

        class Failing(transformers.SiglipModel):
            def __init__(self, config):
                raise RuntimeError("no")

        siglip_fast.register()
        with pytest.raises(RuntimeError):
            Failing._from_config(config)
        siglip_fast.unregister()
        assert home.SiglipVisionModel is stock
        assert not fast_towers(transformers.SiglipModel._from_config(config))

    @pytest.mark.skipif(not PATCHES, reason="this transformers has no patch mapping")
    def test_a_mapping_that_somebody_cleared(self):
        siglip_fast.register()
        patching.clear_patch_mapping()
        siglip_fast.unregister()
        siglip_fast.register()
        siglip_fast.unregister()
        assert patching.get_patch_mapping() == {}

    def test_from_many_threads(self):
        def often():
            for _ in range(5):
                siglip_fast.register()
                siglip_fast.unregister()

        before = everything_global()
        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(often) for _ in range(4)]:
                future.result()
        assert everything_global() == before

    def test_somebody_elses_registration_stays(self):
        class Theirs(transformers.SiglipVisionModel):
            pass

        config = transformers.SiglipVisionConfig
        AutoModel.register(config, Theirs, exist_ok=True)
        try:
            siglip_fast.register()
            siglip_fast.unregister()
            assert AutoModel._model_mapping._extra_content[config] is Theirs
        finally:
            AutoModel._model_mapping._extra_content.pop(config, None)

    def test_text_towers_are_stocks(self, registered, tmp_path):
        model, _ = zoo.build("siglip")
        model.save_pretrained(tmp_path)
        loaded = from_pretrained(transformers.SiglipModel, tmp_path)
        text = transformers.SiglipTextModel(transformers.SiglipTextConfig(**zoo.SIGLIP_TEXT))
        for module in [*loaded.text_model.modules(), *text.modules()]:
            assert type(module).__module__.partition(".")[0] in ("torch", "transformers")


class TestPipelines:
    """Without a network: processors and tokenizers are made here."""

    @pytest.fixture
    def image(self):
        from PIL import Image

        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return Image.fromarray(pixels.numpy())

    @pytest.fixture
    def processor(self):
        # Transformers 5 gave the plain name to the one that needs torchvision.
        kind = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
        return kind(size={"height": 32, "width": 32})

    @pytest.fixture
    def tokenizer(self):
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = ["<pad>", "<unk>", "this", "is", "a", "photo", "of", "cat", "dog"]
        words = {word: i for i, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            model_max_length=16,
            model_input_names=["input_ids"],  # as SigLIP's own
        )

    def check(self, pipeline, attentions, **arguments):
        expected = torch.tensor(numbers(pipeline(**arguments)))
        assert not attentions
        siglip_fast.apply_to(pipeline.model, strict=True)
        actual = torch.tensor(numbers(pipeline(**arguments)))
        assert len(attentions) == 2
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    def test_image_feature_extraction(self, image, processor, attentions):
        model, _ = zoo.build("siglip_vision")
        pipeline = transformers.pipeline("image-feature-extraction", model=model, image_processor=processor)
        self.check(pipeline, attentions, inputs=image)

    def test_image_classification(self, image, processor, attentions):
        model, _ = zoo.build("siglip_classification")
        pipeline = transformers.pipeline("image-classification", model=model, image_processor=processor)
        self.check(pipeline, attentions, inputs=image)

    def test_zero_shot_image_classification(self, image, processor, tokenizer, attentions):
        model, _ = zoo.build("siglip")
        pipeline = transformers.pipeline(
            "zero-shot-image-classification", model=model, image_processor=processor, tokenizer=tokenizer
        )
        self.check(pipeline, attentions, image=image, candidate_labels=["cat", "dog"])

    def test_by_name_of_a_folder(self, image, processor, registered, tmp_path, attentions):
        zoo.build("siglip_vision")[0].save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        pipeline = transformers.pipeline("image-feature-extraction", model=str(tmp_path), image_processor=processor)
        assert type(pipeline.model) is siglip_fast.SiglipVisionModel
        pipeline(image)
        assert len(attentions) == 2


def numbers(value):
    """Every number of a pipeline's answer, in order of labels."""
    if isinstance(value, float):
        return [value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [item["score"] for item in sorted(value, key=lambda item: item["label"])]
    return [number for item in value for number in numbers(item)]
