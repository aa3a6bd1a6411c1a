"""`siglip-fast embed` as a long run: into a folder, stopped and gone on with, by processes, from shards and lists, and what
is left on disk by whatever stops it."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from embed_command import (
    CODE,
    ENVIRONMENT,
    check,
    checkpoint,
    expected,
    here,
    picture,
    read,
    run,
    save,
    shared_files,
    wait_until_gone,
    write_shard,
)
from pyarrow import parquet

from siglip_fast.cli import feeding
from siglip_fast.feed import encoder

__all__ = ["checkpoint", "here"]  # fixtures

PARTS = [f"part-{index:06d}.parquet" for index in range(100)]
SMALL = ["--part-size", 3, "--batch-size", 2, "--workers", 1]


def files(folder: str | Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())


def folder_of(parts: int) -> list[str]:
    return sorted(["_settings.json", *PARTS[:parts], *[f"_errors/{part}" for part in PARTS[:parts]]])


def identities(folder: str | Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in Path(folder).glob("part-*")}


def errors(folder: str | Path) -> dict[str, str]:
    table = parquet.read_table(Path(folder) / "_errors")
    return dict(zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True))


def png(seed: int) -> bytes:
    return Path(save(f"encoded/{seed}.png", picture(seed))).read_bytes()


class TestFolder:
    def test_parts_and_errors(self, here, checkpoint, capsys):
        for seed in range(7):
            save(f"in/{seed}.png", picture(seed))
        Path("in/1b.png").write_text("no image")
        assert run(checkpoint, "in", "in/2.png", "--out", "out", *SMALL) == 1
        assert files("out") == folder_of(3)
        assert [read(f"out/{part}")[0] for part in PARTS[:3]] == [
            ["in/0.png", "in/1.png"],
            ["in/2.png", "in/3.png", "in/4.png"],
            ["in/5.png", "in/6.png"],
        ]
        check(read("out")[1], expected(checkpoint, [picture(seed) for seed in range(7)]))
        assert errors("out") == {"in/1b.png": "cannot identify an image in it"}
        out, err = capsys.readouterr()
        assert "7 images embedded, 1 skipped, 1 repeated paths left out; 8 of them in this run; " in out
        assert "written: out; skipped ones: out/_errors" in out and "backend cpu (float32 on cpu)" in out
        assert err.count("skipped in/1b.png: ") == 1

        before = identities("out")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder, "Encoder", lambda args: pytest.fail("the model was loaded"))
            assert run(checkpoint, "in", "--out", "out", *SMALL) == 1
        assert "7 images embedded, 1 skipped; nothing was left to do" in capsys.readouterr().out
        assert identities("out") == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--normalize"], "normalize False, not True"),
            (["--part-size", 4], "part_size 3, not 4"),
            (["in/0.png"], "inputs"),
        ],
    )
    def test_other_settings_are_refused_before_the_model_loads(
        self, here, checkpoint, capsys, monkeypatch, options, message
    ):
        save("in/0.png", picture(0))
        save("in/1.png", picture(1))
        assert run(checkpoint, "in", "--out", "out/", *SMALL) == 0
        before = identities("out")
        monkeypatch.setattr(encoder, "Encoder", lambda args: pytest.fail("the model was loaded first"))
        paths = [] if options[0].startswith("in") else ["in"]
        assert run(checkpoint, *paths, "--out", "out", *SMALL, *options) == 2
        assert message in capsys.readouterr().err and identities("out") == before

    def test_what_was_done_is_not_done_again(self, here, checkpoint, monkeypatch):
        """And ends with the same bits as in one go."""
        names = [save(f"in/{seed:02d}.png", picture(seed)) for seed in range(11)]
        Path("in/04b.png").write_text("no image")
        assert run(checkpoint, "in", "--out", "whole", *SMALL) == 1
        call, calls = encoder.Encoder.__call__, []

        def failing(self, inputs, model):
            calls.append(len(inputs["pixel_values"]))
            if len(calls) == 6:
                raise OSError(28, "No space left on device")
            return call(self, inputs, model)

        with monkeypatch.context() as patch:
            patch.setattr(encoder.Encoder, "__call__", failing)
            assert run(checkpoint, "in", "--out", "out", *SMALL) == 2
        assert calls == [2, 1, 2, 2, 1, 2]  # a batch ends with its part
        assert files("out") == folder_of(3)  # of four, and no temporary file
        before = identities("out")
        assert run(checkpoint, "in", "--out", "out", *SMALL) == 1
        assert files("out") == folder_of(4)
        assert before.items() <= identities("out").items()
        (paths, rows), (_, whole) = read("out"), read("whole")
        assert paths == names
        assert np.array_equal(rows, whole)

    def test_it_is_not_a_file_and_not_foreign(self, here, checkpoint, capsys):
        save("a.png", picture(0))
        save("other/b.png", picture(0))
        Path("file").touch()
        for out, message in {
            "file": "file is a file",
            "other": "other is not empty, and not of an earlier run",
            "out.csv": "expected a name that ends in .parquet or .npy",
        }.items():
            assert run(checkpoint, "a.png", "--out", out, "--force") == 2
            assert message in capsys.readouterr().err
        assert files(".") == ["a.png", "file", "other/b.png"]

    def test_no_output_is_asked_for(self, here, checkpoint, capsys):
        save("a.png", picture(0))
        assert run(checkpoint, "a.png") == 2
        assert "expected --out" in capsys.readouterr().err


class TestInputs:
    @pytest.mark.parametrize("out", ["out", "out.parquet", "out.npy"])
    def test_shards(self, here, checkpoint, capsys, out):
        write_shard("a.tar", {"1.png": png(1), "1.txt": b"text", "2.png": b"no image", "3.png": png(3)})
        write_shard("b.tar", {"4.png": png(4), "two\nlines.png": png(5)})
        whole = Path("b.tar").read_bytes()
        Path("b.tar").write_bytes(
            whole.rstrip(b"\0")
        )  # without its end mark, and in the midst of an image's last block
        assert run(checkpoint, "?.tar", "--out", out, "--batch-size", 3) == 1
        names, seeds = ["a.tar/1.png", "a.tar/3.png", "b.tar/4.png", "b.tar/two\nlines.png"], [1, 3, 4, 5]
        err = capsys.readouterr().err
        assert "skipped a.tar/2.png: cannot identify an image" in err
        assert "skipped b.tar: cut short or damaged behind 2 images: " in err
        if out == "out.npy":
            assert "skipped 'b.tar/two\\nlines.png': a line break in its name" in err
            assert Path("out.paths.txt").read_text().splitlines() == names[:3]
            check(np.load(out), expected(checkpoint, [picture(seed) for seed in seeds[:3]]))
        else:
            paths, rows = read(out)
            assert paths == names
            check(rows, expected(checkpoint, [picture(seed) for seed in seeds]))
        if out == "out":
            assert files("out") == folder_of(2)  # a shard is a part
            assert set(errors("out")) == {"a.tar/2.png", "b.tar"}

    def test_parquet(self, here, checkpoint):
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        cells = [{"bytes": png(seed), "path": f"h{seed}"} for seed in range(5)]
        parquet.write_table(pa.table({"picture": pa.array(cells, kind)}), "x.parquet", row_group_size=2)
        for out in ("out", "out.parquet"):
            options = SMALL if out == "out" else []
            assert run(checkpoint, "x.parquet", "--image-column", "picture", "--out", out, *options) == 0
            paths, rows = read(out)
            assert paths == [f"h{seed}" for seed in range(5)]
            check(rows, expected(checkpoint, [picture(seed) for seed in range(5)]))
        assert files("out") == folder_of(2)  # of row groups of 2, 2 and 1

    def test_a_list_on_stdin(self, here, checkpoint, monkeypatch, capsys):
        for seed in range(3):
            save(f"{seed}.png", picture(seed))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"2.png\nnowhere.png\n0.png\n")))
        assert run(checkpoint, "--from-file", "-", "--out", "out.parquet") == 1
        paths, rows = read("out.parquet")
        assert paths == ["2.png", "0.png"]
        check(rows, expected(checkpoint, [picture(2), picture(0)]))
        assert "skipped nowhere.png: No such file or directory" in capsys.readouterr().err


class TestProcesses:
    def test_the_same_bits_as_by_threads(self, here, checkpoint, monkeypatch, capsys):
        for seed in range(30):
            save(f"in/{seed:02d}.png", picture(seed))
        Path("in/07b.png").write_text("no image")
        assert run(checkpoint, "in", "--out", "threads.parquet", "--batch-size", 4, "--workers", 2) == 1
        assert "(2 threads decode)" in capsys.readouterr().out
        monkeypatch.setattr(feeding, "FEW", 31)
        assert run(checkpoint, "in", "--out", "processes.parquet", "--batch-size", 4, "--workers", 2) == 1
        out, err = capsys.readouterr()
        assert "limits, at " in out and "(2 processes decode)" in out and "skipped in/07b.png: " in err
        (names, rows), (others, other_rows) = read("threads.parquet"), read("processes.parquet")
        assert names == others and np.array_equal(rows, other_rows)

    def test_which_is_decided_by_the_number(self, here):
        assert not feeding.are_many([{"rows": 500}, {"rows": 11}])
        assert feeding.are_many([{"rows": 500}, {"rows": 12}])
        with open("x.tar", "wb") as file:
            os.truncate(file.fileno(), 511 << 17)
        shard = {"rows": None, "shard": "x.tar"}
        assert not feeding.are_many([shard]) and feeding.are_many([shard, shard])


class TestDryRun:
    def test_without_model_and_output(self, here, checkpoint, capsys, monkeypatch):
        for seed in range(9):
            save(f"in/{seed}.png", picture(seed))
        Path("in/1b.png").write_text("no image")
        monkeypatch.setattr(encoder, "Encoder", lambda args: pytest.fail("the model was loaded"))
        assert run(checkpoint, "in", "--dry-run", "--workers", 2, "--batch-size", 4) == 1
        out, err = capsys.readouterr()
        first, second, third = out.splitlines()
        assert first == "10 images prepared, 1 of them could not be" and "skipped in/1b.png" in err
        rate, each = float(second.split()[0]), float(second.split()[5])
        assert " images/s by 2 threads, " in second and abs(each - rate / 2) <= 0.1
        cores = int(third.removeprefix("1,000 images/s would take ").removesuffix(" cores like these"))
        assert abs(cores - 1000 / each) <= 0.01 * cores + 1
        assert os.listdir() == ["in"]

    @pytest.mark.parametrize("options", [["--out", "out"], ["--ray"]])
    def test_what_it_does_not_go_with(self, here, checkpoint, capsys, options):
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--dry-run", *options) == 2
        assert "--dry-run" in capsys.readouterr().err and os.listdir() == ["a.png"]

    def test_nothing_to_measure(self, here, checkpoint, capsys):
        Path("a.png").write_text("no image")
        assert run(checkpoint, "a.png", "--dry-run") == 2
        assert "none of the 1 images could be used" in capsys.readouterr().err


def command(checkpoint: Path, *args: object) -> list[str]:
    return [sys.executable, "-c", CODE, "embed", *map(str, args), "--model", str(checkpoint), "--device", "cpu"]


@contextlib.contextmanager
def started(checkpoint: Path, *args: object):
    """The command in a group of its own, once two parts are written and the third is being."""
    with open("log", "w") as log:
        process = subprocess.Popen(command(checkpoint, *args), env=ENVIRONMENT, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while len(identities("out")) < 2 or not list(Path("out").glob(".*.part")):
            assert process.poll() is None and time.monotonic() < deadline, Path("log").read_text()
            time.sleep(0.02)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def many_images(number: int = 600, different: int = 60) -> list[str]:
    """So many that processes decode them; of 0.2 megapixels."""
    names = [f"in/{i:03d}.png" for i in range(number)]
    for i, name in enumerate(names):
        if i < different:
            save(name, np.tile(picture(i), (10, 8, 1)))
        else:
            os.link(names[i % different], name)
    return names


class TestFaults:
    """In processes of their own, and with processes that decode."""

    ARGS = ["in", "--out", "out", "--part-size", 60, "--batch-size", 8, "--workers", 2]

    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
    )
    def test_it_is_stopped_and_run_again(self, here, checkpoint, number, status):
        names = many_images()
        with started(checkpoint, *self.ARGS) as process:
            shared = shared_files(process.pid)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            assert process.wait(60) == status
            wait_until_gone(process.pid, shared)
        text, done = Path("log").read_text(), len(identities("out"))
        assert 2 <= done < 10
        left = [file for file in files("out") if not file.endswith(".part")]
        assert left == folder_of(done)  # each part with its errors
        if number != signal.SIGKILL:
            assert files("out") == left
            assert "Traceback" not in text
            assert text.endswith("siglip-fast: " + ("interrupted\n" if number == signal.SIGINT else "terminated\n"))
        before = identities("out")
        assert run(checkpoint, *self.ARGS) == 0
        assert before.items() <= identities("out").items()
        assert files("out") == folder_of(10) and read("out")[0] == names

    def test_a_process_that_decodes_is_killed(self, here, checkpoint):
        psutil = pytest.importorskip("psutil")
        names = many_images()
        with started(checkpoint, *self.ARGS) as process:
            # the server that forks them is a child, they are its children
            decoding = [child for child in psutil.Process(process.pid).children(recursive=True) if not child.children()]
            decoding = [child for child in decoding if "forkserver" in " ".join(child.cmdline())]
            assert len(decoding) == 2
            decoding[0].kill()
            status = process.wait(100)
        skipped = errors("out")
        assert status == (1 if skipped else 0)  # it may have been between two images
        assert len(skipped) <= 1 and all("killed by SIGKILL" in reason for reason in skipped.values())
        assert read("out")[0] == [name for name in names if name not in skipped]
        assert files("out") == folder_of(10)
        text = Path("log").read_text()
        assert "Traceback" not in text and text.count("skipped ") == len(skipped)

    def test_the_disk_is_full(self, here, checkpoint):
        """A real one, of 100 KB; then of more, and the same command."""
        names = many_images()
        Path("out").mkdir()
        script = (
            "mount -t tmpfs -o size=100k none out || exit 99\n"
            '"$@"; echo $? > first; find out -type f > left\n'
            "mount -o remount,size=9m out\n"
            '"$@"; echo $? > second; cp -a out copy'
        )
        unshare = shutil.which("unshare")
        if unshare is None:
            pytest.skip("needs unshare")
        done = subprocess.run(
            [unshare, "-rm", "sh", "-c", script, "sh", *command(checkpoint, *self.ARGS)],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        if done.returncode and not Path("first").exists():
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        assert Path("first").read_text() == "2\n" and Path("second").read_text() == "0\n", done.stderr
        assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
        left = sorted(str(Path(file).relative_to("out")) for file in Path("left").read_text().split())
        parts = sum(file.startswith("part-") for file in left)
        assert left == folder_of(parts) and 0 < parts < 10
        assert files("copy") == folder_of(10) and read("copy")[0] == names


@pytest.mark.parametrize("count", [1, 2, 9])
def test_devices_in_turns(here, checkpoint, capsys, monkeypatch, count):
    """The CPU, twice: every second batch by another model, and the images in their order."""
    ran = []
    call = encoder.Encoder.__call__

    def note(self, inputs, model=None):
        ran.append(id(model))
        return call(self, inputs, model)

    monkeypatch.setattr(encoder.Encoder, "__call__", note)
    pictures = [picture(seed) for seed in range(count)]
    names = [save(f"{seed}.png", pixels) for seed, pixels in enumerate(pictures)]
    assert run(checkpoint, *names, "--out", "o.parquet", "--batch-size", 2, "--device", "cpu,cpu") == 0
    assert "on cpu, cpu)" in capsys.readouterr().out
    paths, rows = read("o.parquet")
    assert paths == names
    check(rows, expected(checkpoint, pictures))
    assert len(set(ran)) == min(len(ran), 2) and all(a != b for a, b in zip(ran, ran[1:], strict=False))


def test_devices_of_two_kinds(here, checkpoint, capsys):
    save("0.png", picture(0))
    assert run(checkpoint, "0.png", "--out", "o.parquet", "--device", "cpu,meta") == 2
    assert "--device cpu,meta: expected devices of one kind" in capsys.readouterr().err
