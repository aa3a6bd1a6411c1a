"""bench/report.py, on made-up results."""

import csv
import json
import sys

import pytest
import report

from siglip_fast.tuning.cache import source_hash

MILLISECONDS = {"siglip_fast": 2.0, "siglip_fast, graph": 1.0, "stock sdpa": 12.0, "torch.compile, max-autotune": 1.2}


def session(device: str, results: list[dict], capability: str = "9.0") -> str:
    """A file of rows."""
    about = {
        "device": device,
        "capability": capability if "NVIDIA" in device else None,
        "gpu_measured": device.startswith("NVIDIA"),
        "imitated": "IMITATED" in device,
        "threads": 2,
        "driver": "1.2" if "NVIDIA" in device else None,
        "versions": {"torch": "2.13.0"},
        "revision": "abc",
        "measured": "2026-01-02T03:04:05+00:00",
        "tuned": [],
    }
    return "".join(json.dumps(result | {"about": about}) + "\n" for result in results)


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


def kernel(operation: str, milliseconds: dict[str, float], batch_size: int = 1) -> dict:
    return result(milliseconds, batch_size, kind="kernel", operation=operation, mb=4.0, missing={})


def route(milliseconds: float, **operations_us: float) -> dict:
    return {"milliseconds": milliseconds, "launches": 9, "operations_us": operations_us}


