"""The search around the candidates: the worker that crashes, hangs or lies, the budget, two processes at once; and one
real search, in Triton's interpreter."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch
import zoo
from models import TINY, drop_in, stock_model
from packed_towers import naflex_inputs
from transformers import Siglip2VisionConfig, SiglipVisionConfig

from siglip_fast.backends import select
from siglip_fast.backends.choice import DEFAULT
from siglip_fast.cli.main import main
from siglip_fast.tuning import cache
from siglip_fast.tuning import tune as tuning
from siglip_fast.tuning.cache import Key, Operation
from siglip_fast.tuning.cases import Case, cases, inputs
from siglip_fast.tuning.packed_cases import cases_of, usual_tokens
from siglip_fast.tuning.verify import Verifier

CPU = torch.device("cpu")
CONFIG = SiglipVisionConfig(**TINY)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SIGLIP_FAST_TUNE", raising=False)
    return tmp_path / "cache"


# A worker in place of the real one. Candidates are called a, b and c, and the first that is not skipped wins; what
# `trouble` says happens to candidate b of the second case, or before any candidate.
FAKE = textwrap.dedent("""
    import json, os, signal, sys, time
    trouble, log, fd = sys.argv[1:]
    request = json.load(sys.stdin)
    open(log, "a").write(json.dumps(request) + "\\n")
    events = os.fdopen(int(fd), "w")
    def emit(**event): print(json.dumps(event), file=events, flush=True)
    print("what a library prints", flush=True); os.system("echo and a program")
    names = NAMES
    if trouble == "at start": sys.exit("no such device")
    for item, skipped in request["cases"]:
        name = names[json.dumps(item)]
        emit(case=name, candidate="preparation")
        if trouble == "preparation" and name == names[list(names)[1]]: os.kill(os.getpid(), signal.SIGKILL)
        for candidate in "abc":
            if candidate in skipped: continue
            emit(case=name, candidate=candidate)
            if candidate == "b" and name == names[list(names)[1]]:
                if trouble == "crash": os.kill(os.getpid(), signal.SIGSEGV)
                if trouble == "exit": sys.exit("CUDA error: an illegal memory access")
                if trouble == "hang": time.sleep(60)
                if trouble == "out of time": sys.exit()
        if trouble == "slow": time.sleep(0.3)
        found = {"route": "triton", "config": {"BLOCK_M": 64}, "microseconds": {"x": 1.0}}
        emit(case=name, entry={"eager": found, "graph": found, "dropped": skipped})
    if trouble == "at the end" and len(request["cases"]) > 1: os.kill(os.getpid(), signal.SIGSEGV)
