"""bench/run_gpu.sh: what becomes of stages that fail, hang or are cut off, and what lies in DIR at any moment.

Stages here are short programs; those of the plan are rehearsed in test_rehearsal.py.
"""

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import plan
import pytest
import run as run_gpu
from plan import Stage

REPO = Path(__file__).parents[2]


def program(name: str, code: str, seconds: float = 30, **more) -> Stage:
    return Stage(name, ("-c", code), seconds, **more)


def archived(out: Path) -> dict[str, str]:
    with tarfile.open(out / "results.tar.gz") as tar:
        return {m.name.removeprefix("results/"): tar.extractfile(m).read().decode() for m in tar.getmembers()}


@pytest.fixture
def out(tmp_path) -> Path:
    return run_gpu.make_folder(tmp_path / "out")


@pytest.fixture
def run(tmp_path, out, capsys):
    """Runs these stages; returns the exit status and what was printed."""

    def run(*stages: Stage, seconds: float = 100, about: str = "GPU: A"):
        settings = run_gpu.environment(tmp_path / "scratch", "quick", False)
        elapsed = time.monotonic() - run_gpu.START  # since the import
        status = run_gpu.Run(list(stages), elapsed + seconds, about, settings, tmp_path / "scratch", out).all()
        return status, capsys.readouterr().out

    return run


def test_stages_run_in_order_and_leave_logs(run, out):
    status, printed = run(program("one", "print('said')"), program("two", "print('more')"))
    assert status == 0
    files = archived(out)
    assert (files["logs/one.log"], files["logs/two.log"]) == ("said\n", "more\n")
    assert files["summary.md"] == (out / "summary.md").read_text()
    assert "| one | pass | 0 |\n| two | pass | 0 |" in files["summary.md"] and "one: pass" in printed


def test_a_failing_stage_stops_no_other(run, out):
    status, printed = run(program("one", "print('why'); raise SystemExit(3)"), program("two", ""))
    assert status == 1
    assert "| one | FAIL: exit status 3 | 0 |\n| two | pass | 0 |" in (out / "summary.md").read_text()
    assert "    why" in printed  # the end of its log


def test_a_stage_that_hangs_is_ended_with_what_it_started(run, out, tmp_path):
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    status, _ = run(program("one", code, seconds=2), program("two", ""))
    assert status == 1 and "| one | FAIL: not done after 2 s |" in (out / "summary.md").read_text()
    assert "| two | pass |" in (out / "summary.md").read_text()
    assert not is_running(int((tmp_path / "pid").read_text()))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_time_is_kept_for_the_report(run, out):
    status, _ = run(program("one", ""), program("report", ""), seconds=plan.REPORT)
    assert status == 1
    assert "| one | FAIL: no time was left | 0 |\n| report | pass | 0 |" in (out / "summary.md").read_text()


