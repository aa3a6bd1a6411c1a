"""SGLang's own towers made fast, on its real classes and loader, in a process without a server: `.ci/sglang` runs it on a CPU.

Each in an interpreter of its own, because a plugin is for good. Towers get what SGLang's loader and the plugin do to them.
"""

import importlib.util

import pytest
from servers import ON, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")

CPU = ON | {"SGLANG_USE_CPU_ENGINE": "1"}

SGLANG = """
import functools, os, socket, sys, torch
try:
    from sglang.srt.models import qwen3_omni_moe, qwen3_vl, siglip, siglip2
    from sglang.srt.model_executor.model_runner_components import load_model_utils, weight_updater
except ImportError as error:
    sys.exit(print("CANNOT IMPORT", type(error).__name__, error))
from sglang.srt.configs.qwen3_vl import Qwen3VLVisionConfig
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.activation import get_act_fn
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from transformers import Siglip2VisionConfig, SiglipVisionConfig
import siglip_fast
from siglip_fast.integrations.sglang import after_load
from siglip_fast.models.base import stock_class

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def start(checkpoint="dummy", rank=0, processes=1, port=None, **values):
    server_args = ServerArgs(model_path=str(checkpoint), device="cpu", attention_backend="torch_native", **values)
    publish(server_args, role="scheduler", ranks=SpawnRanks(rank))
    init_distributed_environment(processes, rank, f"tcp://127.0.0.1:{port or free_port()}", backend="gloo")
    initialize_model_parallel(backend="gloo")
    torch.manual_seed(0)
    return server_args

def filled(make, dtype=torch.float32):
    # as a server has it once its weights are loaded, before the plugin sees it
    torch.set_default_dtype(dtype)
    model = make().eval()
    torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        p.data.normal_(std=0.2)
    for m in model.modules():
        if hasattr(m, "quant_method"):
            m.quant_method.process_weights_after_loading(m)
    return model

def tower_of(model):
    return getattr(model, "vision_model", model)

def made(make, dtype=torch.float32):
    model = filled(make, dtype)
    stock = type(tower_of(model))
    after_load(model)
    assert type(tower_of(model)) is not stock and stock_class(type(tower_of(model))) is stock, siglip_fast.towers(model)
    return model

def left_alone(model, reason):
    before = type(tower_of(model))
    after_load(model)
    (tower,) = siglip_fast.towers(model)
    assert type(tower.module) is before and not tower.fast and reason in tower.reason, tower

@torch.inference_mode()
def both(model, *args, **kwargs):
    # what the model gives with the tower fast, and with it SGLang's
    tower = tower_of(model)
    got, fast = model(*args, **kwargs), type(tower)
    tower.__class__ = stock_class(fast)
    expected = model(*args, **kwargs)
    tower.__class__ = fast
    return got, expected

def check(model, bound, args, reason=None):
    got, expected = both(model, *args)
    with torch.no_grad():
        why = tower_of(model).why_not(*args)
    assert why is None if reason is None else why is not None and reason in why, why
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got, expected) == (reason is not None)
    error = (got.float() - expected.float()).norm() / expected.float().norm()
    assert error <= bound, float(error)

@torch.no_grad()
def check_bf16(make, *args):
    # by the accuracy rule: against float32 with the same weights, at most twice the error of SGLang's own
    model, exact = made(make, torch.bfloat16), filled(make)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    truth = exact(*(a.float() if torch.is_tensor(a) and a.dtype == torch.bfloat16 else a for a in args))
    ours, own = ((y.float() - truth).norm() / truth.norm() for y in both(model, *args))
    print(f"{type(tower_of(exact)).__name__} in bf16: {ours:.1e}, SGLang's own {own:.1e}")
    assert ours <= 2 * own + 1e-6
"""

QWEN3_VL = """
sizes = {"hidden_size": 128, "num_heads": 2, "intermediate_size": 160, "patch_size": 4, "num_position_embeddings": 36,
         "depth": 4, "out_hidden_size": 96, "deepstack_visual_indexes": [2, 0]}
mixed = [[1, 4, 6], [2, 8, 4], [1, 2, 2]]

def stock(quant_config=None, use_data_parallel=False, **values):
    config = Qwen3VLVisionConfig(**sizes | values)
    return qwen3_vl.Qwen3VLMoeVisionModel(config, quant_config=quant_config, use_data_parallel=use_data_parallel)

def build(dtype=torch.float32, **values):
    return made(lambda: stock(**values), dtype)

def inputs(grids, dtype=torch.float32):
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4, dtype=dtype), grids

"""


