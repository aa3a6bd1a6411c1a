"""Runs the stages of bench/plan.py, for bench/run_gpu.sh: time limits, logs, summary, and an archive that is always whole."""

import argparse
import contextlib
import ctypes
import datetime
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import plan  # noqa: E402

from siglip_fast.files import atomic  # noqa: E402

START = time.monotonic()
ARCHIVE_EVERY = 5.0  # seconds, within a stage
GRACE = 5.0  # seconds that a stage has after SIGINT
LEAST_MEMORY = 24  # GB of a GPU that the largest case of a short run wants
IMITATED = "REHEARSAL, NOTHING IS MEASURED: the GPU is imitated, times are nonsense, tests are found and not executed."
NO_GPU = "NO GPU WAS MEASURED: there is none, so the stages run small on the CPU."
SITE = """\
import os, traceback
try:
    import imitated_gpu
except BaseException:
    traceback.print_exc()
    os._exit(13)  # or Python would go on, without it
"""


def main() -> int:
    arguments = parse()
    if missing := [plan.NEEDS[need] for need in ("torch", "triton", "transformers", "pytest") if plan.lacks(need)]:
        print(f"{sys.executable} can run nothing of this, it lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    print("\n".join(what_lacks()), flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        settings = environment(scratch, arguments.extent, arguments.rehearse)
        gpu = gpu_name(settings)
        try:
            out = make_folder(arguments.out or default_folder(gpu, arguments))
        except OSError as error:
            print(f"--out: a folder that can be written to is needed: {error}", file=sys.stderr)
            return 2
        workers = min(os.cpu_count() or 1, 16)
        stages = plan.stages(arguments.extent, bool(gpu), arguments.rehearse, workers, out)
        stages = [stage for stage in stages if re.match(arguments.only, stage.name)]
        seconds = plan.SECONDS[arguments.extent] if gpu and not arguments.rehearse else plan.PATIENCE * len(stages)
        about = IMITATED if arguments.rehearse else f"GPU: {gpu}" if gpu else NO_GPU
        return Run(stages, seconds, about, settings, scratch, out).all()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/run_gpu.sh", description="All that a GPU has to say about this checkout.")
    parser.set_defaults(extent="quick")
    extent = parser.add_mutually_exclusive_group()
    for name in plan.SECONDS:
        extent.add_argument(f"--{name}", dest="extent", action="store_const", const=name)
    parser.add_argument("--rehearse", action="store_true", help="imitate the GPU; measures nothing")
    parser.add_argument("--only", default="", metavar="'STAGE|STAGE'", help="the stages whose names begin so")
    parser.add_argument("--out", type=Path, metavar="DIR")
    return parser.parse_args()


def what_lacks() -> list[str]:
    """What some stage needs or wants and does not find here; known before anything long begins."""
    found = [f"not here: {text}" for need, text in plan.NEEDS.items() if plan.lacks(need)]
    with contextlib.suppress(Exception):  # no nvidia-ml-py, no driver, no GPU
        import pynvml

        pynvml.nvmlInit()
        free = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).free / 1e9
        if free < LEAST_MEMORY:
            found.append(f"not here: {LEAST_MEMORY} GB of free GPU memory, only {free:.0f}: some peers will not fit")
    return found or ["nothing that a stage needs or wants is missing"]


def environment(scratch: Path, extent: str, imitated: bool) -> dict[str, str]:
    """Of the stages: this checkout under the names that it is installed by, and nothing written but in `scratch`."""
    package = scratch / "package"
    (package / "siglip_fast").mkdir(parents=True)
    for source in (REPO / "siglip_fast").iterdir():
        (package / "siglip_fast" / source.name).symlink_to(source)
    (package / "siglip_fast" / "kernels").symlink_to(REPO / "kernels")
    if imitated:
        for name in ("imitated_gpu.py", "pretended.py"):
            (package / name).symlink_to(REPO / "bench" / name)
        (package / "sitecustomize.py").write_text(SITE)  # which also a stage's own processes import
    caches = {
        "SIGLIP_FAST_CACHE_DIR": "tuned", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "CUDA_CACHE_PATH": "cuda", "MPLCONFIGDIR": "matplotlib", "HF_HOME": "huggingface", "XDG_CACHE_HOME": "cache",
    }  # fmt: skip
    own = {name: str(scratch / folder) for name, folder in caches.items() if imitated or name not in os.environ}
    own |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))}
    own |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "SIGLIP_FAST_BENCH": extent}
    own |= {"SIGLIP_FAST_IMITATED_GPU": "1" if imitated else ""}
    return os.environ | own


