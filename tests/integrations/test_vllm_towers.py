"""vLLM's plugin on vLLM's real towers, in a process without a server: `.ci/vllm` runs it on a build for CPUs.

Each in an interpreter of its own, because a plugin is for good. What a server does to a model after it was loaded is done
by the same functions of vLLM's.
"""

import importlib.util

import pytest
from servers import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")

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
from siglip_fast.models.base import stock_class

stock = siglip.SiglipVisionTransformer
for _ in range(2):
    vllm.plugins.load_general_plugins()
    vllm.plugins.plugins_loaded = False
assert siglip.SiglipVisionTransformer.__bases__[1:] == (stock,), siglip.SiglipVisionTransformer

torch.manual_seed(0)
config = SiglipVisionConfig(hidden_size=144, num_attention_heads=2, intermediate_size=160, image_size=48,
                            patch_size=16, num_hidden_layers=3)
pixels = torch.randn(2, 3, 48, 48)
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

def made(make, dtype):
    # as a server has it once its weights are loaded
    torch.set_default_dtype(dtype)
    model = make().eval()
    torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        p.requires_grad_(False)
        p.data.normal_(std=0.2)
    for m in model.modules():
        if hasattr(m, "quant_method"):
            m.quant_method.process_weights_after_loading(m)
    return model

def build(dtype=torch.float32, config=config, **kwargs):
    return made(lambda: siglip.SiglipVisionModel(config, prefix="vision_tower", **kwargs), dtype)

@torch.inference_mode()
def both(model, *args, **kwargs):
    # what the model gives with the tower fast, and with it stock's
    args = args or (pixels,)
    tower = getattr(model, "vision_model", model)
    got, fast = model(*args, **kwargs), type(tower)
    tower.__class__ = stock_class(fast)
    expected = model(*args, **kwargs)
    tower.__class__ = fast
    return got, expected

def close(pair, bound):
    error = (pair[0].float() - pair[1].float()).norm() / pair[1].float().norm()
    assert error <= bound, float(error)

context = set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu")))
context.__enter__()
init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", backend="gloo")
initialize_model_parallel(1, 1, backend="gloo")
"""


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
    assert "DONE" in output and output.count("vLLM: SiglipVisionTransformer runs fused, on the ") == 1
    assert "(its first forward: 18 rows)" in output


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
assert build().vision_model.encoder.layers[0].mlp.fc1.weight.numel()
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
ours = siglip.SiglipVisionTransformer
siglip.SiglipVisionTransformer = type("Other", (ours,), {})  # as Cosmos3's and Bailing's are of others of these towers
delegates(build(), "Other is a subclass", same=False)
siglip.SiglipVisionTransformer = ours
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


SIGLIP2 = """
from transformers import Siglip2VisionConfig
from vllm.model_executor.models import lfm2_siglip2

config = Siglip2VisionConfig(hidden_size=144, num_attention_heads=2, intermediate_size=160, patch_size=4, num_patches=36,
                             num_hidden_layers=3)

def build(dtype=torch.float32, **kwargs):
    return made(lambda: lfm2_siglip2.Siglip2Model(config, prefix="vision_tower", **kwargs), dtype)

def inputs(shapes, dtype=torch.float32):
    lengths = [h * w for h, w in shapes]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    rows = torch.randn(1, sum(lengths), 48, dtype=dtype)
    return {"pixel_values_packed": rows, "spatial_shapes": torch.tensor(shapes), "cu_seqlens": cu_seqlens,
            "max_seqlen": torch.tensor([max(lengths)], dtype=torch.int32)}

@torch.inference_mode()
def check(model, bound, reason=None, **given):
    tower = model.vision_model
    got, fast = model(**given), type(tower)
    select = given.pop("select_layers", None)
    why = tower.why_not(given["pixel_values_packed"], *[*given.values()][1:])
    assert why is None if reason is None else reason in why, why
    tower.__class__ = stock_class(fast)
    expected = model(**given, select_layers=select)
    tower.__class__ = fast
    assert got.shape == expected.shape and torch.equal(got, expected) == (reason is not None)
    close((got, expected), bound)
"""


def test_siglip2(tmp_path, monkeypatch):
    code = """
mixed = [(4, 6), (1, 1), (9, 2), (4, 6)]
for kwargs in ({}, {"require_post_norm": False}, {"num_hidden_layers_override": 2}):
    check(build(**kwargs), 1e-5, **inputs(mixed))
