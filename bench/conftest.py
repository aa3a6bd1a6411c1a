"""What every benchmark gets: `--rows FILE`, where its result goes at once, and a clean end."""

import json
import sys
from pathlib import Path

import environment
import pytest
import rounds


def pytest_addoption(parser):
    parser.addoption("--rows", type=Path, required=True, metavar="FILE", help="results are appended, one a line (JSON)")


@pytest.fixture
def row(request):
    """Appends a result, with where it was measured. It is in the file when this returns, whatever becomes of the session."""
    path = request.config.getoption("--rows")

    def append(result: dict) -> None:
        line = json.dumps(result | {"about": environment.about()}) + "\n"
        with open(path, "ab", buffering=0) as file:  # one write: a line is there whole or not at all
            file.write(line.encode())

    return append


@pytest.fixture(autouse=True)
def clean_end():
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()  # or the next batch size would be compiled beside the last
    rounds.free_memory()
