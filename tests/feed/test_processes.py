"""Processes that decode ahead of the model: what comes out, and what a death costs. Sources are commands of `fragile`."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fragile
import pytest
import torch

from siglip_fast.errors import UserError
from siglip_fast.feed import processes
from siglip_fast.feed.processes import ADVICE, Processes
from siglip_fast.feed.shards import Slice


def values(prepared) -> list[tuple]:
    return [
        (name, result if isinstance(result, str) else float(result["pixel_values"][0, 0])) for name, result in prepared
    ]


def test_order_reasons_warnings_and_every_kind_of_source(tmp_path):
    shard = tmp_path / "shard"
    shard.write_bytes(b"1234")
    sources = [str(i) for i in range(60)]
    sources[7], sources[9], sources[11] = "bad seven", b"9.5", Slice(str(shard), 1, 2)
    sources[20], sources[21] = "sleep 0.5", "warn 21"
    sources[33:35] = [ValueError("not even tried"), Slice(str(shard), 3, 9)]
    wanted = list(enumerate(map(float, range(60))))
    wanted[7], wanted[9], wanted[11], wanted[20] = (7, "bad seven"), (9, 9.5), (11, 23.0), (20, 0.5)
    wanted[33:35] = [(33, "not even tried"), (34, "cut short: 1 of 9 bytes")]
    workers = Processes(fragile.prepare, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert values(workers.prepared(enumerate(sources))) == wanted
    assert [(str(warning.message), warning.category) for warning in caught] == [("warned 21", UserWarning)]
    assert workers.images == 60 and 0.5 <= workers.busy < 30
    # they are others, both at work, and gone; what they were at is nobody's fault
    pids = {pid for _, pid in values(workers.prepared((i, "pid") for i in range(200)))}
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids
    assert not any(Path(f"/proc/{int(pid)}").exists() for pid in pids)


def test_it_ends_early():
    """Closed, or by the error of who gives the images: no process is left."""
    workers = Processes(fragile.prepare, 1)
    prepared = workers.prepared((i, "pid") for i in range(10**9))
    (_, pid) = values([next(prepared)])[0]
    prepared.close()
    assert not Path(f"/proc/{int(pid)}").exists()

    def images():
        yield from ((i, "1") for i in range(40))
        raise UserError("a table that breaks")

    with pytest.raises(UserError, match="a table that breaks"):
        values(workers.prepared(images()))


class TestDeaths:
    def test_each_is_named_and_skipped(self):
        sources = [str(i) for i in range(100)]
        deaths = {13: "kill 9", 14: "kill 11", 50: "exit 3", 51: "kill 15", 52: "kill 9"}
        for i, source in deaths.items():
            sources[i] = source
        results = values(Processes(fragile.prepare, 2).prepared(enumerate(sources)))
        assert [name for name, _ in results] == list(range(100))  # nothing lost, nothing doubled, in order
        reasons = {name: result for name, result in results if isinstance(result, str)}
        assert [result for _, result in results if not isinstance(result, str)] == [
            float(i) for i in range(100) if i not in deaths
        ]
        start = "the process that decodes it "
        assert {i: reason.removeprefix(start) for i, reason in reasons.items()} == {
            13: "was killed by SIGKILL (out of memory?)",
            14: "was killed by SIGSEGV",
            50: "ended with status 3",
            51: "was killed by SIGTERM",
            52: "was killed by SIGKILL (out of memory?)",
        }

    def test_killed_from_outside(self):
        """Between images or in the midst of one, whoever gets it."""
        prepared = Processes(fragile.prepare, 2).prepared(
            (i, f"sleep {i % 7 / 100}" if i else "pid") for i in range(200)
        )
        name, pid = values([next(prepared)])[0]
        os.kill(int(pid), signal.SIGKILL)
        results = values(prepared)
        assert [name for name, _ in results] == list(range(1, 200))
        assert sum(isinstance(result, str) for _, result in results) <= 1

    def test_without_end(self, monkeypatch):
        monkeypatch.setattr(processes, "ATTEMPTS", 2)
        with pytest.raises(UserError, match="2 times in a row the process that decodes it was killed by SIGKILL"):
            values(Processes(fragile.prepare, 1).prepared((i, "kill 9") for i in range(100)))

    def test_this_process_is_killed(self, tmp_path):
        """Nobody tells those that decode."""
        code = (
            "import fragile, os, signal\nfrom siglip_fast.feed.processes import Processes\n"
            "images = ((i, 'pid' if i < 8 else 'sleep 0.01') for i in range(10**9))\n"
            "for _, result in Processes(fragile.prepare, 1).prepared(images):\n"
            "    print(int(result['pixel_values'][0, 0]), flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        deadline = time.monotonic() + 20
        while Path(f"/proc/{int(done.stdout)}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)


class TestMemory:
    @pytest.mark.parametrize(
        ("free", "number", "of_image", "wanted"),
        [
            (24 << 30, 8, 600 << 10, (8, 8)),
            (24 << 30, 64, 600 << 10, (64, 8)),
            (24 << 30, 64, 6 << 20, (64, 2)),  # what is under way would be more than 2 GiB
            (64 << 20, 8, 600 << 10, (8, 3)),
            (64 << 20, 64, 600 << 10, (27, 1)),
        ],
    )
    def test_what_is_under_way_fits(self, monkeypatch, capsys, free, number, of_image, wanted):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": free}))
        assert processes._fitting(number, of_image) == wanted
        of_all = wanted[0] * processes.CHUNKS_AHEAD * wanted[1] * of_image
        assert of_all <= min(processes.MEMORY, free // 2)
        told = capsys.readouterr().err
        assert ("/dev/shm has room for 27 processes, not for 64" in told and ADVICE in told) is (wanted[0] != number)

    def test_no_room_at_all(self, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 2 << 20}))
        with pytest.raises(UserError, match="/dev/shm has 2 MiB free, too little for one image; .*--shm-size"):
            processes._fitting(4, 600 << 10)

    def test_chunks(self):
        items = list(enumerate(zip("abcdefgh", [b"x" * (1 << 19)] * 5 + ["path"] * 3, strict=True)))
        assert [[number for number, _ in chunk] for chunk in processes._chunks(items, 3)] == [
            [0, 1],
            [2, 3],
            [4, 5, 6],
            [7],
        ]

    def test_shared_memory_runs_out(self, monkeypatch):
        """As torch has it in the process, and nobody waits for what does not come."""

        def full(self):
            raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
        monkeypatch.setattr(processes, "get_worker_info", lambda: type("", (), {"id": 0}))
        told = processes._Images(fragile.prepare, torch.zeros(1, 4, dtype=torch.int64)).__getitems__([(0, "1")])
        assert "No space left on device" in told and "--shm-size" in told