def gpu_name(settings: dict[str, str]) -> str:
    """Empty where there is none."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], env=settings, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(2)
    return done.stdout.strip()


def default_folder(gpu: str, arguments: argparse.Namespace) -> Path:
    """One a run: in a folder of both, the second's logs would take the place of the first's."""
    if arguments.rehearse or not gpu:
        return Path(tempfile.mkdtemp())
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return REPO / "docs" / "results" / f"{name}-{datetime.date.today()}-{arguments.extent}"


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # whether it may be written to
        pass
    return folder.resolve()


class Run:
    """The stages, one after the other. What there is of their results is in `out` at any moment, and in its archive."""

    def __init__(self, stages: list[plan.Stage], seconds: float, about: str, settings: dict, scratch: Path, out: Path):
        self.stages, self.seconds, self.about = stages, seconds, about
        self.settings, self.out = settings, out
        self.logs, self.beside = scratch / "logs", scratch / "beside"  # the checkout
        self.logs.mkdir()
        self.beside.mkdir()
        self.results = {stage.name: ("not begun", 0) for stage in stages}
        self.failed = False

    def all(self) -> int:
        """Runs them and returns the exit status."""
        print(f"{self.about}\n", flush=True)
        self.keep()
        interrupted = False
        try:
            for stage in self.stages:
                self.run(stage)
        except KeyboardInterrupt:
            interrupted = True
        self.keep()
        with contextlib.suppress(OSError):
            print((self.out / "README.md").read_text())
        print(f"{self.summary()}\nResults: {self.out}", flush=True)
        return 130 if interrupted else int(self.failed)

    def run(self, stage: plan.Stage) -> None:
        start = time.monotonic()
        self.note(stage, "running", start)
        kept = 0 if stage.name == "report" else plan.REPORT + GRACE
        seconds = min(stage.seconds, self.seconds - (start - START) - kept)
        if lacking := [plan.NEEDS[need] for need in stage.needs if plan.lacks(need)]:
            result = f"FAIL: needs {', '.join(lacking)}"
        elif seconds < 1:
            result = "FAIL: no time was left"
        else:
            result = self.verdict(stage, self.status(stage, seconds), seconds)
        self.note(stage, result, start)
        print(f"{stage.name}: {result} ({self.results[stage.name][1]} s)", flush=True)
        if result.startswith("FAIL"):
            self.failed = True
            print(*("    " + line for line in self.log(stage).splitlines()[-15:]), sep="\n", flush=True)

    def status(self, stage: plan.Stage, seconds: float) -> int | None:
        """The stage's exit status, None where its time was not enough. KeyboardInterrupt ends the stage, too."""
        command = [sys.executable, *stage.arguments]
        deadline = time.monotonic() + seconds
        with open(self.logs / f"{stage.name}.log", "wb") as log:
            process = subprocess.Popen(
                command, env=self.settings, cwd=self.beside, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            try:
                while (left := deadline - time.monotonic()) > 0:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(min(left, ARCHIVE_EVERY))
                    self.keep()
                return None
            except KeyboardInterrupt:
                self.results[stage.name] = ("interrupted", round(seconds - (deadline - time.monotonic())))
                raise
            finally:
                end(process)

    def verdict(self, stage: plan.Stage, status: int | None, seconds: float) -> str:
        said = counts(self.log(stage)) if "pytest" in stage.arguments else ""
        if self.about == IMITATED:
            said = said.replace("passed", "found and not executed") if stage.name == "tests" else said
        said = f", {said}" if said else ""
        if status == 0:
            return f"pass{said}"
        if status is None:
            return f"FAIL: not done after {seconds:.0f} s{said}"
        if status == 1 and stage.partial:
            return "partial: see its log"
        return f"FAIL: exit status {status}{said}"

    def log(self, stage: plan.Stage) -> str:
        try:
            return (self.logs / f"{stage.name}.log").read_text(errors="replace")
        except OSError:  # it did not begin
            return ""

    def note(self, stage: plan.Stage, result: str, start: float) -> None:
        self.results[stage.name] = (result, round(time.monotonic() - start))
        self.keep()

    def summary(self) -> str:
        rows = [f"| {name} | {result} | {seconds} |" for name, (result, seconds) in self.results.items()]
        return "\n".join([self.about, "", "| stage | result | seconds |", "|---|---|---|", *rows, ""])

    def keep(self) -> None:
        """Write the summary and the archive anew, each whole or not at all."""
        with atomic(self.out / "summary.md") as file:
            file.write(self.summary().encode())
        archive = self.out / "results.tar.gz"
        found = [
            (path.name, path) for path in self.out.iterdir() if path != archive and not path.name.endswith(".part")
        ]
        found += [(f"logs/{path.name}", path) for path in self.logs.iterdir()]
        with contextlib.suppress(FileNotFoundError):
            found += [
                (f"tuned/{path.name}", path) for path in Path(self.settings["SIGLIP_FAST_CACHE_DIR"]).glob("*.json")
            ]
        with atomic(archive) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
            for name, path in sorted(found):
                add(tar, name, path)


def add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    """As much of the file as there is now: a stage may be writing it."""
    try:
        content = path.read_bytes()
    except OSError:  # gone, or a folder
        return
    entry = tarfile.TarInfo(f"results/{name}")
    entry.size, entry.mtime = len(content), int(time.time())
    tar.addfile(entry, io.BytesIO(content))


def counts(log: str) -> str:
    """What pytest said in its last line; of a session that was cut off, what can be counted."""
    if found := re.findall(r"^=+ ((?:\d+ \w+(?:, )?)+) in [\d.]+s", log, re.MULTILINE):
        return found[-1]
    words = re.findall(r" (PASSED|FAILED|ERROR|SKIPPED)\b", log)
    said = {"PASSED": "passed", "FAILED": "failed", "ERROR": "errors", "SKIPPED": "skipped"}
    return ", ".join(f"{words.count(word)} {text}" for word, text in said.items() if word in words)


def end(process: subprocess.Popen) -> None:
    """Whatever is left of a stage: SIGINT first, because pytest then still says what it found."""
    for kind, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def die_with_parent() -> None:
    """In a stage: end when this process is killed, or the GPU would stay busy."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
