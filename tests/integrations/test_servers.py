"""The plugins for vLLM and SGLang: always what they do without a server, and SGLang's real code where it imports.

vLLM's is in test_vllm_towers.py.
"""

import importlib.util
from importlib.metadata import entry_points

import pytest
from servers import run

PLUGINS = {
    "vllm.general_plugins": "siglip_fast.integrations.vllm:register",
    "sglang.srt.plugins": "siglip_fast.integrations.sglang:register",
}


@pytest.mark.parametrize("group", PLUGINS)
def test_declared(group):
    (plugin,) = (entry for entry in entry_points(group=group) if entry.name == "siglip_fast")
    assert plugin.value == PLUGINS[group]
    assert callable(plugin.load())


@pytest.mark.parametrize("environment", [{}, {"SIGLIP_FAST_PLUGIN": "0"}], ids=["unset", "0"])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_off(server, environment, tmp_path, monkeypatch):
    code = f"""
        import sys
        sys.modules["{server}"] = None  # importing it would raise
        from siglip_fast.integrations.{server} import register
        register()
        print(*sorted({{"torch", "transformers", "triton"}} & set(sys.modules)))
    """
    assert run(code, tmp_path, monkeypatch, environment).strip() == ""


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_not_installed(server, tmp_path, monkeypatch):
    code = f"""
        import sys
        sys.modules["{server}"] = None
        from siglip_fast.integrations.{server} import register
        register(), register()
    """
    output = run(code, tmp_path, monkeypatch)
    assert "is left as it was: ModuleNotFoundError" in output


FAKE = """
import sys, types

def fake(name, **contents):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        module.__path__ = []
        if i > 1:
            setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
    vars(module).update(contents)
    return module
"""


FAKE_VLLM = """
class SiglipVisionTransformer:
    def forward(self, pixel_values, {arguments}):
        pass

siglip = fake("vllm.model_executor.models.siglip", SiglipVisionTransformer=SiglipVisionTransformer)
from siglip_fast.integrations.vllm import register
register()
assert siglip.SiglipVisionTransformer is SiglipVisionTransformer
"""


def test_unknown_vllm(tmp_path, monkeypatch):
    output = run(FAKE + FAKE_VLLM.format(arguments="something_new"), tmp_path, monkeypatch)
    assert "vLLM is left as it was: TypeError: SiglipVisionTransformer.forward takes" in output
    assert "something_new" in output


def test_vllm_without_what_the_tower_imports(tmp_path, monkeypatch):
    arguments = "*, interpolate_pos_encoding, select_layers, feature_select_strategy"
    output = run(FAKE + FAKE_VLLM.format(arguments=arguments), tmp_path, monkeypatch)
    assert "vLLM is left as it was: ModuleNotFoundError: No module named 'vllm." in output


SGLANG = """
class HookRegistry:
    hooks = []

    @classmethod
    def register(cls, *hook):
        cls.hooks.append(hook)

class WeightUpdater:
    get_model = update_weights_from_disk = load_weights_from_distributed = None
    update_weights_from_tensor = update_weights_from_ipc = lambda self: None

HookType = types.SimpleNamespace(AFTER="after", AROUND="around")
fake("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=HookType)
fake("sglang.srt.model_loader", get_model=lambda: None)
components = "sglang.srt.model_executor.model_runner_components"
fake(f"{components}.load_model_utils", load_model_with_memory_saver=lambda: None)
fake(f"{components}.weight_updater", WeightUpdater=WeightUpdater)
from siglip_fast.integrations.sglang import LOADERS, UPDATES, register
"""


def test_unknown_sglang(tmp_path, monkeypatch):
    """One of the functions is something else: none is hooked."""
    output = run(FAKE + SGLANG + "register(); assert not HookRegistry.hooks", tmp_path, monkeypatch)
    assert "SGLang is left as it was: TypeError" in output and "update_weights_from_disk" in output


