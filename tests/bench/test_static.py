"""bench/static.py: its gates fail what they are for, and hold for what is shipped on the newest and other Tritons."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuxray")
BENCH = Path(__file__).parents[2] / "bench"

# Kernels are compiled in a process of their own: in this one Triton interprets them.
GATE = """
import torch
from gates import failures
from static import describe, launches_of
from siglip_fast.kernels import attention as attention_module
from siglip_fast.kernels.attention import attention
from siglip_fast.kernels.attention_segments import attention_segments
from siglip_fast.kernels.layernorm_linear import layernorm_linear
from siglip_fast.kernels.linear_residual import linear_residual

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def rows(arch, launch):
    with launches_of(arch) as launches:
        launch()
    return [describe(arch, "bf16", *launch[:2], launch[3]) for launch in launches]

def gate(arch, launch):
    print("; ".join(failures(rows(arch, launch)[0])) or "every gate holds")

def tile(m, n, warps, stages):
    return dict(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)

qkv = empty(64, 729, 3, 16, 72)
gemm = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)

def residual(K=1152, **changes):
    x, w = empty(64, 729, K), empty(1152, K)
    linear_residual(x, w, empty(1152), empty(64, 729, 1152), gemm | changes)

def normed(dtype=torch.bfloat16, **changes):
    x, moments = empty(64, 729, 1152, dtype=dtype), empty(64 * 729, 2, 18, dtype=torch.float32)
    folded = empty(4304, 1152), empty(4304, dtype=torch.float32), empty(4304, dtype=torch.float32)
    layernorm_linear(x, moments, *folded, 1e-6, 'tanh', config=gemm | changes)
"""
CASES = {
    "shipped": ("gate('sm_80', residual)", "every gate holds"),
    "autocast": ("gate('sm_80', lambda: normed(torch.float32))", "every gate holds"),
    "attention": (
        "for N, H, d in ((196, 12, 64), (729, 16, 72), (577, 16, 96)):\n    gate('sm_90', lambda: attention(empty(8, N, 3, H, d)))",
        "every gate holds\nevery gate holds\nevery gate holds",
    ),
    "segments": (
        "entries = empty(512, 4, dtype=torch.int32)\n"
        "for d in (64, 72, 80, 96):\n"
        "    gate('sm_90', lambda: attention_segments(empty(65536, 3, 16, d), 4096, {128: entries}))",
        "every gate holds\n" * 4,
    ),
    "spill": ("gate('sm_120', lambda: attention(qkv, tile(128, 128, 8, 2)))", "spills"),
    "shared-memory": ("gate('sm_86', lambda: residual(num_stages=6))", "shared memory"),
    "synchronous": ("gate('sm_80', lambda: residual(4352, num_stages=1))", "synchronous loads in the main loop"),
    "no-copies": ("gate('sm_80', lambda: residual(num_stages=1))", "no copies that feed the main loop"),
    "narrow": ("gate('sm_80', lambda: residual(K=1153))", "2-byte global loads in a loop"),
    "persistent": (
        "for arch in ('sm_90', 'sm_100'):\n"
        "    for tile in dict(BLOCK_M=256), dict(BLOCK_N=256):\n"
        "        if tile.get('BLOCK_M'):\n"
        "            gate(arch, lambda: residual(TMA=True, PERSISTENT=True, **tile))\n"
        "        gate(arch, lambda: normed(TMA=True, PERSISTENT=True, **tile))",
        "every gate holds\n" * 6,
    ),
    "split": ("gate('sm_90', lambda: residual(4304, SPLIT_K=2))", "every gate holds"),
    "blackwell": ("gate('sm_100', lambda: residual(num_stages=1))", "a serialized main loop: 1 of 1"),
    "no-tensor-cores": (
        "attention_module.input_precision = lambda dtype: 'ieee'\n"
        "qkv = qkv.float()\n"
        "gate('sm_90', lambda: attention(qkv, tile(32, 16, 8, 2)))",
        "no HMMA",
    ),
}


CANDIDATES = """
from siglip_fast.kernels import attention_pool, layernorm, layernorm_linear, linear_residual, patch_embed
f32, dtype = torch.float32, torch.bfloat16
D, F, N, H = 1152, 4304, 729, 16