def test_what_a_stage_needs_and_lacks_fails_it_at_once(run, out, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    status, printed = run(program("one", "print('ran')", needs=("cc",)))
    assert status == 1 and "one: FAIL: needs a C compiler (gcc or clang on PATH, or CC)" in printed
    assert "logs/one.log" not in archived(out)


def test_what_is_missing_is_said_first(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    said = run_gpu.what_lacks()
    for text in ("C compiler", "pytest-xdist", "timm", "nvidia-ml-py", "matplotlib"):
        assert any(text in line for line in said)


def test_little_gpu_memory_is_said_first(monkeypatch):
    class Nvml:
        nvmlInit = staticmethod(lambda: None)
        nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
        nvmlDeviceGetMemoryInfo = staticmethod(lambda gpu: type("Memory", (), {"free": 7.9e9}))

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    monkeypatch.setattr(plan, "find_spec", lambda name: "found")
    assert any("24 GB of free GPU memory, only 8" in line for line in run_gpu.what_lacks())


def test_a_tuning_that_ran_out_of_time_is_no_failure(run, out):
    status, _ = run(program("tune", "raise SystemExit(1)", partial=True))
    assert status == 0 and "| tune | partial: see its log | 0 |" in (out / "summary.md").read_text()


def test_a_tuning_that_broke_is_one(run, out):
    assert run(program("tune", "raise SystemExit(2)", partial=True))[0] == 1


@pytest.mark.parametrize(
    "log, said",
    [
        ("=== 2 failed, 310 passed, 1 skipped in 61.20s (0:01:01) ===\n", "2 failed, 310 passed, 1 skipped"),
        ("[gw1] [ 1%] PASSED a\n[gw0] [ 2%] FAILED b\n[gw1] [ 3%] PASSED c\n", "2 passed, 1 failed"),
        ("", ""),
    ],
    ids=["whole", "cut", "empty"],
)
def test_what_pytest_said(log, said):
    assert run_gpu.counts(log) == said


def test_tests_that_were_not_executed_did_not_pass(run, out):
    code = "print('== 3 passed in 1.00s ==')"
    run(Stage("tests", ("-c", code, "pytest"), 30), about=run_gpu.IMITATED)
    summary = (out / "summary.md").read_text()
    assert "3 found and not executed" in summary and "passed" not in summary and "NOTHING IS MEASURED" in summary


START = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job was told to ignore it
sys.path.insert(0, sys.argv[2])
import run
from plan import Stage
run.ARCHIVE_EVERY = 0.1
scratch, out = Path(sys.argv[1]) / "scratch", run.make_folder(Path(sys.argv[1]) / "out")
code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
stages = [Stage("one", ("-c", "print('said')"), 30), Stage("two", ("-c", code), 30), Stage("three", ("-c", ""), 30)]
sys.exit(run.Run(stages, 1e6, "A", run.environment(scratch, "quick", False), scratch, out).all())
"""


@pytest.mark.parametrize("kind, status", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_cut_off_in_a_stage(kind, status, tmp_path, out):
    process = subprocess.Popen([sys.executable, "-c", START, tmp_path, REPO / "bench"], stdout=subprocess.DEVNULL)
    log = tmp_path / "scratch/logs/two.log"
    while not (log.exists() and log.read_text() and "logs/two.log" in archived(out)):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(kind)
    assert process.wait(20) == status
    files = archived(out)
    assert files["logs/one.log"] == "said\n" and files["logs/two.log"] == log.read_text()
    doing = "interrupted" if kind == signal.SIGINT else "running"
    assert f"| two | {doing} |" in files["summary.md"] and "| three | not begun | 0 |" in files["summary.md"]
    stage = int(log.read_text().split()[0])
    for _ in range(100):
        if not is_running(stage):
            break
        time.sleep(0.05)
    assert not is_running(stage)


def test_the_checkout_is_imported_without_being_installed(run, out):
    """-S leaves out site-packages, and with them an installed siglip_fast."""
    code = "import siglip_fast.errors, siglip_fast.kernels as k; print(k.__file__)"
    status, _ = run(Stage("one", ("-S", "-c", code), 30))
    assert status == 0 and Path(archived(out)["logs/one.log"].strip()).parts[-3:] == (
        "siglip_fast",
        "kernels",
        "__init__.py",
    )


def test_nothing_is_written_outside_the_runs_folders(tmp_path, monkeypatch):
    for name in list(os.environ):
        if "CACHE" in name or name in ("HF_HOME", "MPLCONFIGDIR"):
            monkeypatch.delenv(name)
    settings = run_gpu.environment(tmp_path, "quick", False)
    folders = {n for n in settings if settings[n].startswith(str(tmp_path))}
    assert {
        "SIGLIP_FAST_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "HF_HOME",
        "MPLCONFIGDIR",
    } <= folders
    assert settings["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("folder", ["file/below", "file"])
def test_a_folder_that_cannot_be_written_to(folder, tmp_path):
    (tmp_path / "file").write_text("")
    done = start("--only", "none", "--out", str(tmp_path / folder))
    assert done.returncode == 2 and "--out: a folder that can be written to is needed" in done.stderr


def test_runs_have_folders_of_their_own(monkeypatch):
    folders = []
    for name in ("--quick", "--second"):
        monkeypatch.setattr(sys, "argv", ["run.py", name])
        folders.append(run_gpu.default_folder("NVIDIA H200", run_gpu.parse()))
    assert folders[0] != folders[1] and all(f.parent == REPO / "docs/results" for f in folders)
    assert all(f.name.startswith("nvidia-h200-20") for f in folders)
    monkeypatch.setattr(sys, "argv", ["run.py", "--rehearse"])
    assert REPO not in run_gpu.default_folder("IMITATED H200", run_gpu.parse()).parents


def test_usage():
    assert start("--fast").returncode == 2


def start(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run([REPO / "bench/run_gpu.sh", *arguments], env=environment, capture_output=True, text=True)


class TestPlan:
    def names(self, extent: str, on_gpu: bool = True) -> list[str]:
        return [stage.name for stage in plan.stages(extent, on_gpu, False, 16, Path("out"))]

    def test_order(self):
        assert self.names("quick") == ["tests", "tune-base-patch16-224-bfloat16", "bench-model", "report"]
        assert self.names("second") == ["bench-kernels", "bench-model", "report"]
        assert self.names("quick", on_gpu=False) == ["info", "tests", "bench-kernels", "bench-model", "report"]

    def test_batch_64_is_tuned_first(self):
        (tune,) = [s for s in plan.stages("quick", True, False, 16, Path("out")) if s.name.startswith("tune")]
        at = tune.arguments.index("--batch-sizes")
        assert tune.arguments[at + 1 : at + 3] == ("64", "1")

    @pytest.mark.parametrize("extent", ["quick", "second"])
    def test_each_stage_has_time_even_if_all_before_use_theirs_up(self, extent):
        stages = plan.stages(extent, True, False, 16, Path("out"))
        others = sum(stage.seconds + run_gpu.GRACE for stage in stages if stage.name != "bench-model")
        assert plan.SECONDS[extent] <= 240 and plan.SECONDS[extent] - others > 60

    def test_every_file_is_there(self):
        for stage in plan.stages("full", True, False, 16, Path("out")):
            paths = [Path(a) for a in stage.arguments if a.endswith(".py")]
            assert all(path.exists() for path in paths)