for shapes in ([(3, 5)], 4 * [(6, 6)]):
    check(build(), 1e-5, **inputs(shapes))
check(build(), 1e-5, select_layers=[0, -2, -1], **inputs(mixed))
half = torch.float16 if os.environ.get("SIGLIP_FAST_BACKEND") == "triton" else torch.bfloat16
check(build(half), 2e-2, **inputs(mixed, half))
odd = inputs(mixed)
odd["cu_seqlens"] = odd["cu_seqlens"][[0, 2, 3, 4]]
check(build(), 0, "cu_seqlens are not the images'", **odd)
model = build()
model.vision_model.encoder.layers[1].mlp.fc1.tp_size = 2
check(model, 0, "is tensor-parallel over 2", **inputs(mixed))
model = build()
check(model, 1e-5, **inputs(mixed))
model.vision_model.encoder.layers[1].mlp.fc1.weight.mul_(-1)
model.vision_model.embeddings.position_embedding.weight.mul_(-1)
check(model, 1e-5, **inputs(mixed))
print("DONE")
"""
    output = run(VLLM + SIGLIP2 + code, tmp_path, monkeypatch)
    assert "DONE" in output and "vLLM: Siglip2VisionTransformer runs fused, on the " in output


QWEN3_VL = """
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
try:
    from vllm.model_executor.models import qwen3_vl
except ImportError as error:  # torchvision, which does not import beside every torch
    sys.exit(print("CANNOT IMPORT", type(error).__name__, error))

sizes = {"hidden_size": 128, "num_heads": 2, "intermediate_size": 160, "patch_size": 4, "num_position_embeddings": 36,
         "depth": 4, "out_hidden_size": 96, "deepstack_visual_indexes": [2, 0]}

def build(dtype=torch.float32, **values):
    return made(lambda: qwen3_vl.Qwen3_VisionTransformer(Qwen3VLVisionConfig(**sizes | values)), dtype)

def inputs(grids, dtype=torch.float32):
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4, dtype=dtype), grids

@torch.inference_mode()
def check(tower, bound, args, reason=None, **kwargs):
    why = tower.why_not(*args, kwargs.get("encoder_metadata"))
    assert why is None if reason is None else reason in why, why
    got, expected = both(tower, *args, **kwargs)
    assert got.shape == expected.shape and torch.equal(got, expected) == (reason is not None)
    close((got, expected), bound)
"""


def test_qwen3_vl(tmp_path, monkeypatch):
    code = """
mixed = [[1, 4, 6], [2, 8, 4], [1, 2, 2]]
check(build(), 1e-5, inputs(mixed))
for grids in ([[1, 6, 10]], 4 * [[1, 4, 4]], torch.tensor(mixed)):
    check(build(), 1e-5, inputs(grids))
check(build(deepstack_visual_indexes=[]), 1e-5, inputs(mixed))
half = torch.float16 if os.environ.get("SIGLIP_FAST_BACKEND") == "triton" else torch.bfloat16
check(build(half), 2e-2, inputs(mixed, half))
check(build(half), 2e-2, inputs(mixed))  # vLLM's forward casts
tower = build()
check(tower, 0, inputs(mixed), "encoder_metadata is given", encoder_metadata=tower.prepare_encoder_metadata(mixed))
check(tower, 0, (inputs(mixed)[0], None), "encoder_metadata is", encoder_metadata=tower.prepare_encoder_metadata(mixed))
tower = build()
tower.merger.linear_fc1.tp_size = 2
check(tower, 0, inputs(mixed), "merger.linear_fc1 is tensor-parallel over 2")
check(build(hidden_act="gelu"), 0, inputs(mixed), "blocks.0.mlp.act_fn is a GELU")
tower = build()
check(tower, 1e-5, inputs(mixed))
tower.blocks[1].mlp.linear_fc1.weight.mul_(-1)
tower.pos_embed.weight.mul_(-1)
check(tower, 1e-5, inputs(mixed))
from vllm.model_executor.models import qwen3_5, qwen3_vl_moe
assert qwen3_5.Qwen3_VisionTransformer is qwen3_vl_moe.Qwen3_VisionTransformer is type(tower)
print("DONE")
"""
    output = run(VLLM + QWEN3_VL + code, tmp_path, monkeypatch)
    assert "DONE" in output and "vLLM: Qwen3_VisionTransformer runs fused, on the " in output
