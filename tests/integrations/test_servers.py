"""The plugins for vLLM and SGLang: always what they do without a server, and the servers' real code where it imports.

The servers run in interpreters of their own: a plugin is for good.
"""

import importlib.util
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points

import pytest

PLUGINS = {
    "vllm.general_plugins": "siglip_fast.integrations.vllm:register",
    "sglang.srt.plugins": "siglip_fast.integrations.sglang:register",
}
ON = {"SIGLIP_FAST_PLUGIN": "1"}


def run(code: str, tmp_path, monkeypatch, environment: dict[str, str] = ON) -> str:
    """Output and log of a fresh interpreter; skips the test where the code says that the server does not import."""
    monkeypatch.delenv("SIGLIP_FAST_PLUGIN", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    if "CANNOT IMPORT" in done.stdout:
        pytest.skip(done.stdout.splitlines()[-1])
    return output


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
    assert "vLLM is left as it was: ModuleNotFoundError: No module named 'vllm.envs'" in output


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
    output = run(FAKE + SGLANG + code, tmp_path, monkeypatch)
    assert output.count("become fast when a model is loaded") == 1


VLLM = """
import os, socket, sys, torch
try:
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    vllm.platforms._current_platform = CpuPlatform()  # also where vLLM is a CUDA build, on a machine without one
    from vllm.model_executor.models import siglip
except ImportError as error:
    sys.exit(print("CANNOT IMPORT", type(error).__name__, error))
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.models.utils import AutoWeightsLoader
from transformers import SiglipVisionConfig
import vllm.plugins

stock = siglip.SiglipVisionTransformer
vllm.plugins.load_general_plugins()
vllm.plugins.plugins_loaded = False
vllm.plugins.load_general_plugins()
assert siglip.SiglipVisionTransformer.__bases__[1:] == (stock,), siglip.SiglipVisionTransformer

torch.manual_seed(0)
config = SiglipVisionConfig(hidden_size=144, num_attention_heads=2, intermediate_size=160, image_size=48,
                            patch_size=16, num_hidden_layers=3)
pixels = torch.randn(2, 3, 48, 48)
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

def build(dtype=torch.float32, config=config, **kwargs):
    torch.set_default_dtype(dtype)
    model = siglip.SiglipVisionModel(config, prefix="vision_tower", **kwargs).eval()
    torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        p.requires_grad_(False)
        p.data.normal_(std=0.2)
    for m in model.modules():
        if hasattr(m, "quant_method"):
            m.cpu_linear = torch.nn.functional.linear  # what process_weights_after_loading chooses on a plain CPU
    return model

@torch.inference_mode()
def both(model, pixels=pixels, **kwargs):
    tower = model.vision_model
    got = model(pixels, **kwargs)
    tower.__class__ = stock
    expected = model(pixels, **kwargs)
    tower.__class__ = siglip.SiglipVisionTransformer
    return got, expected

def close(pair, bound):
    error = (pair[0].float() - pair[1].float()).norm() / pair[1].float().norm()
    assert error < bound, float(error)

context = set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu")))
context.__enter__()
init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", backend="gloo")
initialize_model_parallel(1, 1, backend="gloo")
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_real_vllm(tmp_path, monkeypatch):
    """Its plugin loader finds ours, its own towers run fused, and give what its own forward gives."""
    code = """
for kwargs in ({}, {"use_head": True}, {"num_hidden_layers_override": 2}, {"require_post_norm": False}):
    model = build(**kwargs)
    assert model.vision_model.why_not(pixels) is None, model.vision_model.why_not(pixels)
    close(both(model), 1e-5)
    assert model.vision_model.derived_bytes()
close(both(model, select_layers=[0, -2, -1], feature_select_strategy="full"), 1e-5)
# Triton's interpreter computes bfloat16 wrongly
half = torch.float16 if os.environ.get("SIGLIP_FAST_BACKEND") == "triton" else torch.bfloat16
close(both(build(half)), 2e-2)

model = build()
tower = model.vision_model
both(model)
weights = [(n.replace("qkv_proj", p), w) for n, w in tower.named_parameters()
           for p, w in (zip(("q_proj", "k_proj", "v_proj"), w.chunk(3)) if "qkv_proj" in n else [("", w)])]
before = both(model)[0]
AutoWeightsLoader(model).load_weights((f"vision_model.{n}", -w.clone()) for n, w in weights)  # as models around it do
after = both(model)
close(after, 1e-5)
assert not torch.allclose(before, after[0])
derived = tower._derived[None]
tower.encoder.layers[0].mlp.fc1.weight.mul_(2)
close(both(model), 1e-5)
assert tower._derived[None] is not derived
linear = tower.encoder.layers[2].self_attn.qkv_proj
for new in (torch.nn.Parameter(2 * linear.weight, False), linear.weight):  # ours, then vLLM's kind again
    before = both(model)[0]
    linear.weight = new
    after = both(model)
    assert not torch.allclose(before, after[0])
    close(after, 1e-5)
before = after[0]
linear.weight.data = 2 * linear.weight.data
after = both(model)
assert not torch.allclose(before, after[0])
close(after, 1e-5)

seen = []  # what is behind the encoder stays vLLM's
tower.last_hs_proc = lambda states: seen.append(states) or states
close(both(model), 1e-5)
assert len(seen) == 2
print("DONE")
"""
    output = run(VLLM + code, tmp_path, monkeypatch)
    assert "DONE" in output and output.count("vLLM: its SigLIP vision towers run on fused operations") == 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_real_vllm_delegates(tmp_path, monkeypatch):
    code = """
def delegates(model, reason, pixels=pixels, same=True, **kwargs):
    tower = model.vision_model
    got = tower.why_not(pixels, **kwargs)
    assert got is not None and reason in got, got
    if same:
        pair = both(model, pixels, **kwargs)
        assert torch.equal(*pair)
        assert not tower.derived_bytes()

gelu = SiglipVisionConfig(**{**config.to_dict(), "hidden_act": "gelu"})
delegates(build(config=gelu), "hidden_act is 'gelu'")
wide = SiglipVisionConfig(**{**config.to_dict(), "hidden_size": 288})
delegates(build(config=wide), "head_dim is above 128")
model = build()
model.vision_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *args: None)
delegates(model, "a ColumnParallelLinear has forward hooks")
model = build()
model.vision_model.encoder.layers[0].mlp.fc2.quant_method = type("Fp8", (siglip.LayerNorm,), {})
delegates(model, "layers.0.mlp.fc2 is quantized", same=False)
model = build()
model.vision_model.encoder.layers[2].self_attn.qkv_proj.tp_size = 2
delegates(model, "is tensor-parallel over 2")
model = build()
model.vision_model.encoder.layers[2].self_attn.attn.fp8_enabled = True
delegates(model, "computes in fp8")
model = build()
model.vision_model.encoder.layers[0].layer_norm1 = torch.nn.LayerNorm(144).requires_grad_(False)
delegates(model, "layers.0.layer_norm1 is a LayerNorm")
with torch.inference_mode():
    hidden = build()
