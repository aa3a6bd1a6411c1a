"""bench/report.py, on made-up results."""

import csv
import json
import sys

import pytest
import report

MILLISECONDS = {"siglip_fast": 2.0, "siglip_fast, graph": 1.0, "stock sdpa": 12.0, "torch.compile, max-autotune": 1.2}


def session(device: str, benchmarks: list[dict]) -> dict:
    about = {
        "device": device,
        "gpu_measured": "NVIDIA" in device,
        "threads": 2,
        "driver": "1.2" if "NVIDIA" in device else None,
        "versions": {"torch": "2.13.0"},
        "revision": "abc",
        "measured": "2026-01-02T03:04:05+00:00",
        "tuned": [],
    }
    return {"machine_info": {"about": about}, "benchmarks": [{"extra_info": b} for b in benchmarks]}


def result(milliseconds: dict[str, float], batch_size: int = 1, **more) -> dict:
    figures = {
        name: {
            "milliseconds": ms,
            "images_per_second": 1e3 * batch_size / ms,
            "tflops": 35 / ms,
            "percent_of_peak": 10 / ms,
            "relative_error": 5e-3,
        }
        for name, ms in milliseconds.items()
    }
    clocks = {"sm_mhz": 1980.0}
    common = {
        "kind": "model",
        "model": "base-patch16-224",
        "batch_size": batch_size,
        "dtype": "bfloat16",
        "matmul_peak_tflops": 350.0,
        "clocks": {"before": None, "after": clocks},
        "entered": [*MILLISECONDS, *set(figures) - set(MILLISECONDS), "timm"],
        "candidates": figures,
        "missing": {"timm": "timm is not installed"},
    }
    return common | more


def kernel(operation: str, milliseconds: dict[str, float]) -> dict:
    return result(milliseconds, kind="kernel", operation=operation, mb=4.0, missing={})


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs report.py on these sessions (or texts), and returns its exit status, output and folder."""

    def run(*sessions):
        paths = []
        for i, content in enumerate(sessions):
            paths.append(tmp_path / f"{i}.json")
            paths[-1].write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, paths), "--out", str(tmp_path / "out")])
        return report.main(), capsys.readouterr().out, tmp_path / "out"

    return run


def test_a_gpu(run):
    models = session("NVIDIA H100 80GB", [result(MILLISECONDS), result({"siglip_fast": 4.0, "stock sdpa": 12.0}, 8)])
    kernels = session("NVIDIA H100 80GB", [kernel("qkv", {"siglip_fast": 0.5, "torch": 1.0})])
    status, text, folder = run(models, kernels)
    assert status == 0 and text.rstrip("\n") == (folder / "README.md").read_text().rstrip("\n")
    assert "not measured." not in text
    for row in (
        "| images/s | B = 1 | B = 8 |",
        "| siglip_fast | 500 (2.00) | 2000 |",
        "| siglip_fast, graph | 1000 | – |",
        "| stock sdpa | 83.33 (12.00) | 666.7 (3.00) |",
        "| *fastest of ours* | siglip_fast, graph | siglip_fast |",
        "| base-patch16-224, 1 | ≥ 10 | 12.00, met | ≥ 1.3 | 1.20, **missed** |",
        "| base-patch16-224, 8 | ≥ 4 | 3.00, **missed** | ≥ 1.15 | not measured |",
        "| qkv | 500 | 1000 (2.00) | 70 | 20 | 8 |",
        "- timm: timm is not installed (everywhere)",
    ):
        assert row in text.splitlines()


def test_every_row_says_where_it_was_measured(run):
    _, _, folder = run(session("NVIDIA L4", [result(MILLISECONDS)]))
    rows = json.loads((folder / "results.json").read_text())
    assert [row["candidate"] for row in rows] == [*MILLISECONDS, "timm"]
    assert rows[0]["ours_is_times_faster"] == 2.0 and rows[-1]["missing"] == "timm is not installed"
    for row in rows:
        assert (row["device"], row["driver"], row["revision"]) == ("NVIDIA L4", "1.2", "abc")
        assert (row["torch_version"], row["sm_mhz_after"]) == ("2.13.0", 1980.0)
    with open(folder / "results.csv") as file:
        assert [row["candidate"] for row in csv.DictReader(file)] == [row["candidate"] for row in rows]


def test_targets_are_an_h100s(run):
    _, text, _ = run(session("NVIDIA L4", [result(MILLISECONDS)]))
    assert "Targets" not in text


def test_a_cpu_is_no_gpu(run):
    _, text, _ = run(session("A CPU", [result({"siglip_fast": 200.0, "OpenVINO": 100.0})]))
    assert "**GPU: not measured.**" in text and "| OpenVINO | 10 (0.50) |" in text


def test_pictures(run):
    kernels = [kernel("qkv", {"siglip_fast": 0.5, "torch": 1.0}), kernel("fc1", {"siglip_fast": 2.0, "torch": 1.0})]
    _, text, folder = run(session("A CPU", [result(MILLISECONDS), *kernels]))
    for name in ("images_per_second.png", "ratios.png", "kernels.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and name in text


@pytest.mark.parametrize("content", ["", json.dumps(session("A CPU", []))], ids=["empty", "no-benchmark"])
def test_a_file_without_results_is_named(run, content):
    status, text, _ = run(content)
    assert status == 1 and "nothing to report: 0.json: no results" in text
    status, text, _ = run(session("A CPU", [result(MILLISECONDS)]), content)
    assert status == 1 and "**1.json: no results**" in text and "siglip_fast, graph" in text
