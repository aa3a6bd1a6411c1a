"""The `siglip-fast` command as a process of its own: its start, its help, and how it is stopped."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from embed_command import CODE, ENVIRONMENT, checkpoint, here, picture, save, shared_files, wait_until_gone

from siglip_fast.cli.main import main

__all__ = ["checkpoint", "here"]  # fixtures


# A file closed before its writer shows only as an exception that Python ignored.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


class TestProcess:
    def test_help_and_early_errors_load_nothing_heavy(self, here):
        code = (
            "import sys\nfrom siglip_fast.cli.main import main\n"
            "assert main(['embed', 'nowhere.png', '--model', 'x', '--out', 'o.npy']) == 2\n"
            "assert not {'torch', 'transformers', 'triton', 'pyarrow', 'numpy'} & set(sys.modules)\n"
            "main(['--help'])"
        )
        done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "siglip-fast: error: nowhere.png: no such file or folder\n")
        assert "embed" in done.stdout and "demo" in done.stdout

    def test_version(self, capsys):
        with pytest.raises(SystemExit) as exit:
            main(["--version"])
        assert exit.value.code == 0
        assert capsys.readouterr().out.startswith("siglip-fast 0.")

    @pytest.mark.parametrize(
        "out, stop, status, last_line",
        [("out.parquet", signal.SIGINT, 130, "interrupted"), ("out.npy", signal.SIGTERM, 143, "terminated")],
    )
    def test_it_is_stopped(self, here, checkpoint, out, stop, status, last_line):
        save("in/0.png", picture(0))
        for i in range(1, 20000):
            os.link("in/0.png", f"in/{i}.png")
        args = ["embed", "in", "--model", str(checkpoint), "--out", out, "--batch-size", "8", "--workers", "2"]
        command = [sys.executable, "-c", CODE, *args, "--device", "cpu"]
        with open("stderr", "w") as stderr:
            process = subprocess.Popen(command, env=ENVIRONMENT, stderr=stderr, cwd=here, start_new_session=True)
        try:
            deadline = time.monotonic() + 100
            while " limits, at" not in Path("stderr").read_text():  # it is embedding
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            assert any(name.endswith(".part") for name in os.listdir())
            shared = shared_files(process.pid)
            if stop == signal.SIGINT:
                os.killpg(process.pid, stop)  # as a terminal does: to the processes that decode as well
            else:
                process.send_signal(stop)
            assert process.wait(30) == status
            wait_until_gone(process.pid, shared)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        text = Path("stderr").read_text()
        assert text.endswith(f"siglip-fast: {last_line}\n")
        assert "Traceback" not in text and "Exception" not in text and "Error" not in text
        assert sorted(os.listdir()) == ["in", "stderr"]
