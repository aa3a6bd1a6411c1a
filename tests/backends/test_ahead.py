"""What one forward has compiled is enough for every batch size. In processes of their own, for sm_90: here Triton interprets."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from siglip_fast.backends import ahead
from siglip_fast.backends import triton as triton_backend
from siglip_fast.backends.choice import DEFAULT, Choice
from siglip_fast.tuning.cache import Selection

pytest.importorskip("cuxray")  # which bench/static.py reads machine code with
BENCH = Path(__file__).parents[2] / "bench"

# Nothing is launched or loaded: every launch asks for the compiled kernel only.
CODE = """
import sys, torch
from static import forward, launches_of
from siglip_fast.backends import ahead
from siglip_fast.backends import triton as triton_backend
ahead.applies = lambda tensor: sys.argv[2] == "ahead"

with launches_of("sm_90") as launches:
    for batch in map(int, sys.argv[3:]):
        forward(sys.argv[1], torch.bfloat16, batch)
        kernels = {kernel for *_, kernel in launches}
        if batch == int(sys.argv[3]):
            first = kernels
    print(len(first), len(kernels - first))
"""


def counts(*arguments: str) -> tuple[int, int]:
    """Kernels that the first of some batch sizes compiled, and how many more the others did."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(BENCH)}
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, more = map(int, done.stdout.split())
    return first, more


BATCHES = ("3", "1", "2", "4", "8", "16", "17", "64", "100", "256", "1000")


def test_the_first_forward_compiles_all():
    first, more = counts("base-patch16-224", "ahead", *BATCHES)
    assert first > 20 and more == 0


def test_without_it_others_would_be_compiled_later():
    first, more = counts("base-patch16-224", "later", "3", "1", "64")
    assert first < 20 and more > 5


@pytest.fixture
def loader(monkeypatch):
    monkeypatch.setattr(ahead, "applies", lambda tensor: True)
    return ahead.Loader()


def test_once_for_an_operation(loader):
    ran = []
    choices = [DEFAULT, Choice("triton", {"BLOCK_M": 1}), Choice("vendor"), DEFAULT]
    for key in ("a", "a", "b"):
        loader.load((key,), torch.empty(1), lambda: choices, ran.append)
    assert sorted(map(str, ran)) == sorted(2 * ["triton", "triton M=1", "vendor"])


def test_a_vendors_route_runs_in_the_calling_thread(loader):
    """Each thread would get workspaces of the library's."""
    threads = {}
    choices = [Choice("vendor"), Choice("triton", {"BLOCK_M": 1})]
    loader.load(("a",), torch.empty(1), lambda: choices, lambda c: threads.setdefault(str(c), threading.get_ident()))
    assert threads["vendor"] == threading.get_ident() != threads["triton M=1"]


def test_what_does_not_run_stops_nothing(loader):
    def run(choice):
        if choice is DEFAULT:
            raise RuntimeError("out of shared memory")
        ran.append(choice)

    ran = []
    loader.load(("a",), torch.empty(1), lambda: [DEFAULT, Choice("vendor")], run)
    assert ran == [Choice("vendor")]


def test_nothing_during_a_capture(loader, monkeypatch):
    ran = []
    monkeypatch.setattr(ahead, "is_capturing", lambda tensor: True)
    loader.load(("a",), torch.empty(1), lambda: [DEFAULT], ran.append)
    monkeypatch.setattr(ahead, "is_capturing", lambda tensor: False)
    assert not ran
    loader.load(("a",), torch.empty(1), lambda: [DEFAULT], ran.append)
    assert ran == [DEFAULT]


def test_a_new_backend_with_the_same_choices_loads_nothing_again(monkeypatch):
    """A model gets one with each change of its weights."""
    keys = []
    recorder = SimpleNamespace(load=lambda key, *_: keys.append(key))
    monkeypatch.setattr(triton_backend, "LOADER", recorder)
    monkeypatch.setattr(triton_backend, "RUN", {"attention": lambda *_: None})
    found = {"route": "triton", "config": {"BLOCK_M": 64}}
    other = {"attention 5x2x8 float16": {"4": {"eager": found, "graph": found, "dropped": {}}}}
    for entries in ({}, {}, other):
        triton_backend.Backend(lambda device, entries=entries: Selection(entries)).attention(torch.zeros(3, 5, 3, 2, 8))
    assert keys[0] == keys[1] != keys[2]


def test_what_a_graph_runs_is_loaded_with_what_runs_eagerly():
    """A capture of the user's own runs the eager choices, maybe after nothing but replays."""
    eager = {"route": "triton", "config": {"BLOCK_M": 64}}
    graph = {"route": "sdpa", "config": None}
    selection = Selection({"attention 5x2x8 float16": {"4": {"eager": eager, "graph": graph, "dropped": {}}}})
    found = triton_backend._choices("attention", (5, 2, 8), (torch.empty(1, dtype=torch.float16),), selection)
    assert {"triton", "triton M=64", "sdpa"} <= set(map(str, found))
