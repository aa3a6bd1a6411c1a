"""Rehearsals of bench/run_gpu.sh: the plan's every stage on an imitated GPU, whole, broken on purpose, and killed."""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cases
import pytest

REPO = Path(__file__).parents[2]


def command(checkout: Path, out: Path, *arguments: str) -> dict:
    """What starts a rehearsal with this Python, for subprocess."""
    environment = os.environ | {"PYTHON": sys.executable, "SIGLIP_FAST_REVISION": "rehearsed"}
    environment.pop("TRITON_INTERPRET", None)
    return {"args": [checkout / "bench/run_gpu.sh", "--rehearse", "--out", out, *arguments], "env": environment}


def rows_of(out: Path) -> list[dict]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names_in_archive(out: Path) -> set[str]:
    with tarfile.open(out / "results.tar.gz") as tar:
        for member in tar.getmembers():
            tar.extractfile(member).read()
        return {name.removeprefix("results/") for name in tar.getnames()}


@pytest.mark.parametrize("extent", ["quick", pytest.param("second", marks=pytest.mark.slow)])
def test_every_stage_runs_to_its_end(extent, tmp_path):
    done = subprocess.run(**command(REPO, tmp_path, f"--{extent}"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert "NOTHING IS MEASURED" in summary and "FAIL" not in summary and "partial" not in summary
    measured = rows_of(tmp_path)
    models = {(r["model"], r["batch_size"]) for r in measured if r["kind"] == "model"}
    assert models == {case[:2] for case in cases.CASES["cuda", extent]}
    kernels = [r for r in measured if r["kind"] == "kernel"]
    assert len(kernels) == (0 if extent == "quick" else 8 * len(models))
    for row in measured:
        about = row["about"]
        assert "IMITATED" in about["device"] and about["imitated"] and not about["gpu_measured"]
        assert about["revision"] == "rehearsed"
    tuned = {r["batch_size"] for r in measured if "siglip_fast, tuned" in r["candidates"]}
    assert tuned == ({64, 1} if extent == "quick" else set())
    report = (tmp_path / "README.md").read_text()
    for heading in ("# Rehearsal", "## The whole model", "## Targets", "## Beside the predictions", "### Latency"):
        assert heading in report
    pictures = {"images_per_second.png", "ratios.png"} | ({"kernels.png"} if kernels else set())
    logs = {f"logs/{line.split()[1]}.log" for line in summary.splitlines() if " pass" in line}
    assert {"rows.jsonl", "results.csv", "README.md", "summary.md", *pictures, *logs} <= names_in_archive(tmp_path)
    assert len(list(tmp_path.iterdir())) <= 8  # which is all that some places take back
    if extent == "quick":
        with tarfile.open(tmp_path / "results.tar.gz") as tar:
            log = tar.extractfile("results/logs/tests.log").read().decode()
        for chosen in ("test_configs.py::test_linear_residual", "test_tensor_descriptors", "test_persistent_layernorm_linear",
                       "test_split_k", "test_layernorm.py::test_accuracy", "test_graphs.py", "test_weights.py",
                       "test_traced.py::test_one_operation", "[fp16-triton", "[fp32-triton", "[bf16-triton"):  # fmt: skip
            assert chosen in log, chosen


BROKEN = {
    # file, what is replaced, by what, the stage that has to notice
    "a kernel's launcher": ("kernels/attention.py", "\ndef attention(", "\ndef attention(missing, ", "bench-model"),
    "no test is left": ("bench/test_model.py", "def test_model(", "def model(", "bench-model"),
    "a test file that does not import": ("tests/kernels/test_tiles.py", "import pytest", "import pytests", "tests"),
    "the report": ("bench/tables.py", "def target_table(", "def targets(", "report"),
    "the imitation": ("bench/imitated_gpu.py", "import torch\n", "import torches\n", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_fails(name, tmp_path):
    file, old, new, stage = BROKEN[name]
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    for folder in ("bench", "kernels", "siglip_fast", "tests", "docs"):
        shutil.copytree(REPO / folder, checkout / folder)
    shutil.copy(REPO / "pyproject.toml", checkout)
    path = checkout / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    only = "bench-model|report" if stage == "report" else stage
    done = subprocess.run(**command(checkout, out, "--only", only), capture_output=True, text=True)
    assert done.returncode == (1 if stage else 2), done.stdout + done.stderr
    if stage:
        assert f"| {stage} | FAIL: " in (out / "summary.md").read_text(), done.stdout


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    start = time.monotonic()
    subprocess.run(**command(REPO, tmp_path / "whole"), check=True, capture_output=True)
    whole = time.monotonic() - start
    moments = [tenth * whole / 10 + random.uniform(0, whole / 10) for tenth in range(10)]
    left = [what_a_kill_leaves(tmp_path / str(number), moment) for number, moment in enumerate(moments)]
    assert len(set(left)) > 2, left  # it was in different stages


def what_a_kill_leaves(out: Path, moment: float) -> str:
    """Kills a rehearsal after so many seconds, looks at what there is, and returns the stage that was running."""
    process = subprocess.Popen(**command(REPO, out), stdout=subprocess.DEVNULL)
    time.sleep(moment)
    process.kill()
    process.wait()
    if not (out / "results.tar.gz").exists():
        return "none, the GPU's name was not known yet"
    rows = rows_of(out)  # each parses
    assert all(row["candidates"] for row in rows)
    assert "summary.md" in names_in_archive(out)
    summary = (out / "summary.md").read_text()
    assert "NOTHING IS MEASURED" in summary
    if rows:
        report = [sys.executable, REPO / "bench/report.py", out / "rows.jsonl", "--out", out]
        subprocess.run(report, check=True, capture_output=True)
        assert "# Rehearsal" in (out / "README.md").read_text()
    states = dict(line.strip("| ").split(" | ")[:2] for line in summary.splitlines() if line.startswith("| "))
    running = [stage for stage, state in states.items() if state == "running"]
    assert len(running) <= 1, summary  # none for a moment between two stages
    return running[0] if running else "none"
