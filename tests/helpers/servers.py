"""Servers' plugins in an interpreter of their own, as each is for good."""

import subprocess
import sys
import textwrap

import pytest

ON = {"SIGLIP_FAST_PLUGIN": "1"}


def run(code: str, tmp_path, monkeypatch, environment: dict[str, str] = ON) -> str:
    """Output and log of a fresh interpreter; skips the test where the code says that the server does not import."""
    monkeypatch.delenv("SIGLIP_FAST_PLUGIN", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    if "CANNOT IMPORT" in done.stdout:
        pytest.skip(done.stdout.splitlines()[-1])
    return output