def launches(operation):
    for M in (64, 729):
        x, h, m = empty(1, M, D), empty(1, M, F), empty(M, 2, 18, dtype=f32)
        if operation == "linear_residual":
            for config in linear_residual.linear_residual_configs(dtype, "sm_90", M, D, F):
                yield lambda: linear_residual.linear_residual(h, empty(D, F), empty(D), x, config)
        if operation == "layernorm_linear":
            folded = empty(F, D), empty(F, dtype=f32), empty(F, dtype=f32)
            for config in layernorm_linear.layernorm_linear_configs(dtype, "sm_90", M, F, D):
                yield lambda: layernorm_linear.layernorm_linear(x, m, *folded, 1e-6, 'tanh', config=config)
        if operation == "layernorm":
            for config in layernorm.layernorm_configs():
                yield lambda: layernorm.layernorm(x, m, empty(D), empty(D), 1e-6, config=config)
        if operation == "attention_pool":
            weights = empty(H, D, dtype=f32), empty(D, D), empty(D)
            images = empty(M, N, D)
            for config in attention_pool.attention_pool_configs(dtype, "sm_90", M, N):
                yield lambda: attention_pool.attention_pool(images, *weights, config)
    if operation == "patch_embed":
        for config in patch_embed.patch_embed_configs(dtype, "sm_90", N, D, 588):
            pixels, position = empty(1, 3, 384, 384), empty(N, D)
            yield lambda: patch_embed.patch_embed(pixels, empty(D, 588), empty(D), position, 14, config=config)
    if operation == "attention":
        for B in (1, 64):
            for config in attention_module.attention_configs(dtype, "sm_90", B, N, H, 72):
                yield lambda: attention(empty(B, N, 3, H, 72), config)

def report(operation):
    for launch in launches(operation):
        for row in rows("sm_90", launch):
            print(row.kernel, row.config, failures(row))
"""


def python(*command: str, path: str = "") -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(BENCH)]))
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", CASES)
def test_gate(name):
    code, expected = CASES[name]
    result = python("-c", GATE + code)
    assert expected in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("launch", ["normed(TMA=True)", "residual(4304, TMA=True, SPLIT_K=4)"])
def test_tensor_descriptors(arch, launch):
    """Copies by the Tensor Memory Accelerator feed the main loop, and the gates hold, in the epilogue too."""
    code = f"""
for row in rows("{arch}", lambda: {launch}):
    copies = sorted(op for op in row.code.main_loop if "LDG" in op)
    print(row.kernel, row.config.get("TMA", False), *copies, failures(row))
"""
    result = python("-c", GATE + code)
    gemm, *epilogue = result.stdout.splitlines() or pytest.fail(result.stderr)
    name = "layernorm_linear" if launch.startswith("normed") else "linear_residual"
    assert gemm == f"{name} True UTMALDG.2D []"
    assert [line.split()[0] for line in epilogue] == ["residual_epilogue"] * (name == "linear_residual")
    assert all(line.endswith(" []") for line in epilogue)


@pytest.fixture(scope="session")
def triton_3_6(tmp_path_factory) -> str:
    return install_triton("3.6.0", tmp_path_factory.mktemp("triton"))


def install_triton(version: str, folder: Path) -> str:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, f"triton=={version}"], check=True)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["", "triton_3_6"], ids=["installed", "3.6.0"])
@pytest.mark.parametrize(
    "operation", ["linear_residual", "layernorm_linear", "patch_embed", "layernorm", "attention", "attention_pool"]
)
def test_candidates(operation, triton, request):
    """None spills, exceeds the shared memory of sm_90 or is serialized there: what so400m-patch14-384 may run, at batch
    1 and 64 images or rows."""
    path = request.getfixturevalue(triton) if triton else ""
    result = python("-c", GATE + CANDIDATES + f"report({operation!r})", path=path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) >= 7, result.stdout + result.stderr
    wrong = ("spills", "shared memory", "compile", "serialized")
    assert not [line for line in lines if any(word in line for word in wrong)]


def test_attention_with_its_tail_behind_the_loop_is_serialized(tmp_path):
    """As it was until 2026-11-29: the gate would have seen it."""
    source = (BENCH.parent / "kernels" / "attention.py").read_text()
    start, end = source.index("    if TAIL_N > 0:"), source.index("    out_ptr += batch")
    tail, loop = source[start:end].split("    for start in range", 1)
    old = source[:start] + "    for start in range" + loop + tail + source[end:]
    shutil.copytree(BENCH.parent / "kernels", tmp_path / "kernels")
    (tmp_path / "kernels" / "attention.py").write_text(old)
    code = f"""
import siglip_fast.kernels
siglip_fast.kernels.__path__[:] = [{str(tmp_path / "kernels")!r}]
{GATE}
for N, H, d in ((196, 12, 64), (729, 16, 72)):
    gate("sm_90", lambda: attention(empty(8, N, 3, H, d)))
"""
    result = python("-c", code)
    assert result.stdout.count("a serialized main loop") == 2, result.stdout + result.stderr


def test_command(tmp_path):
    written = tmp_path / "static.json"
    model = ["--arch", "sm_80", "--dtype", "bf16", "--model", "base-patch16-224"]
    result = python(str(BENCH / "static.py"), *model, "--json", str(written))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].endswith("every gate holds")
    assert '"gpu": "A100"' in written.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0", "3.9.0"])
def test_triton_versions(version, tmp_path):
    """Every architecture, the widest head_dim mix: so400m-patch14-384 in bf16."""
    model = ["--dtype", "bf16", "--model", "so400m-patch14-384"]
    result = python(str(BENCH / "static.py"), *model, path=install_triton(version, tmp_path))
    assert f"Triton {version}" in result.stdout and result.returncode == 0, result.stdout + result.stderr
