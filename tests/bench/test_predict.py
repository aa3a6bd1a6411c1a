"""bench/predict.py and the model behind it: by hand on made-up machine code, and the command on a real model."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("cuxray")
import gpu_model
import peer_model
from bound import Work
from machine_code import MachineCode

BENCH = Path(__file__).parents[2] / "bench"
# A tile of 128×128 by K = 768: 12 passes of a loop whose 8 warps do 4 products of 64×128×16 each
WORK = Work(
    rows=128 * 264, flops=0, bytes=0, tiles=264, programs=264, program_flops=2 * 128 * 128 * 768, trips=12,
    l2_bytes=12 * 32768, warps=8, stages=3,
)  # fmt: skip
CODE = MachineCode(
    registers=168, spills=0, shared=1, shared_limit=2, occupancy=12.5, everything=Counter(),
    main_loop=Counter({"HGMMA.64x128x16.F32.BF16": 4}), unrolled=False, sometimes=Counter(),
    outside=Counter({"MUFU.EX2": 64}), loops=(), waiting=1,
)  # fmt: skip
TENSOR_US = 1e6 * WORK.program_flops / (gpu_model.TENSOR / gpu_model.SMS)
# 64 instructions of 8 warps, 16 lanes a clock
EPILOGUE_US = 1e6 * 64 * 8 * 2 / gpu_model.HZ
FILL, DRAIN = 1e6 * gpu_model.FILL, 1e6 * gpu_model.DRAIN


def chain(work: Work, code: MachineCode, kernel: str = "linear_residual") -> float:
    return gpu_model.time_of(kernel, work, code).bounds["chain"]


def test_one_cta_an_sm_does_one_thing_after_the_other():
    assert chain(WORK, CODE) == pytest.approx(2 * (FILL + TENSOR_US + EPILOGUE_US + DRAIN))


def test_two_ctas_overlap():
    assert chain(WORK, replace(CODE, occupancy=25.0)) == pytest.approx(chain(WORK, CODE) / 2)


def test_a_persistent_program_fills_once():
    work, code = replace(WORK, programs=132), replace(CODE, sometimes=CODE.outside, outside=Counter())
    assert chain(work, code) == pytest.approx(FILL + 2 * (TENSOR_US + EPILOGUE_US + DRAIN))


def test_few_stages_wait_for_l2():
    slow = replace(WORK, stages=2, trips=48)
    assert chain(slow, CODE) == pytest.approx(2 * (FILL + 48e6 * gpu_model.LATENCY + EPILOGUE_US + DRAIN))


def test_a_serialized_loop_adds_what_an_asynchronous_one_overlaps():
    loop = CODE.main_loop + Counter({"MUFU.EX2": 16})
    waiting = replace(CODE, main_loop=loop, waiting=4)
    assert chain(WORK, waiting) > chain(WORK, replace(CODE, main_loop=loop)) == pytest.approx(chain(WORK, CODE))
    assert chain(WORK, replace(CODE, main_loop=loop), "attention") == pytest.approx(chain(WORK, waiting))


def test_what_binds():
    assert gpu_model.time_of("linear_residual", replace(WORK, bytes=10**9), CODE).binds == "memory"
    assert gpu_model.time_of("linear_residual", replace(WORK, l2_bytes=10**8), CODE).binds == "L2"


def test_a_vendor_gemm_is_never_faster_than_tensor_cores_and_memory():
    for M, N, K in ((1, 768, 768), (196, 2304, 768), (12544, 768, 3072)):
        flops, moved = 2 * M * N * K, 2 * (M * K + N * K + M * N)
        assert peer_model.gemm(M, N, K) > max(flops / gpu_model.TENSOR, moved / gpu_model.MEMORY)


def test_command(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    written, shown = tmp_path / "p.json", tmp_path / "p.md"
    command = [sys.executable, BENCH / "predict.py", "--model", "base-patch16-224", "--batch-sizes", "1"]
    done = subprocess.run(
        [*command, "--json", written, "--markdown", shown], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "predicted ms: siglip_fast" in done.stdout, done.stdout + done.stderr
    [prediction] = json.loads(written.read_text())["predictions"]
    routes = prediction["routes"]
    assert list(routes) == ["siglip_fast", "vendor", "stock sdpa", "torch.compile, max-autotune"]
    own, kernels = routes["siglip_fast"], prediction["kernels"]
    assert own["launches"] == sum(kernel["launches"] for kernel in kernels)
    assert list(own["operations_us"]) == [
        "patch_embed", "qkv", "attention", "out_proj", "fc1", "fc2", "layernorm", "attention_pool", "head",
    ]  # fmt: skip
    total = sum(kernel["launches"] * kernel["us"] for kernel in kernels)
    assert total == pytest.approx(1e3 * own["milliseconds"], rel=0.01)
    assert "Nothing here is a measurement" in shown.read_text()
