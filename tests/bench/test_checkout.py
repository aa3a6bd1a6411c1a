"""A checkout is enough: bench/run_gpu.sh from a copy without .git, installation, network or a place to write to.

`.ci/pinned` runs this with the versions of the machine that the first GPU was expected in.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "checkout"
    archive = subprocess.run(["git", "-C", REPO, "archive", "HEAD"], check=True, capture_output=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    return folder


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize(
    "arguments", [["--quick"], ["--quick", "--rehearse"], ["--second", "--rehearse"]], ids=" ".join
)
def test_the_run_from_a_read_only_copy(arguments, checkout, tmp_path):
    home, hidden, out = tmp_path / "home", tmp_path / "hidden", tmp_path / "out"
    home.mkdir(mode=0o555)
    hidden.mkdir()
    (hidden / "platformdirs.py").write_text("raise ImportError('not there')\n")
    variables = {"HOME": str(home), "PYTHON": sys.executable, "PYTHONPATH": str(hidden), "SIGLIP_FAST_REVISION": "abc"}
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k and k != "TRITON_INTERPRET"} | variables
    before = contents(checkout), contents(home)
    command = [checkout / "bench/run_gpu.sh", *arguments, "--out", out]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (contents(checkout), contents(home)) == before  # also where root may write whatever the modes say
    with tarfile.open(out / "results.tar.gz") as tar:
        names = set(tar.getnames())
    assert {"results/README.md", "results/rows.jsonl", "results/logs/report.log"} <= names
    assert "Revision abc" in (out / "README.md").read_text()