def test_qwen3_vl(tmp_path, monkeypatch):
    code = """
tower = build()
check(tower, 1e-5, inputs(mixed))
derived = tower._derived[None]
for grids in ([[1, 6, 10]], 8 * [[1, 4, 4]], torch.tensor(mixed)):
    check(tower, 1e-5, inputs(grids))
assert tower._derived[None] is derived and tower.derived_bytes()
for indexes in ([], [1], [0, 1, 3]):
    check(build(deepstack_visual_indexes=indexes), 1e-5, inputs(mixed))
check(build(hidden_size=256, num_heads=2), 1e-5, inputs(mixed))  # head_dim 128
check_bf16(stock, *inputs(mixed, torch.bfloat16))
check(build(torch.bfloat16), 2e-2, inputs(mixed))  # SGLang's forward casts

for edit in (tower.blocks[1].mlp.linear_fc1.weight, tower.pos_embed.weight, tower.rotary_pos_emb.cos_sin_cache):
    with torch.no_grad():
        edit.mul_(-1)
    check(tower, 1e-5, inputs(mixed))
siglip_fast.restore(tower)
assert type(tower) is qwen3_vl.Qwen3VLMoeVisionModel and not {"_derived", "_failure", "backend"} & set(vars(tower))
print("DONE")
"""
    output = run(SGLANG + QWEN3_VL + "start()" + code, tmp_path, monkeypatch, CPU)
    assert "DONE" in output and output.count("SGLang: Qwen3VLMoeVisionModel runs fused, on the ") == 1
    assert "(its first forward: 92 rows)" in output and "running the stock" not in output


LOADED = """
from sglang.srt import model_loader
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
import sglang.srt.plugins, types

def load(checkpoint):
    sglang.srt.plugins.load_plugins()
    config = ModelConfig.from_server_args(start(checkpoint, dtype="float32"))
    return model_loader.get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))

def inputs(grids):
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 16 * 16), grids
"""


def test_loaded(tmp_path, monkeypatch):
    """Its loader reads a whole checkpoint, and the plugin's hooks change the tower, and follow new weights."""
    checkpoint = qwen3_vl(tmp_path)
    code = f"""
model = load({str(checkpoint)!r})
tower = model.visual
assert stock_class(type(tower)) is qwen3_vl.Qwen3VLMoeVisionModel
check(tower, 1e-5, args := inputs([[1, 4, 6], [1, 2, 2]]))
before = both(tower, *args)[0]

updater = object.__new__(weight_updater.WeightUpdater)
object.__setattr__(updater, "get_model", lambda: model)
weight_updater.get_model = lambda: types.SimpleNamespace(weight_cache_mode="off")  # the server's settings
from safetensors.torch import load_file
weights = load_file({str(checkpoint / "model.safetensors")!r})
visual = {{name: 1.5 * weight for name, weight in weights.items() if ".visual." in name}}
assert visual and "model.visual.blocks.0.attn.qkv.weight" in visual
done = updater.load_weights_from_distributed([*visual.items()])
assert done[0], done
check(tower, 1e-5, args)
assert not torch.allclose(both(tower, *args)[0], before)
print("DONE")
"""
    output = run(SGLANG + LOADED + code, tmp_path, monkeypatch, CPU)
    assert "DONE" in output and "SGLang: Qwen3VLMoeVisionModel runs fused, on the " in output
    assert "SGLang: visual" not in output  # nothing is claimed before


def test_loaded_without_the_plugin(tmp_path, monkeypatch):
    code = f"""
assert type(load({str(qwen3_vl(tmp_path))!r}).visual) is qwen3_vl.Qwen3VLMoeVisionModel
print("DONE")
"""
    assert "DONE" in run(SGLANG + LOADED + code, tmp_path, monkeypatch, CPU | {"SIGLIP_FAST_PLUGIN": "0"})


def qwen3_vl(folder):
    whole_checkpoints = pytest.importorskip("whole_checkpoints")  # it takes a tokenizer's library
    return whole_checkpoints.qwen3_vl(folder / "checkpoint")