""")


@pytest.fixture
def run(tmp_path):
    """run(trouble, **kwargs) → (report, the requests that the fake worker got)."""
    wanted = cases(CONFIG, 9, torch.float16, [2])
    names = {json.dumps(tuning.encode(case)): str(case) for case in wanted}
    code, log = FAKE.replace("NAMES", repr(names)), tmp_path / "log"

    def run(trouble: str, keep_log: bool = False, **kwargs):
        if not keep_log:
            log.write_text("")
        worker = [sys.executable, "-c", code, trouble, str(log)]
        report = tuning.tune(CONFIG, torch.float16, [2], CPU, worker=worker, **kwargs)
        return report, [json.loads(line) for line in log.read_text().splitlines()]

    run.log, run.cases = log, wanted
    return run


def in_cache() -> dict:
    return cache.read(Key.of(CPU))


def test_everything_is_measured_once(run):
    report, requests = run("")
    assert list(report.entries) == run.cases and report.left == []
    assert len(requests) == 1 and report.path == Key.of(CPU).path()
    assert sum(map(len, in_cache().values())) == len(run.cases)
    report, requests = run("")
    assert requests == [] and list(report.entries) == run.cases
    _, requests = run("", force=True)
    assert len(requests[0]["cases"]) == len(run.cases)


@pytest.mark.parametrize(
    "trouble, reason",
    [
        ("crash", "ended the process (exit status -11: and a program)"),
        ("exit", "ended the process (exit status 1: CUDA error: an illegal memory access)"),
        ("hang", "gave no result in 3 s"),
    ],
)
def test_a_candidate_that_ends_the_worker_is_left_out_of_the_next(run, trouble, reason, caplog):
    with caplog.at_level(logging.WARNING):
        report, requests = run(trouble, stall=3)
    assert report.left == [] and len(requests) == 2
    # the first case was done, the second begins again without b
    assert [skipped for _, skipped in requests[1]["cases"]][:2] == [{"b": reason}, {}]
    assert len(requests[1]["cases"]) == len(run.cases) - 1
    assert report.entries[run.cases[1]]["dropped"] == {"b": reason}
    assert f"tuning {run.cases[1]}: b {reason}" in caplog.text


def test_a_case_whose_preparation_ends_the_worker(run):
    report, requests = run("preparation")
    assert report.left == [] and len(requests) == 2 and len(requests[1]["cases"]) == len(run.cases) - 2
    entry = report.entries[run.cases[1]]
    assert not cache.is_measured(entry) and "exit status -9" in entry["dropped"]["all"]
    assert all(map(cache.is_measured, (e for c, e in report.entries.items() if c != run.cases[1])))


def test_a_worker_that_fails_when_all_is_done(run):
    report, requests = run("at the end")
    assert report.left == [] and len(requests) == 1


def test_a_worker_that_does_not_start(run):
    with pytest.raises(RuntimeError, match="failed before it began: .*no such device"):
        run("at start")
    assert in_cache() == {}


def test_out_of_time(run):
    report, requests = run("out of time")
    assert len(requests) == 1
    assert list(report.entries) == run.cases[:1] and report.left == run.cases[1:]
    assert len(in_cache()) == 1
    report, requests = run("")
    assert len(requests[0]["cases"]) == len(run.cases) - 1 and report.left == []


def test_no_budget_at_all(run):
    report, requests = run("", budget=0)
    assert requests == [] and report.left == run.cases


def test_what_was_found_before_an_interrupt_is_kept(run, monkeypatch):
    write, written = cache.write, []

    def write_and_interrupt(key, entries):
        write(key, entries)
        written.append(1)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write", write_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("")
    assert len(in_cache()) == 2


def test_a_corrupt_cache_is_rebuilt(run):
    run("")
    Key.of(CPU).path().write_text('{"format": 1, "key"')
    report, requests = run("")
    assert len(requests[0]["cases"]) == len(run.cases) and report.left == []
    assert sum(map(len, in_cache().values())) == len(run.cases)


def test_what_other_models_have_in_the_cache_stays(run):
    other = {"linear_residual 1x2x1 bfloat16": {"4": tuning.unmeasured("for a test")}}
    cache.write(Key.of(CPU), other)
    run("", force=True)
    assert in_cache().items() >= other.items()


def test_two_at_once(run, caplog):
    """The second waits for the first, and then has nothing to do."""
    reports = []
    threads = [threading.Thread(target=lambda: reports.append(run("slow", keep_log=True))) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        threads[0].start()
        while not (run.log.exists() and run.log.read_text()):  # its worker has begun
            time.sleep(0.05)
        threads[1].start()
        for thread in threads:
            thread.join()
    assert "another process is tuning" in caplog.text
    assert all(report.left == [] for report, _ in reports) and len(reports) == 2
    assert len(run.log.read_text().splitlines()) == 1


def test_the_lock_is_of_the_file_system(run):
    """So that it holds between processes, not only between threads."""
    run("")
    with filelock.FileLock(Key.of(CPU).path().with_suffix(".lock"), timeout=0):
        code = "import filelock, sys; filelock.FileLock(sys.argv[1], timeout=0).acquire()"
        lock = str(Key.of(CPU).path().with_suffix(".lock"))
        other = subprocess.run([sys.executable, "-c", code, lock], capture_output=True, text=True)
    assert "Timeout" in other.stderr


@pytest.mark.parametrize("sizes, wrong", [([0], 0), ([1, 2.5], 2.5), (["8"], "'8'")])
def test_wrong_batch_sizes(sizes, wrong):
    with pytest.raises(ValueError, match=f"batch_sizes: expected positive integers, got {wrong}"):
        tuning.tune(CONFIG, torch.float16, sizes, CPU)


class TestFirstContact:
    @pytest.fixture
    def searches(self, monkeypatch):
        """What was searched for. The search, which is replaced, measures the first case only."""
        calls = []

        def fake(wanted, entries, key, device, deadline, worker, stall):
            calls.append(wanted)
            time.sleep(self.seconds)
            if self.fails:
                raise RuntimeError("the process died")
            found = {"route": "vendor", "config": None, "microseconds": {"vendor": 1.0}}
            first = {"eager": found, "graph": found, "dropped": {}}
            found = {str(wanted[0].operation): {str(cache.bucket(wanted[0].rows)): first}}
            entries.update(found)
            cache.update(key, found)

        self.fails, self.seconds = False, 0
        monkeypatch.setattr(tuning, "_measure", fake)
        return calls

    def contact(self):
        tuning.first_contact(CONFIG, torch.float16, 2, 9, CPU)

    @pytest.mark.parametrize("mode", [None, "off", "cached"])
    def test_only_if_asked_for(self, searches, monkeypatch, mode):
        monkeypatch.setenv("SIGLIP_FAST_TUNE", mode) if mode else None
        self.contact()
        assert searches == [] and not Key.of(CPU).path().exists()

    def test_once(self, searches, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        self.contact()
        self.contact()
        wanted = cases(CONFIG, 9, torch.float16, [2])
        assert searches == [wanted]
        entries = in_cache()
        assert {str(case.operation) for case in wanted} == set(entries)
        measured = [cache.is_measured(e) for buckets in entries.values() for e in buckets.values()]
        assert measured.count(True) == 1 and len(measured) == len(wanted)

    def test_once_for_all_who_wait(self, searches, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        self.seconds = 1
        threads = [threading.Thread(target=self.contact) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(searches) == 1

    def test_a_failure_is_told_and_leaves_the_defaults(self, searches, monkeypatch, caplog):
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        self.fails = True
        with caplog.at_level(logging.WARNING):
            self.contact()
        assert "built-in configurations stay in force: RuntimeError: the process died" in caplog.text
        chosen = cache.Selection(in_cache()).choice("attention", (9, 4, 16), torch.float16, 2)
        assert chosen == DEFAULT

    def test_what_it_left_is_measured_when_asked_for(self, searches, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        self.contact()
        tuning.tune(CONFIG, torch.float16, [2], CPU)
        assert searches[1] == searches[0][1:]

    def test_a_cache_folder_that_cannot_be_written(self, monkeypatch, caplog, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("SIGLIP_FAST_CACHE_DIR", str(tmp_path / "file"))
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        with caplog.at_level(logging.WARNING):
            self.contact()
        assert "built-in configurations stay in force" in caplog.text

    @torch.no_grad()
    def test_at_the_first_forward(self, searches, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        model = drop_in(stock_model(CONFIG).half(), backend="triton")
        for batch_size in (2, 2, 3):
            model(torch.randn(batch_size, 3, 24, 24).half())
        assert searches == [cases(CONFIG, 9, torch.float16, [2])]

    @torch.no_grad()
    def test_not_for_other_backends(self, searches, monkeypatch):
        monkeypatch.setenv("SIGLIP_FAST_TUNE", "auto")
        drop_in(stock_model(CONFIG), backend="torch")(torch.randn(1, 3, 24, 24))
        assert searches == []


@torch.no_grad()
def test_the_cases_are_what_a_forward_looks_up(monkeypatch):
    looked_up = set()
    choice = cache.Selection.choice

    def record(self, name, dims, dtype, rows, launch):
        looked_up.add((Operation(name, tuple(map(int, dims)), dtype), cache.bucket(rows)))
        return choice(self, name, dims, dtype, rows, launch)

    monkeypatch.setattr(cache.Selection, "choice", record)
    for head in (True, False):
        looked_up.clear()
        config = SiglipVisionConfig(**TINY, vision_use_head=head)
        drop_in(stock_model(config).half(), backend="triton")(torch.randn(2, 3, 24, 24).half())
        wanted = cases(config, 9, torch.float16, [2])
        expected = {
            (case.operation._replace(dims=tuple(map(int, case.operation.dims))), cache.bucket(case.rows))
            for case in wanted
        }
        assert looked_up == expected


@pytest.mark.parametrize("name, dims", [("linear_residual", (64, 64, True)), ("layernorm_linear", (64, 64, False))])
def test_descriptors_where_a_parameter_is_not_aligned(name, dims, device):
    """Tuning saw tensors of its own; a parameter may be a view into a flat buffer."""
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 2, "TMA": True}
    case = Case(Operation(name, dims, torch.float16), 18)
    args = list(inputs(case, torch.device(device)))
    i = 1 if name == "linear_residual" else 2
    flat = torch.empty(64 * 64 + 1, dtype=torch.float16, device=device)
    args[i] = args[i]._replace(weight=flat[1:].view(64, 64).copy_(args[i].weight))
    found = {"route": "triton", "config": tile, "microseconds": {"x": 1.0}}
    entries = {str(case.operation): {"32": {"eager": found, "graph": found, "dropped": {}}}}
    backend = select.load("triton", lambda device: cache.Selection(entries))
    chosen = backend.selection(args[0].device).choice(name, dims, torch.float16, 18)
    assert args[i].weight.data_ptr() % 16 and chosen.config == tile
    assert Verifier(case, torch.device(device), tuple(args))(lambda: getattr(backend, name)(*args)) is None


def test_compile_ahead_leaves_nothing_to_compile():
    """In a process of its own, for sm_90: in this one Triton interprets."""
    pytest.importorskip("cuxray")
    code = textwrap.dedent("""
        import torch
        import triton
        from static import launches_of
        from torch.utils._pytree import tree_map
        from siglip_fast.backends.choice import Choice
        from siglip_fast.tuning.cache import Operation
        from siglip_fast.tuning.candidates import candidates, compile_ahead, run
        from siglip_fast.tuning.cases import Case, inputs

        compiled = []
        triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["repr"])
        case = Case(Operation("layernorm", (256,), torch.bfloat16), 64)
        args = inputs(case, torch.device("cpu"))
        args = tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, args)
        with launches_of("sm_90"):
            choices = [choice for choice in candidates(case) if choice.route == "triton"]
            compile_ahead(case, [Choice("triton", {"BLOCK_M": 3}), *choices], args)
            ahead = len(compiled)
            for choice in choices:
                run(case, choice, args)
        print(len(choices), ahead, len(compiled))
    """)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "bench")
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    choices, ahead, in_all = map(int, result.stdout.split())
    assert choices == ahead == in_all > 1, result.stderr


@pytest.mark.parametrize("kind", ["one size", "any size"])
def test_the_command_line_end_to_end(kind, monkeypatch, capsys, cache_dir):
    """The real worker and the real candidates, on one small model; times are the interpreter's and mean nothing."""
    if kind == "one size":
        config, stock_name = SiglipVisionConfig(**TINY | {"num_attention_heads": 2}), "SiglipVisionModel"
        call = {"pixel_values": torch.randn(1, 3, 24, 24).half()}
    else:
        config, stock_name = Siglip2VisionConfig(**zoo.SIGLIP2_VISION), "Siglip2VisionModel"
        call = naflex_inputs([(3, 5)], 16)
        call["pixel_values"] = call["pixel_values"].half()
    monkeypatch.setattr("siglip_fast.cli.tune.load_config", lambda args: config)
    assert main(["tune", "--device", "cpu", "--dtype", "float16", "--batch-sizes", "1"]) == 0
    out = capsys.readouterr().out
    assert f"written: {Key.of(CPU).path()}" in out
    entries = in_cache()
    expected = {str(case.operation) for case in cases_of(config, usual_tokens(config), torch.float16, [1])}
    assert set(entries) == expected and all(name in out for name in expected)
    for buckets in entries.values():
        for entry in buckets.values():
            assert entry["eager"]["route"] is not None and len(entry["eager"]["microseconds"]) >= 2
            assert not any("wrong" in reason for name, reason in entry["dropped"].items() if name.startswith("triton"))
    stock = stock_model(config, "sdpa", stock_name).half()
    ours = drop_in(stock, backend="triton", strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(**call)[:], stock(**call)[:], atol=2e-2, rtol=2e-2)


def test_not_on_a_cpu_without_the_interpreter(monkeypatch, capsys):
    monkeypatch.setattr("siglip_fast.cli.tune._can_interpret", lambda: False)
    assert main(["tune", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "finds what runs each operation fastest on a GPU" in err and err.count("\n") == 1


def test_interrupted_by_a_signal(tmp_path):
    """Ctrl-C ends the worker too."""
    code = textwrap.dedent("""
        import signal, sys, torch
        from siglip_fast.tuning import tune as tuning
        from transformers import SiglipVisionConfig
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job was told to ignore it
        worker = [sys.executable, "-c", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"]
        tuning.tune(SiglipVisionConfig(), torch.float16, [1], torch.device("cpu"), worker=[*worker, sys.argv[1]])
    """)
    pid_file = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", code, str(pid_file)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert subprocess.run(["ps", "-p", pid_file.read_text()], capture_output=True).returncode != 0