def predictions(*routes: dict, kernels: str | None = None) -> dict:
    """Of base-patch16-224 at batch 1, 2 and so on, by the kernels of this checkout unless others are named."""
    cases = [
        {"model": "base-patch16-224", "batch_size": batch_size, "routes": by_name, "kernels": []}
        for batch_size, by_name in enumerate(routes, start=1)
    ]
    return {"about": "made up", "made": "2026-01-01", "kernels": kernels or source_hash(), "predictions": cases}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs report.py on these sessions and predictions; returns its exit status, output and folder."""

    def run(*sessions, predicted=None):
        monkeypatch.setattr(report, "PREDICTIONS", tmp_path / "predictions.json")
        if predicted:
            report.PREDICTIONS.write_text(json.dumps(predicted))
        paths = []
        for i, content in enumerate(sessions):
            paths.append(tmp_path / f"{i}.jsonl")
            paths[-1].write_text(content)
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
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["candidate"] for row in rows] == [*MILLISECONDS, "timm"]
    assert rows[0]["ours_is_times_faster"] == "2.0" and rows[-1]["missing"] == "timm is not installed"
    for row in rows:
        assert (row["device"], row["driver"], row["revision"]) == ("NVIDIA L4", "1.2", "abc")
        assert (row["torch_version"], row["sm_mhz_after"]) == ("2.13.0", "1980.0")


@pytest.mark.parametrize("device, capability, there", [("NVIDIA L4", "8.9", False), ("NVIDIA GH200", "9.0", True)])
def test_targets_are_a_hopper_gpus(run, device, capability, there):
    _, text, _ = run(session(device, [result(MILLISECONDS)], capability))
    assert ("Targets" in text) == there


def test_latency_beside_throughput(run):
    measured = result(MILLISECONDS)
    measured["candidates"]["siglip_fast, graph"]["latency_milliseconds"] = 1.25
    _, text, _ = run(session("NVIDIA L4", [measured]))
    table = text.partition("### Latency of base-patch16-224, bfloat16")[2].splitlines()
    assert "| ms | B = 1 |" in table and "| siglip_fast, graph | 1.25 |" in table and "| siglip_fast | – |" in table


def test_a_rehearsal_cannot_be_taken_for_a_measurement(run):
    predicted = predictions({"siglip_fast": route(0.8)})
    _, text, folder = run(session("IMITATED NVIDIA H200", [result(MILLISECONDS)]), predicted=predicted)
    assert text.startswith("# Rehearsal: no GPU, nothing measured") and "**IMITATED GPU: not measured.**" in text
    headings = [line for line in text.splitlines() if line.startswith("##")]
    assert "## Beside the predictions, NONSENSE" in headings and all(line.endswith("NONSENSE") for line in headings)
    assert "met" not in text.split() and "| ≥ 10 | nonsense |" in text
    with open(folder / "results.csv") as file:
        assert {row["device"] for row in csv.DictReader(file)} == {"IMITATED NVIDIA H200"}


def test_what_was_cut_short_is_reported_and_named(run):
    whole = session("A CPU", [result(MILLISECONDS), result(MILLISECONDS, 8)])
    status, text, _ = run(whole[:-30])
    assert status == 1 and "**0.jsonl: line 2 is not whole**" in text and "| images/s | B = 1 |" in text


def test_of_a_case_that_was_measured_again_the_last_counts(run):
    _, text, _ = run(session("A CPU", [result({"siglip_fast": 8.0}), result({"siglip_fast": 4.0})]))
    assert "| siglip_fast | 250 |" in text and "125" not in text


def test_without_matplotlib_there_are_no_plots(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, text, folder = run(session("A CPU", [result(MILLISECONDS)]))
    assert status == 0 and "**no plots: matplotlib is not installed**" in text and not list(folder.glob("*.png"))


def test_a_cpu_is_no_gpu(run):
    _, text, _ = run(session("A CPU", [result({"siglip_fast": 200.0, "OpenVINO": 100.0})]))
    assert "**GPU: not measured.**" in text and "| OpenVINO | 10 (0.50) |" in text


def test_pictures(run):
    kernels = [kernel("qkv", {"siglip_fast": 0.5, "torch": 1.0}), kernel("fc1", {"siglip_fast": 2.0, "torch": 1.0})]
    _, text, folder = run(session("A CPU", [result(MILLISECONDS), *kernels]))
    for name in ("images_per_second.png", "ratios.png", "kernels.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and name in text


def test_a_file_without_results_is_named(run):
    status, text, _ = run("")
    assert status == 1 and "nothing to report: 0.jsonl: no results" in text
    status, text, _ = run(session("A CPU", [result(MILLISECONDS)]), "")
    assert status == 1 and "**1.jsonl: no results**" in text and "siglip_fast, graph" in text


def beside(text: str) -> list[str]:
    """The lines of the section about the predictions."""
    lines = text.partition("## Beside the predictions\n")[2].splitlines()
    ends = [i for i, line in enumerate(lines) if line.startswith(("## ", "!["))]
    return lines[: ends[0]] if ends else lines


def furthest(text: str) -> str:
    start = "**Furthest from their predictions** (siglip_fast, measured ÷ predicted): "
    (line,) = [line for line in beside(text) if line.startswith("**Furthest")]
    return line.removeprefix(start)


def test_an_h200_beside_the_predictions(run):
    routes = {
        "siglip_fast": route(0.8, qkv=400.0, head=13.0),
        "vendor": route(3.0, qkv=700.0),
        "stock sdpa": route(10.0),
        "torch.compile, max-autotune": route(2.4),
    }
    models = session("NVIDIA H200", [result(MILLISECONDS)])
    times = {
        "siglip_fast": 0.5,
        "siglip_fast, tuned": 0.1,
        "torch": 0.2,
        "vendor: sdpa": 0.9,
        "vendor: sdpa flash": 0.77,
    }
    status, text, folder = run(models, session("NVIDIA H200", [kernel("qkv", times)]), predicted=predictions(routes))
    lines = beside(text)
    assert status == 0 and "## Beside the predictions" in (folder / "README.md").read_text()
    assert "were made on 2026-01-01 and are not edited afterwards" in "\n".join(lines)
    assert "other kernels" not in text
    for row in (
        "| base-patch16-224, 1 | 0.8 | 1 | 1.25 | 10 | 12 | 1.20 | 2.4 | 1.2 | 0.50 |",
        "### Operations of base-patch16-224, B = 1",
        "| qkv | 400 | 500 | 1.25 | 700 | 770 | 1.10 |",
        "| head | 13 | – | – | – | – | – |",
    ):
        assert row in lines
    assert furthest(text) == "qkv of base-patch16-224, B = 1: 1.25."


def test_what_was_not_measured_or_not_predicted_is_a_dash(run):
    models = session("NVIDIA H200", [result({"siglip_fast": 2.0, "stock sdpa": 12.0}), result(MILLISECONDS, 8)])
    kernels = [kernel("qkv", {"siglip_fast": 0.5, "vendor: vendor": 0.6}), kernel("layernorm", {"siglip_fast": 0.5})]
    kernels.append(kernel("qkv", {"siglip_fast": 0.5}, 8))
    predicted = predictions({"siglip_fast": route(1.0, attention=5.0, qkv=400.0)}, {"siglip_fast": route(1.0)})
    status, text, _ = run(models, session("NVIDIA H200", kernels), predicted=predicted)
    rows = [line for line in beside(text) if line.startswith("| ")]
    assert status == 0
    assert [row for row in rows if "predicted" not in row] == [
        "| base-patch16-224, 1 | 1 | 2 | 2.00 | – | 12 | – | – | – | – |",  # without a graph, batch 8 not predicted
        "| attention | 5 | – | – | – | – | – |",
        "| qkv | 400 | 500 | 1.25 | – | 600 | – |",
        "| layernorm | – | 500 | – | – | – | – |",
    ]


def test_the_three_furthest_from_their_predictions(run):
    first = {"siglip_fast": route(1.0, qkv=100.0, fc1=100.0, fc2=100.0, out_proj=100.0)}
    second = {"siglip_fast": route(1.0, qkv=100.0, attention=100.0)}
    measured = {"qkv": 0.13, "fc1": 0.25, "fc2": 0.02, "out_proj": 0.09}  # 1.30, 2.50, 0.20, 0.90
    kernels = [kernel(name, {"siglip_fast": ms, "vendor: vendor": 9.0}) for name, ms in measured.items()]
    kernels += [kernel("qkv", {"siglip_fast": 0.17}, 2), kernel("attention", {"siglip_fast": 0.05}, 2)]  # 1.70, 0.50
    _, text, _ = run(session("NVIDIA H200", kernels), predicted=predictions(first, second))
    assert furthest(text) == (
        "fc2 of base-patch16-224, B = 1: 0.20; fc1 of base-patch16-224, B = 1: 2.50; "
        "attention of base-patch16-224, B = 2: 0.50."
    )


def test_predictions_of_other_kernels_say_so(run):
    predicted = predictions({"siglip_fast": route(0.8)}, kernels="0123")
    _, text, _ = run(session("NVIDIA H200", [result(MILLISECONDS)]), predicted=predicted)
    said = f"**The predictions are of other kernels**: their sources are 0123, those of this checkout {source_hash()}."
    assert said in beside(text) and "| base-patch16-224, 1 | 0.8 | 1 | 1.25 | – | 12 | – | – | 1.2 | – |" in beside(
        text
    )


@pytest.mark.parametrize(
    ("device", "more"),
    [("NVIDIA H100 80GB", {}), ("NVIDIA GH200 480GB", {}), ("NVIDIA H200", {"dtype": "float16"}),
     ("NVIDIA H200", {"model": "large-patch16-384"})],
    ids=["H100", "GH200", "float16", "another-model"],
)  # fmt: skip
def test_what_the_predictions_are_not_of(run, device, more):
    predicted = predictions({"siglip_fast": route(0.8, qkv=400.0)})
    benchmarks = [result(MILLISECONDS, **more), kernel("qkv", {"siglip_fast": 0.5}) | more]
    status, text, _ = run(session(device, benchmarks), predicted=predicted)
    said = "None of these measurements was predicted: the predictions are of base-patch16-224 in bfloat16 on an H200."
    assert status == 0 and [line for line in beside(text) if line] == [said]


def test_no_predictions_no_section(run):
    status, text, _ = run(session("NVIDIA H200", [result(MILLISECONDS)]))
    assert status == 0 and "predictions" not in text


def test_nothing_is_predicted_of_a_cpu(run):
    predicted = predictions({"siglip_fast": route(0.8)})
    _, text, _ = run(session("A CPU", [result(MILLISECONDS)]), predicted=predicted)
    assert "predictions" not in text