delegates(hidden, "made under torch.inference_mode")
delegates(build(), "have shape [batch, 3, 64, 48]", torch.randn(2, 3, 64, 48), same=False)
delegates(build(), "interpolate_pos_encoding", same=False, interpolate_pos_encoding=True)
with torch.autocast("cpu", torch.bfloat16):
    delegates(build(), "autocast is active", same=False)
os.environ["VLLM_BATCH_INVARIANT"] = "1"
delegates(build(), "VLLM_BATCH_INVARIANT is set", same=False)
invariant = build()
invariant.vision_model.batch_invariant = True
assert "VLLM_BATCH_INVARIANT" not in (invariant.vision_model.why_not(pixels) or "")
del os.environ["VLLM_BATCH_INVARIANT"]
delegates(build(), "gradients are needed", pixels.clone().requires_grad_(), same=False)

model = build()
both(model)
linear = model.vision_model.encoder.layers[0].mlp.fc1
assert model.vision_model.derived_bytes()
model.vision_model.encoder.layers[0].mlp.fc1 = torch.nn.Sequential(linear)  # as LoRA puts its own around it
with torch.no_grad():
    assert "encoder.layers.0.mlp.fc1 is a Sequential" in model.vision_model.why_not(pixels)
model.vision_model.encoder.layers[0].mlp.fc1 = linear
assert model.vision_model.why_not(pixels) is None
linear.tp_size = 2
delegates(model, "is tensor-parallel over 2")

model = build()
with torch.no_grad():
    assert torch.equal(torch.compile(model, backend="eager")(pixels), both(model)[1])
    assert model.vision_model._failure is None and not torch.equal(*both(model))

import siglip_fast.models.weights as module
module.forward = lambda *args: 1 / 0
model = build()
assert torch.equal(*both(model))
assert not model.vision_model._derived
delegates(model, "the first fused forward failed: ZeroDivisionError", same=False)
print("DONE")
"""
    assert "DONE" in run(VLLM + code, tmp_path, monkeypatch)


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