def test_left_alone(tmp_path, monkeypatch):
    """What cannot run fused as it was loaded keeps SGLang's class."""
    code = """
left_alone(filled(lambda: stock(hidden_act="gelu")), "blocks.0.mlp.act is a GELUActivation")
left_alone(filled(lambda: stock(disable_merger_proj=True)), "merger has no projection")
left_alone(filled(lambda: stock(hidden_size=96, num_heads=2)), "hidden_size is no multiple of 64")
left_alone(filled(lambda: stock(hidden_size=384, num_heads=2)), "head_dim is above 128")

from sglang.srt.layers.attention.vision import VisionAttention
dummies = filled(stock)  # InternVL's way of making heads divisible
dummies.blocks[0].attn = filled(lambda: VisionAttention(128, 2, 128, use_qkv_parallel=True, num_dummy_heads=2))
left_alone(dummies, "blocks.0.attn.qkv_proj makes 768 channels of 128")
left_alone(stock(quant_config=Fp8Config()), "qkv_proj is quantized (Fp8LinearMethod)")

def otherwise(change, reason):
    tower = filled(stock)
    change(tower)
    left_alone(tower, reason)

plain = "blocks.1.attn is not plain softmax attention"
for name, value in (("softmax_scale", 0.1), ("dropout", 0.1), ("qk_normalization", True), ("use_qkv_parallel", False),
                    ("qk_normalization_by_head_size", True), ("customized_position_embedding_applier", print),
                    ("sinks", torch.nn.Parameter(torch.ones(2))), ("num_attention_kv_heads_per_partition", 1)):
    otherwise(lambda tower: setattr(tower.blocks[1].attn, name, value), plain)
otherwise(lambda tower: setattr(tower.blocks[1].attn, "softmax_scale", 64**-0.5) or setattr(tower.blocks[2].attn, "dropout", 1),
          "blocks.2.attn")
otherwise(lambda tower: setattr(tower.blocks[0].mlp.linear_fc2, "use_intel_amx_backend", True), "is packed for AMX")
otherwise(lambda tower: setattr(tower.patch_embed.proj, "use_intel_amx_backend", True), "is packed for AMX")
otherwise(lambda tower: setattr(tower.blocks[3].attn, "qkv_backend", torch.nn.Identity()), "qkv_backend is a Identity")
otherwise(lambda tower: setattr(tower.blocks[3].norm1, "eps", 1) or setattr(tower.blocks[3], "norm1", torch.nn.RMSNorm(128)),
          "blocks.3.norm1 is a RMSNorm")
otherwise(lambda tower: setattr(tower.rotary_pos_emb, "is_neox_style", False), "rotary_pos_emb is not")
qwen3_vl.Qwen3VLMoeVisionModel.forward, own = lambda self, x, grid_thw, more: None, qwen3_vl.Qwen3VLMoeVisionModel.forward
otherwise(lambda tower: None, "its forward takes ['self', 'x', 'grid_thw', 'more'], expected")
qwen3_vl.Qwen3VLMoeVisionModel.forward = own

class Other(qwen3_vl.Qwen3VLMoeVisionModel):
    pass

left_alone(filled(lambda: Other(Qwen3VLVisionConfig(**sizes))), "Other is a subclass of sglang.srt.models.qwen3_vl")
os.environ["SIGLIP_FAST_BACKEND"] = "nonsense"
tower = filled(stock)
after_load(tower)
assert type(tower) is qwen3_vl.Qwen3VLMoeVisionModel
print("DONE")
"""
    output = run(SGLANG + QWEN3_VL + "start()" + code, tmp_path, monkeypatch, CPU)
    assert "DONE" in output and "left alone: Qwen3VLMoeVisionModel: blocks.0.mlp.act is a GELUActivation" in output
    assert "SGLang's model stays as it is: ValueError: backend: expected one of" in output


def test_two_processes(tmp_path, monkeypatch):
    """Tensor parallelism leaves a tower alone; whole in each process, which runs some of the images, it runs fused."""
    code = """
import subprocess
from sglang.srt.multimodal.mm_utils import run_dp_sharded_mrope_vision_model

rank, port = int(os.environ.get("RANK", 0)), os.environ.get("PORT") or str(free_port())
if rank == 0:
    environment = {**os.environ, "RANK": "1", "PORT": port}
    other = subprocess.Popen([sys.executable, "-c", sys.orig_argv[-1]], env=environment)
start(rank=rank, processes=2, port=port, tp_size=2)
left_alone(filled(stock), "pos_embed is tensor-parallel over 2 (--mm-enable-dp-encoder")
with_its_table = filled(stock)
with_its_table.pos_embed.tp_size = 1
left_alone(with_its_table, "blocks.0.attn is tensor-parallel over 2")

tower = build(use_data_parallel=True)
x, grids = inputs(mixed)

def images(x, grids):
    return run_dp_sharded_mrope_vision_model(tower, x, grids, rope_type="rope_3d")

tower_of = lambda model: tower
got, expected = both(images, x, grids)
assert 0 < (got - expected).norm() < 1e-5 * expected.norm()
assert rank or other.wait() == 0
print("DONE")
"""
    output = run(SGLANG + QWEN3_VL + code, tmp_path, monkeypatch, CPU)
    assert output.count("DONE") == output.count("SGLang: Qwen3VLMoeVisionModel runs fused, on the ") == 2


