"""The process that candidates run in, from the outside: started, listened to, and ended where it hangs."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence

from ..errors import without_folders

PREPARATION = "preparation"  # takes a candidate's place in the worker's events; if it fails, so does the case
WORKER = [sys.executable, "-m", "siglip_fast.tuning.worker"]


class WorkerDied(Exception):
    """The worker ended by a crash, or had to be ended because it hung."""


def events_of(command: Sequence[str], request: dict, stall: float) -> Iterator[dict]:
    """The worker's events, until it ends by itself with exit status 0."""
    environment = os.environ | {
        "SIGLIP_FAST_TUNE": "off",  # the worker measures, it does not ask for measurements
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # it finds this package as this process did
    }
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        reader, writer = os.pipe()  # of its own: libraries print what they like
        output = {"stdout": said, "stderr": subprocess.STDOUT, "text": True, "pass_fds": [writer]}
        process = subprocess.Popen([*command, str(writer)], stdin=subprocess.PIPE, env=environment, **output)
        os.close(writer)
        events: queue.Queue[str | None] = queue.Queue()

        def pump() -> None:
            with open(reader) as lines:
                for line in lines:
                    events.put(line)
            events.put(None)

        threading.Thread(target=pump, daemon=True).start()
        try:
            with process.stdin as stdin:
                json.dump(request, stdin)
            while (line := events.get(timeout=stall)) is not None:
                yield json.loads(line)
            if status := process.wait(timeout=stall):
                said.seek(0)
                raise WorkerDied(f"ended the process (exit status {status}: {_error_in(said)})")
        except BrokenPipeError:
            raise WorkerDied(f"did not read its request (exit status {process.wait()})") from None
        except (queue.Empty, subprocess.TimeoutExpired):
            raise WorkerDied(f"gave no result in {stall:.0f} s") from None
        finally:
            process.kill()
            process.wait()


def _error_in(lines: Iterable[str]) -> str:
    """The last line that speaks of an error, or else the last one."""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return without_folders((errors or lines or ["no message"])[-1])
