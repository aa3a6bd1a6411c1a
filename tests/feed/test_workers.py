"""Threads that decode ahead of the model: order, bound, what they tell; and the cores that may be used."""

import threading
import time
from pathlib import Path

import fragile
import pytest

from siglip_fast.feed import cores
from siglip_fast.feed.meter import Meter
from siglip_fast.feed.shards import Slice
from siglip_fast.feed.workers import Threads


class TestThreads:
    def test_order_reasons_and_bound(self):
        lock, started, taken, most = threading.Lock(), 0, 0, 0

        def prepare(source):
            nonlocal started, most
            with lock:
                started += 1
                most = max(most, started - taken)
            time.sleep(0.002 * (int(source) % 3))
            if source == "7":
                raise ValueError("seven\nand more")
            return {"doubled": source * 2}

        results = []
        threads = Threads(prepare, 3, ahead=5)
        for name, result in threads.prepared((i, str(i)) for i in range(30)):
            with lock:
                taken += 1
            results.append((name, result if isinstance(result, str) else result["doubled"]))
        assert results == [(i, "seven" if i == 7 else str(i) * 2) for i in range(30)]
        assert 2 <= most <= 6
        assert threads.images == 30 and threads.busy >= 0.06

    def test_it_decodes_while_the_consumer_works(self):
        both = threading.Barrier(2, timeout=20)

        def prepare(source):
            if source == "1":
                both.wait()

        prepared = Threads(prepare, 1, ahead=2).prepared(enumerate("0123"))
        next(prepared)
        both.wait()  # reached only if "1" is being decoded now, though nobody asked for it
        assert len(list(prepared)) == 3

    def test_closing_it_cancels_the_rest(self):
        seen = []
        threads = Threads(lambda source: (time.sleep(0.01), seen.append(source)), 1, ahead=20)
        prepared = threads.prepared((i, str(i)) for i in range(100))
        next(prepared)
        prepared.close()
        assert len(seen) <= 4
        assert not any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())

    def test_slices_and_reasons_as_sources(self, tmp_path):
        file = tmp_path / "shard"
        file.write_bytes(b"123 4")
        sources = [Slice(str(file), 1, 2), ValueError("not even tried"), Slice(str(file), 3, 4), "bad x"]
        (_, inputs), *reasons = Threads(fragile.prepare, 1, ahead=9).prepared(enumerate(sources))
        assert (inputs["pixel_values"] == 23).all()
        assert reasons == [(1, "not even tried"), (2, "cut short: 2 of 4 bytes"), (3, "bad x")]


class TestCores:
    @pytest.mark.parametrize(
        ("cgroup", "files", "wanted"),
        [
            ("0::/\n", {"cpu.max": "max 100000"}, 16),
            ("0::/\n", {"cpu.max": "250000 100000"}, 3),  # two and a half
            ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4),  # of whoever is around it
            ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 1),
            ("0::/of/the/host\n", {"cpu.max": "200000 100000"}, 2),
            ("0::/\n", {}, 16),
            ("0::/\n", {"cpu.max": "6400000 100000"}, 16),
            (
                "9:memory:/\n4:cpu,cpuacct:/a\n",
                {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"},
                3,
            ),
            ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
            ("4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 16),
            (None, {}, 16),
        ],
    )
    def test_affinity_and_quotas(self, tmp_path, monkeypatch, cgroup, files, wanted):
        if cgroup is not None:
            (tmp_path / "proc/self").mkdir(parents=True)
            (tmp_path / "proc/self/cgroup").write_text(cgroup)
        for name, text in files.items():
            file = tmp_path / "sys/fs/cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        quotas = cores._quotas
        monkeypatch.setattr(cores, "_quotas", lambda root: quotas(tmp_path))
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
        assert cores.usable_cores() == wanted

    def test_here(self):
        import os

        assert 1 <= cores.usable_cores() <= (os.cpu_count() or 1)
        assert list(cores._quotas(Path("/nowhere"))) == []


class TestMeter:
    def test_the_slowest_limits(self):
        workers = Threads(None, 4, ahead=1)
        meter = Meter()
        assert meter.limit(workers) == ""
        workers.images, workers.busy = 100, 40.0  # of four threads
        meter.embedded, meter.copying, meter.model = 80, 0.1, 4.0
        assert meter.rates(workers) == {"decoding": 10.0, "copying": 800.0, "the model": 20.0}
        assert meter.limit(workers) == "decoding limits, at 10.0/s; the model could do 20.0/s, copying 800.0/s"
        workers.busy = 4.0
        assert meter.limit(workers) == "the model limits, at 20.0/s; decoding could do 100.0/s, copying 800.0/s"