def test_delegates(tmp_path, monkeypatch):
    """Calls that do not run fused give what SGLang's forward gives."""
    code = """
def delegates(change, reason, args=None):
    tower = build()
    change(tower)
    check(tower, 0, args or inputs(mixed), reason)

os.environ["SGLANG_VIT_ENABLE_CUDA_GRAPH"] = "1"
with torch.no_grad():
    assert "SGLANG_VIT_ENABLE_CUDA_GRAPH is set" in build().why_not(*inputs(mixed))
del os.environ["SGLANG_VIT_ENABLE_CUDA_GRAPH"]
fc1 = lambda tower: tower.blocks[2].mlp.linear_fc1
delegates(lambda tower: fc1(tower).register_forward_hook(lambda *args: None), "a ColumnParallelLinear has forward hooks")
from sglang.srt.layers.linear import _LogicalGroup
delegates(lambda tower: setattr(fc1(tower), "tp_group", _LogicalGroup(0, 2)), "blocks.2.mlp.linear_fc1 is tensor-parallel over 2")

class Adapted(torch.nn.Module):  # as LoRA puts its own around it
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)

delegates(lambda tower: setattr(tower.blocks[0].mlp, "linear_fc1", Adapted(tower.blocks[0].mlp.linear_fc1)),
          "blocks.0.mlp.linear_fc1 is a Adapted")
delegates(lambda tower: setattr(tower.blocks[1].attn, "qkv_proj", Adapted(tower.blocks[1].attn.qkv_proj)),
          "blocks.1.attn.qkv_proj is a Adapted")
with torch.autocast("cpu", torch.bfloat16):
    delegates(lambda tower: None, "autocast is active")
from sglang.srt.batch_invariant_ops import batch_invariant_ops
batch_invariant_ops._batch_invariant_MODE = True
delegates(lambda tower: None, "SGLang's deterministic inference is on")
invariant = build()
invariant.batch_invariant = True
with torch.no_grad():
    assert "deterministic" not in (invariant.why_not(*inputs(mixed)) or "")
batch_invariant_ops._batch_invariant_MODE = False
why = build().why_not(*inputs(mixed))
assert "gradients are needed" in why, why
with torch.no_grad():
    for grids, reason in (([[1, 4, 5]], "multiples of 2"), ([[1, 4, 4]], "by grid_thw another number")):
        assert reason in build().why_not(torch.randn(20, 96), grids)
    assert "not [rows, 96]" in build().why_not(torch.randn(20, 48), [[1, 4, 4]])

tower = build()
with torch.no_grad():
    compiled = torch.compile(tower, backend="eager")(*(args := inputs(mixed)))
    assert torch.allclose(compiled, both(tower, *args)[1], rtol=1e-4, atol=1e-5) and tower._failure is None

import siglip_fast.models.weights as module
whole = module.forward_packed
module.forward_packed = lambda *args: 1 / 0
tower = build()
assert torch.equal(*both(tower, *inputs(mixed))) and not tower._derived
check(tower, 0, inputs(mixed), "the first fused forward failed: ZeroDivisionError")
module.forward_packed = whole
check(tower, 0, inputs(mixed), "the first fused forward failed")
siglip_fast.restore(tower)
after_load(tower)  # made fast again, it tries again
check(tower, 1e-5, inputs(mixed))
print("DONE")
"""
    output = run(SGLANG + QWEN3_VL + "start()" + code, tmp_path, monkeypatch, CPU)
    assert "DONE" in output and "torch.compile traces SGLang's code" in output


