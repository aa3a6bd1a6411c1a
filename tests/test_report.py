"""bench/report.py, on made-up results."""

import json
import sys

import pytest
import report


def case(name: str, milliseconds: dict[str, float], missing: list[str]) -> dict:
    ours = milliseconds["siglip_fast"]
    return {
        "extra_info": {
            "case": [name, 1, "float32"],
            "milliseconds": milliseconds,
            "speedup": {peer: ms / ours for peer, ms in milliseconds.items()},
            "relative_error": dict.fromkeys(milliseconds, 1e-6),
            "missing": missing,
            "gflops": 20.0,
            "matmul_peak_gflops": 200,
            "threads": 2,
            "versions": {"torch": "2.13.0"},
        }
    }


@pytest.fixture
def files(tmp_path):
    first = case("small", {"stock": 300.0, "OpenVINO": 100.0, "siglip_fast": 200.0}, [])
    second = case("large", {"stock": 900.0, "siglip_fast": 600.0}, ["OpenVINO: not installed"])
    about = {
        "machine_info": {"cpu": {"brand_raw": "A CPU"}, "python_version": "3.11"},
        "datetime": "2026-01-02T",
    }
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, benchmark in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(about | {"benchmarks": [benchmark]}))
    return list(map(str, paths))


def test_report(files, tmp_path, monkeypatch, capsys):
    text, picture = tmp_path / "out.md", tmp_path / "out.png"
    monkeypatch.setattr(sys, "argv", ["report.py", *files, "--markdown", str(text), "--plot", str(picture)])
    assert report.main() == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| small, 1, float32 | 300 (1.50) | 100 (0.50) | 200 | 100 |",
        "| large, 1, float32 | 900 (1.50) | – | 600 | 100 |",
    ]
    written = text.read_text()
    assert "A CPU, 2 threads" in written and "Not there: OpenVINO: not installed." in written
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_report(files, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"benchmarks": []}))
    monkeypatch.setattr(sys, "argv", ["report.py", str(empty)])
    assert report.main() == 1
    assert "no benchmark" in capsys.readouterr().out
