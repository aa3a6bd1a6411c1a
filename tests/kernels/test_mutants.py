"""Every mutant of `mutants.py` is killed: the tests fail on it, and pass on the unbroken copy.

`pytest -m mutants` needs ttsem, which executes what the compiler makes of a kernel and checks every access.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.mutants


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package as it is installed, where it may be broken."""
    pytest.importorskip("ttsem", reason="ttsem is not installed: see docs/testing-without-a-gpu.md")
    shutil.copytree(ROOT / "siglip_fast", tmp_path / "siglip_fast")
    shutil.copytree(ROOT / "kernels", tmp_path / "siglip_fast/kernels")
    return tmp_path


def run(copy: Path, mutant: Mutant) -> subprocess.CompletedProcess:
    runner = ["-m", "pytest"] if mutant.interpreted else ["-m", "ttsem.sanitize", "pytest"]
    path, *selection = shlex.split(mutant.tests)
    options = ["-q", "-x", "-n", "0", "-m", "", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *runner, *options, ROOT / path, *selection]
    # `python -m` puts the current folder first
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", MUTANTS)
def test_killed(name, copy):
    mutant = MUTANTS[name]
    path = copy / "siglip_fast" / mutant.file.removeprefix("siglip_fast/")
    source = path.read_text()
    assert source.count(mutant.old) == 1, f"{mutant.file} holds the text to break {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    result = run(copy, mutant)
    # 1: tests failed; negative: a wild access in the interpreter took the process with it
    assert result.returncode == 1 or result.returncode < 0, f"{name} survived:\n{result.stdout[-2000:]}"
    assert result.returncode < 0 or " failed" in result.stdout, result.stdout[-2000:]


@pytest.mark.parametrize("tests", sorted({(m.tests, m.interpreted) for m in MUTANTS.values()}), ids=lambda t: t[0])
def test_unbroken_copy_passes(tests, copy):
    """Or the failures above would show nothing."""
    result = run(copy, Mutant("", "", "", *tests))
    assert result.returncode == 0, result.stdout[-2000:]