def test_sglang_hooks_once(tmp_path, monkeypatch):
    code = """
WeightUpdater.update_weights_from_disk = WeightUpdater.load_weights_from_distributed = lambda self: None
register(), register()
kinds = [(target, kind) for target, _, kind in HookRegistry.hooks]
assert kinds == [(t, "after") for t in LOADERS] + [(t, "around") for t in UPDATES], kinds
"""
    assert run(FAKE + SGLANG + code, tmp_path, monkeypatch) == ""


REAL_SGLANG = """
import sys, types, torch
try:
    import sglang.srt.model_loader.loader, sglang.srt.model_executor.model_runner_components.load_model_utils
    from sglang.srt.model_executor.model_runner_components import load_model_utils, weight_updater
    from sglang.srt import model_loader
    from sglang.srt.models import cohere2_vision
except ImportError as error:
    sys.exit(print("CANNOT IMPORT", type(error).__name__, error))
import sglang.srt.plugins as plugins, transformers, siglip_fast
from sglang.srt.plugins.hook_registry import HookRegistry
from siglip_fast.integrations import sglang as ours

before = transformers.SiglipVisionModel
"""


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")
def test_real_sglang(tmp_path, monkeypatch):
    """Its plugin loader finds ours, its registry wraps the functions, and what they return gets our class."""
    code = """
loaders = load_model_utils.load_model_with_memory_saver, model_loader.get_model
plugins.load_plugins()
plugins._plugins_loaded = False
plugins.load_plugins()
assert transformers.SiglipVisionModel is before  # REPLACE would have changed it
assert {*ours.LOADERS, *ours.UPDATES} <= HookRegistry._patched
wrapped = load_model_utils.load_model_with_memory_saver, model_loader.get_model
assert tuple(w.__wrapped__ for w in wrapped) == loaders
assert all(len(HookRegistry._hooks[target]) == 1 for target in ours.LOADERS)

torch.manual_seed(0)
config = transformers.SiglipVisionConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=32,
                                         num_hidden_layers=2)
model = cohere2_vision.Cohere2VisionForConditionalGeneration.__new__(  # its vision half
    cohere2_vision.Cohere2VisionForConditionalGeneration
)
torch.nn.Module.__init__(model)
model.vision_tower = cohere2_vision.SiglipVisionModel(config).eval()
model.multi_modal_projector = torch.nn.Identity()
model.language_model = types.SimpleNamespace(load_weights=list)
stock = type(model.vision_tower)

@torch.inference_mode()
def features():
    return model.get_image_feature([types.SimpleNamespace(feature=pixels)])

def same(got, expected):
    return (got - expected).norm() < 1e-5 * expected.norm()

pixels = torch.randn(2, 3, 32, 32)
first = features()

class Loader:  # the one that SGLang's get_model would make
    def load_model(self, **kwargs):
        return model

model_loader.get_model_loader = lambda *args: Loader()
assert model_loader.get_model(model_config=None, load_config=None, device_config=None) is model
tower = model.vision_tower
assert type(tower) is not stock and type(tower).__module__.startswith("siglip_fast."), type(tower)

with torch.no_grad():
    assert tower.why_not(pixels) is None, tower.why_not(pixels)
assert same(features(), first) and not torch.equal(features(), first)  # of other kernels

updater = object.__new__(weight_updater.WeightUpdater)
object.__setattr__(updater, "get_model", lambda: model)
weight_updater.get_model = lambda: types.SimpleNamespace(weight_cache_mode="off")  # the server's settings
done = updater.load_weights_from_distributed([(f"vision_tower.{n}", 1.5 * p) for n, p in tower.named_parameters()])
assert done[0], done
with torch.inference_mode():
    expected = stock.forward(tower, pixels).last_hidden_state.flatten(0, 1)
assert same(features(), expected) and not same(features(), first)
print("DONE")
"""
    assert "DONE" in run(REAL_SGLANG + code, tmp_path, monkeypatch)