def test_siglip2(tmp_path, monkeypatch):
    code = """
start()

def stock(**values):
    config = dict(hidden_size=144, num_attention_heads=2, intermediate_size=160, patch_size=4, num_patches=36,
                  num_hidden_layers=3)
    kwargs = {name: values.pop(name) for name in ("num_hidden_layers_override", "require_post_norm") if name in values}
    return siglip2.Siglip2Model(Siglip2VisionConfig(**config | values), prefix="vision_tower", **kwargs)

def build(dtype=torch.float32, **values):
    return made(lambda: stock(**values), dtype)

def inputs(shapes, dtype=torch.float32):
    lengths = [h * w for h, w in shapes]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return torch.randn(1, sum(lengths), 48, dtype=dtype), torch.tensor(shapes), cu_seqlens, torch.tensor(max(lengths))

mixed = [(4, 6), (1, 1), (9, 2), (4, 6)]
for values in ({}, {"require_post_norm": False}, {"num_hidden_layers_override": 2}):
    check(build(**values), 1e-5, inputs(mixed))
model = build()
for shapes in ([(3, 5)], 4 * [(6, 6)], [(2, 7), (12, 3)]):
    check(model, 1e-5, inputs(shapes))
rows, *others = inputs(mixed)
check(model, 1e-5, (rows[0], *others))  # as LFM2-VL gives them, without a batch
got, expected = both(model, rows, *others, select_layers=[0, -2, -1])
assert got.shape == expected.shape and (got - expected).norm() < 1e-5 * expected.norm()
check_bf16(stock, *inputs(mixed, torch.bfloat16))
odd = inputs(mixed)
check(build(), 0, (*odd[:2], odd[2][[0, 2, 3, 4]], odd[3]), "cu_seqlens are not the images'")
for edit in (model.vision_model.encoder.layers[1].mlp.fc1.weight, model.vision_model.embeddings.position_embedding.weight):
    with torch.no_grad():
        edit.mul_(-1)
    check(model, 1e-5, inputs(mixed))

weights = {}
for name, p in model.named_parameters():
    names = [name.replace("attn.qkv_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
    parts = zip(names, p.chunk(3)) if "qkv_proj" in name else [(name.replace("attn.proj", "out_proj"), p)]
    weights |= {part: -value.detach().clone() for part, value in parts}
args = inputs(mixed)
before = both(model, *args)[0]
assert len(model.load_weights(weights.items())) == len([*model.parameters()])
model.vision_model.forget_derived()  # as the hooks of the updaters do
check(model, 1e-5, args)
assert not torch.allclose(both(model, *args)[0], before)
left_alone(filled(lambda: stock(hidden_act="gelu")), "mlp.activation_fn is GELU(approximate='none'), not GELU by tanh")
print("DONE")
"""
    output = run(SGLANG + code, tmp_path, monkeypatch, CPU)
    assert "DONE" in output and output.count("SGLang: Siglip2VisionTransformer runs fused, on the ") == 1


def test_siglip(tmp_path, monkeypatch):
    """As SGLang builds them for pi0.5, and for Gemma 3, whose activation is QuickGELU there."""
    code = """
start()
config = SiglipVisionConfig(hidden_size=144, num_attention_heads=2, intermediate_size=160, image_size=48, patch_size=16,
                            num_hidden_layers=3)
gemma3 = made(lambda: siglip.SiglipVisionModel(config))
assert type(gemma3.vision_model.encoder.layers[0].mlp.act).__name__ == "QuickGELU"
images = torch.randn(3, 3, 48, 48)
for image in images:  # more at once SGLang's attention for CPUs refuses
    check(gemma3, 1e-5, (image[None],))
with torch.no_grad():
    alone = torch.cat([gemma3(image[None]) for image in images])
    torch.testing.assert_close(gemma3(images), alone, atol=1e-4, rtol=1e-4)
check(made(lambda: siglip.SiglipVisionModel(config), torch.bfloat16), 2e-2, (images[:1],))

def two_kinds():
    model = siglip.SiglipVisionModel(config)
    model.vision_model.encoder.layers[1].mlp.act = torch.nn.GELU("tanh")
    return model
left_alone(filled(two_kinds), "its layers have different activations")

def stock():
    act = functools.partial(get_act_fn, config.hidden_act)
    options = {"qkv_backend": "sdpa", "flatten_batch": False, "use_data_parallel": True}
    return siglip.SiglipVisionModel(config, act_layer=act, **options)

def build(dtype=torch.float32):
    return made(stock, dtype)

model = build()
for batch in (1, 3, 2):
    check(model, 1e-5, (torch.randn(batch, 3, 48, 48),))
check_bf16(stock, torch.randn(2, 3, 48, 48, dtype=torch.bfloat16))
check(build(torch.bfloat16), 2e-2, (torch.randn(2, 3, 48, 48),))  # SGLang's forward casts
for edit in (model.vision_model.post_layernorm.weight, model.vision_model.embeddings.position_embedding.weight):
    with torch.no_grad():
        edit.mul_(-1)
    check(model, 1e-5, (torch.randn(2, 3, 48, 48),))
with torch.no_grad():
    assert "have shape [batch, 3, 64, 48]" in model.vision_model.why_not(torch.randn(2, 3, 64, 48))
print("DONE")
"""
    output = run(SGLANG + code, tmp_path, monkeypatch, CPU)
    assert "DONE" in output and output.count("SGLang: SiglipVisionTransformer runs fused, on the ") == 1
