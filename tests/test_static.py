"""bench/static.py: its gates fail what they are for, and hold for what is shipped on the newest and other Tritons."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuxray")
BENCH = Path(__file__).parents[1] / "bench"

# Kernels are compiled in a process of their own: in this one Triton interprets them.
GATE = """
import torch
from gates import failures
from static import describe, launches_of
from siglip_fast.kernels import attention as attention_module
from siglip_fast.kernels.attention import attention
from siglip_fast.kernels.linear_residual import linear_residual

def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")

def gate(arch, launch):
    with launches_of(arch) as launches:
        launch()
    function, arguments, _, kernel = launches[0]
    print("; ".join(failures(describe(arch, "bf16", function, arguments, kernel))) or "every gate holds")

def tile(m, n, warps, stages):
    return dict(BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)

qkv = empty(64, 729, 3, 16, 72)
gemm = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, num_warps=8, num_stages=3)

def residual(K=1152, **changes):
    x, w = empty(64, 729, K), empty(1152, K)
    linear_residual(x, w, empty(1152), empty(64, 729, 1152), gemm | changes)
"""
CASES = {
    "shipped": ("gate('sm_80', residual)", "every gate holds"),
    "spill": ("gate('sm_120', lambda: attention(qkv, tile(128, 64, 8, 2)))", "spills"),
    "shared-memory": ("gate('sm_86', lambda: residual(num_stages=6))", "shared memory"),
    "synchronous": (
        "gate('sm_80', lambda: residual(4352, num_stages=1))",
        "synchronous loads in the main loop",
    ),
    "no-copies": ("gate('sm_80', lambda: residual(num_stages=1))", "no copies that feed the main loop"),
    "narrow": ("gate('sm_80', lambda: residual(K=1153))", "2-byte global loads in a loop"),
    "no-tensor-cores": (
        "attention_module.input_precision = lambda dtype: 'ieee'\n"
        "qkv = qkv.float()\n"
        "gate('sm_90', lambda: attention(qkv, tile(32, 16, 8, 2)))",
        "no HGMMA",
    ),
}


def python(*command: str, path: str = "") -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, str(BENCH)]))
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", CASES)
def test_gate(name):
    code, expected = CASES[name]
    result = python("-c", GATE + code)
    assert expected in result.stdout, result.stdout + result.stderr


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
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*pip, f"triton=={version}"], check=True)
    model = ["--dtype", "bf16", "--model", "so400m-patch14-384"]
    result = python(str(BENCH / "static.py"), *model, path=str(tmp_path))
    assert f"Triton {version}" in result.stdout and result.returncode == 0, result.stdout + result.stderr
