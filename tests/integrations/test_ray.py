"""`siglip-fast embed --ray` and `Embedder` on a real Ray of this machine: what is written, and what survives whose death."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from checkpoints import save_tiny_naflex
from embed_command import (
    TINY,
    check,
    checkpoint,
    expected,
    here,
    make_checkpoint,
    picture,
    read,
    run,
    save,
    write_shard,
)
from PIL import Image
from pyarrow import parquet

from siglip_fast.errors import UserError
from siglip_fast.feed.folder import Folder
from siglip_fast.integrations.ray import ATTEMPTS, Embedder, PartWriter
from siglip_fast.integrations.ray_run import _place

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
__all__ = ["checkpoint", "here"]  # fixtures

PARTS = [f"part-{index:06d}.parquet" for index in range(100)]
SMALL = ["--ray", "--ray-actors", 2, "--part-size", 5, "--batch-size", 4, "--workers", 1]
# Slow to decode, so that a worker is in the midst of a part for long.
SLOW = ["--ray", "--ray-actors", 2, "--part-size", 3, "--batch-size", 2, "--workers", 1]


@pytest.fixture(scope="module", autouse=True)
def own_ray():
    """One for all tests that need no process of their own. Its workers must not die of what else the machine holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level="error")
        yield
        ray.shutdown()


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def errors(folder: str | Path) -> dict[str, str]:
    table = parquet.read_table(Path(folder) / "_errors")
    assert len(set(table["path"].to_pylist())) == len(table)
    return dict(zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True))


def files(folder: str | Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())


def identities(folder: str | Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in Path(folder).glob("part-*")}


def slow_images(number: int) -> list[str]:
    names = [save("in/00.png", np.tile(picture(0), (50, 40, 1)))]
    names += [f"in/{i:02d}.png" for i in range(1, number)]
    for name in names[1:]:
        os.link(names[0], name)
    return names


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    """A folder with `in`, and `out` of a run on Ray."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in range(11):
            save(f"in/{seed:02d}.png", picture(seed))
        Path("in/03b.png").write_text("not an image")
        Path("in/07b.jpg").touch()
        os.link("in/00.png", b"in/08\xff.png")
        assert run(checkpoint, "in", "in/05.png", "--out", "out", *SMALL) == 1
    return folder


class TestImages:
    def test_it_equals_embed_without_ray(self, written, checkpoint, monkeypatch, capsys):
        monkeypatch.chdir(written)
        assert run(checkpoint, "in", "--out", "one.parquet", "--batch-size", 4) == 1
        paths, rows = read("one.parquet")
        ours, our_rows = read("out")
        assert ours == paths == [f"in/{seed:02d}.png" for seed in range(11)]
        np.testing.assert_allclose(our_rows, rows, rtol=0, atol=1e-5 * np.abs(rows).max())
        check(our_rows, expected(checkpoint, [picture(seed) for seed in range(11)]))
        for part in PARTS[:3]:
            assert parquet.read_schema(f"out/{part}").equals(parquet.read_schema("one.parquet"), check_metadata=True)

    def test_images_of_any_aspect(self, here, capsys):
        save_tiny_naflex(here / "naflex")
        for seed, size in enumerate([(40, 50), (33, 200), (300, 20)]):
            save(f"in/{seed}.png", picture(seed, *size))
        assert run(Path("naflex"), "in", "--out", "one.parquet", "--pool", "mean") == 0
        assert run(Path("naflex"), "in", "--out", "out", *SMALL, "--pool", "mean") == 0
        assert "stock" not in capsys.readouterr().out
        ours, (paths, rows) = read("out"), read("one.parquet")
        assert ours[0] == paths
        np.testing.assert_allclose(ours[1], rows, rtol=0, atol=1e-5 * np.abs(rows).max())

    def test_parts_and_errors(self, written, monkeypatch):
        monkeypatch.chdir(written)
        assert files("out") == sorted(["_settings.json", *PARTS[:3], *[f"_errors/{part}" for part in PARTS[:3]]])
        assert [len(read(f"out/{part}")[0]) for part in PARTS[:3]] == [4, 4, 3]
        reasons = errors("out")
        assert set(reasons) == {"in/03b.png", "in/07b.jpg", "in/08\\udcff.png"}
        assert "identify" in reasons["in/03b.png"] and "UTF-8" in reasons["in/08\\udcff.png"]
        assert set(os.listdir()) - {"one.parquet"} == {"in", "out"}

    def test_all_done_is_not_done_again(self, written, checkpoint, monkeypatch, capsys):
        monkeypatch.chdir(written)
        before = identities("out")
        monkeypatch.setitem(sys.modules, "ray", None)  # it takes seconds to start: not for nothing
        Path("out/.part-000000.parquet.00.part").touch()  # of a worker that was killed
        assert run(checkpoint, "in", "in/05.png", "--out", "out", *SMALL) == 1
        assert identities("out") == before
        out = capsys.readouterr().out
        assert "11 images embedded, 3 skipped, 1 repeated paths left out; nothing was left to do" in out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--normalize"], "normalize False, not True"),
            (["--pool", "mean"], "pool 'head', not 'mean'"),
            (["--dtype", "bfloat16"], "dtype 'float32', not 'bfloat16'"),
            (["--part-size", 6], "part_size 5, not 6"),
            (["--out", "out"], "other inputs"),
        ],
    )
    def test_other_settings_are_refused(self, written, checkpoint, monkeypatch, capsys, options, message):
        monkeypatch.chdir(written)
        before = identities("out")
        images = ["in/00.png"] if "--out" in options else ["in"]
        assert run(checkpoint, *images, "--out", "out", *SMALL, *options) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith("siglip-fast: error: ") and err.count("\n") == 1
        assert identities("out") == before

    def test_another_model_is_refused(self, written, monkeypatch, capsys):
        monkeypatch.chdir(written)
        other = make_checkpoint(written.parent / "other")
        assert run(other, "in", "--out", "out", *SMALL) == 2
        assert "is of a run with model " in capsys.readouterr().err


class TestShards:
    def test_a_shard_is_a_part(self, here, checkpoint, capsys):
        write_shard("a.tar", {f"{i}.png": encode(picture(i)) for i in range(5)})
        write_shard("b.tar", {"5.png": encode(picture(5)), "5.cls": b"5"})
        Path("a.tar").write_bytes(Path("a.tar").read_bytes().rstrip(b"\0"))
        assert run(checkpoint, "*.tar", "--out", "out", *SMALL) == 1
        paths, rows = read("out")
        assert paths == [f"a.tar/{i}.png" for i in range(5)] + ["b.tar/5.png"]
        check(rows, expected(checkpoint, [picture(i) for i in range(6)]))
        assert list(errors("out")) == ["a.tar"] and len(read(f"out/{PARTS[0]}")[0]) == 5
        assert "6 images embedded, 1 skipped; 7 of them in this run" in capsys.readouterr().out
        # without Ray there is nothing left either
        assert run(checkpoint, "*.tar", "--out", "out", "--part-size", 5) == 1
        assert "nothing was left to do" in capsys.readouterr().out


class TestParquet:
    def test_both_kinds_of_columns(self, here, checkpoint, capsys):
        plain = {"image": [encode(picture(i)) for i in range(7)], "path": [f"p{i}" for i in range(7)], "label": [0] * 7}
        plain["image"][2], plain["image"][4], plain["path"][5] = b"no image", None, None
        parquet.write_table(pa.table(plain), "a.parquet", row_group_size=2)
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        nested = [{"bytes": encode(picture(i)), "path": f"h{i}"} for i in range(10, 14)]
        nested[1]["path"], nested[2] = None, None
        parquet.write_table(pa.table({"image": pa.array(nested, kind)}), "b.parquet")

        assert run(checkpoint, "*.parquet", "--out", "out", *SMALL, "--ray-actors", 1) == 1

        names = ["p0", "p1", "p3", "a.parquet:5", "p6", "h10", "b.parquet:1", "h13"]
        paths, rows = read("out")
        assert paths == names
        check(rows, expected(checkpoint, [picture(i) for i in (0, 1, 3, 5, 6, 10, 11, 13)]))
        assert errors("out") == {"p2": "cannot identify an image in it", "p4": "empty", "b.parquet:2": "empty"}
        # whole row groups: 2 + 2 rows, 2 + 1 rows, and another file begins another part
        assert [len(read(f"out/{part}")[0]) for part in PARTS[:3]] == [3, 2, 3]
        assert "8 images embedded, 3 skipped" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "no column 'image' among ['jpg', 'key', 'n']; --image-column"),
            (["--image-column", "key"], "column 'key' is string, expected binary"),
            (["--image-column", "jpg"], "no column 'path' among"),
            (["--image-column", "jpg", "--id-column", "jpg"], "column 'jpg' is binary, expected text or numbers"),
            (["in"], "expected one kind of input, got Parquet files and images"),
            (["broken.parquet", "--image-column", "jpg", "--id-column", "n"], "broken.parquet: "),
        ],
    )
    def test_wrong_inputs_are_refused(self, here, checkpoint, capsys, options, message):
        parquet.write_table(pa.table({"jpg": [b""], "key": ["a"], "n": [1]}), "a.parquet")
        Path("broken.parquet").write_bytes(b"PAR1 but no more")
        assert run(checkpoint, "a.parquet", *options, "--out", "out", "--ray") == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
        assert not Path("out").exists()

    @pytest.mark.parametrize("force", [[], ["--force"]])
    def test_no_rows(self, here, checkpoint, capsys, force):
        parquet.write_table(
            pa.table({"image": pa.array([], pa.binary()), "path": pa.array([], pa.string())}), "a.parquet"
        )
        assert run(checkpoint, "a.parquet", "--out", "out", "--ray", *force) == 2
        assert capsys.readouterr().err == "siglip-fast: error: no rows in a.parquet\n"
        assert not Path("out").exists()


CODE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from siglip_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def writers(folder: Path):
    """Processes in the midst of a part of `folder`, with its temporary file."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.name().startswith("ray::"):
                for file in process.open_files():
                    if file.path.startswith(f"{folder}/.part-") and file.path.endswith(".part"):
                        yield process, Path(file.path)
        except psutil.Error:
            continue


class TestDeaths:
    def test_a_worker_is_killed(self, here, checkpoint):
        names = slow_images(18)
        left = []

        def kill_one():
            while not left:
                for worker, file in writers(here / "out"):
                    if any(Path("out").glob("part-*")):
                        worker.kill()
                        psutil.wait_procs([worker], 10)
                        left.append(file.exists())
                        return
                time.sleep(0.02)

        killer = threading.Thread(target=kill_one, daemon=True)
        killer.start()
        assert run(checkpoint, *names, "--out", "out", *SLOW) == 0
        assert left == [True]  # it had not finished its part
        assert read("out")[0] == names  # nothing lost, nothing doubled, in order
        assert files("out") == sorted(["_settings.json", *PARTS[:6], *[f"_errors/{part}" for part in PARTS[:6]]])

    @pytest.mark.parametrize(
        ("number", "status"),
        [
            (signal.SIGKILL, -signal.SIGKILL),
            (signal.SIGTERM, 143),
            pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        ],
    )
    def test_the_command_is_stopped_and_run_again(self, here, checkpoint, number, status):
        names = slow_images(18)
        args = ["embed", "in", "--out", "out", *SLOW, "--ray-actors", 1, "--model", checkpoint, "--device", "cpu"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with open("log", "w") as stderr:
            process = subprocess.Popen([sys.executable, "-c", CODE, *map(str, args)], env=environment, stderr=stderr)
        children: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 200
            while len(identities("out")) < 2 or not list(Path("out").glob(".*.part")):
                assert process.poll() is None and time.monotonic() < deadline, Path("log").read_text()
                time.sleep(0.02)
            children = psutil.Process(process.pid).children(recursive=True)
            workers = [child for child in children if "PartWriter" in child.name()]
            assert len(workers) == 1
            process.send_signal(number)
            assert process.wait(60) == status
            psutil.wait_procs(workers, 60)
            assert not any(worker.is_running() for worker in workers)  # they go with the command
        finally:
            for orphan in [process, *children]:  # Ray's agents outlive a killed command for a minute
                with contextlib.suppress(psutil.Error):
                    orphan.kill()
            process.wait()
        text = Path("log").read_text()
        assert "Traceback" not in text
        if number != signal.SIGKILL:
            word = "interrupted" if number == signal.SIGINT else "terminated"
            assert text.endswith(f"siglip-fast: {word}\n")
            noise = [line for line in text.splitlines() if line and "image" not in line]
            assert [line for line in noise if "siglip-fast" not in line and "Loading" not in line] == []
            assert not list(Path("out").rglob("*.part"))
        finished = identities("out")
        assert 2 <= len(finished) < 6

        assert run(checkpoint, "in", "--out", "out", *SLOW) == 0
        assert finished.items() <= identities("out").items()  # what was finished is not touched
        assert read("out")[0] == names
        assert files("out") == sorted(["_settings.json", *PARTS[:6], *[f"_errors/{part}" for part in PARTS[:6]]])
        assert sorted(os.listdir()) == ["in", "log", "out"]

    @pytest.mark.slow
    def test_what_kills_every_worker_ends_the_run(self, here, checkpoint, capsys):
        names = slow_images(9)
        stop, dead = threading.Event(), []

        def kill_all_of_part_1():
            while not stop.is_set():
                for worker, file in writers(here / "out"):
                    if PARTS[1] in file.name:
                        worker.kill()
                        dead.append(file)
                time.sleep(0.02)

        killer = threading.Thread(target=kill_all_of_part_1)
        killer.start()
        try:
            assert run(checkpoint, *names, "--out", "out", *SLOW) == 2
        finally:
            stop.set()
            killer.join()
        assert f"{ATTEMPTS} workers died of part 1 (in/03.png to in/05.png)" in capsys.readouterr().err
        assert len(set(dead)) == ATTEMPTS
        assert not list(Path("out").rglob("*.part"))
        assert run(checkpoint, *names, "--out", "out", *SLOW) == 0
        assert read("out")[0] == names


class TestFailures:
    def test_a_model_that_cannot_be_loaded_is_one_line(self, here, capsys):
        save("a.png", picture(0))
        headless = make_checkpoint(here / "headless", vision_use_head=False)
        assert run(headless, "a.png", "--out", "out", *SMALL) == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith("has no pooling head: use --pool mean")
        assert files("out") == ["_settings.json"]

    def test_a_name_that_is_no_model_needs_no_worker(self, here, capsys):
        save("a.png", picture(0))
        assert run(Path("/no/such/model"), "a.png", "--out", "out", *SMALL) == 2
        assert capsys.readouterr().err.startswith("siglip-fast: error: ")
        assert not Path("out").exists()

    def test_ray_is_missing(self, here, checkpoint, capsys, monkeypatch):
        save("a.png", picture(0))
        monkeypatch.setitem(sys.modules, "ray", None)
        assert run(checkpoint, "a.png", "--out", "out", "--ray") == 2
        err = capsys.readouterr().err
        assert "pip install -e '.[ray]'" in err and err.count("\n") == 1
        assert os.listdir() == ["a.png"]

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_what_is_there_is_not_touched(self, here, checkpoint, capsys, kind):
        save("a.png", picture(0))
        Path("out").write_text("precious") if kind == "file" else save("out/part-000000.parquet.png", picture(1))
        assert run(checkpoint, "a.png", "--out", "out", "--force", *SMALL) == 2
        assert ("is a file" if kind == "file" else "is not empty") in capsys.readouterr().err
        assert len(files(".")) == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--device", "cuda"], "Ray knows of no GPU"),
            (["--device", "cuda:1"], "expected cuda or cpu"),
            (["--id-column", "x"], "--id-column is for Parquet files"),
        ],
    )
    def test_options_that_cannot_be(self, here, checkpoint, capsys, monkeypatch, options, message):
        save("a.png", picture(0))
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
        assert run(checkpoint, "a.png", "--out", "out", *SMALL, *options) == 2
        assert message in capsys.readouterr().err
        assert not Path("out").exists()


class TestFolder:
    def test_force_empties_it_of_its_own_files_only(self, here):
        folder = Folder(here / "out", [{"index": 0, "rows": 1}])
        folder.prepare({"model": "a", "pool": "head"}, force=False)
        for name in (PARTS[0], f"_errors/{PARTS[0]}", "notes.txt"):
            (here / "out" / name).touch()
        folder.prepare({"model": "a", "pool": "head"}, force=False)
        with pytest.raises(UserError, match="model 'a', not 'b'"):
            folder.prepare({"model": "b", "pool": "head"}, force=False)
        assert len(files("out")) == 4
        folder.prepare({"model": "b", "pool": "head"}, force=True)
        assert files("out") == ["_settings.json", "notes.txt"]
        with pytest.raises(UserError, match="model 'b', not 'a'"):
            folder.prepare({"model": "a", "pool": "head"}, force=False)

    def test_a_folder_that_lost_rows_is_not_called_whole(self, here):
        (here / "_errors").mkdir()
        parquet.write_table(pa.table({"path": ["a"]}), here / PARTS[0])
        parquet.write_table(pa.table({"path": ["b"]}), here / "_errors" / PARTS[0])
        assert Folder(here, [{"index": 0, "rows": 2}]).count() == (1, 1)
        with pytest.raises(UserError, match="1 rows and 1 errors, expected 3"):
            Folder(here, [{"index": 0, "rows": 3}]).count()
        (here / PARTS[0]).write_bytes(b"PAR1")
        with pytest.raises(UserError, match=f"{PARTS[0]}: .*; delete it and run again"):
            Folder(here, [{"index": 0, "rows": 2}]).count()


class TestPlace:
    """On clusters that are made up: no machine with a GPU, and no second machine, has run this."""

    @pytest.mark.parametrize(
        ("nodes", "options", "place"),
        [
            ([{"CPU": 8}], {}, ("cpu", "float32", {"actors": 1, "num_cpus": 8})),
            ([{"CPU": 8}, {"CPU": 4}, {}], {}, ("cpu", "float32", {"actors": 2, "num_cpus": 4})),
            ([{"CPU": 8}, {"CPU": 5}], {"ray_actors": 3}, ("cpu", "float32", {"actors": 3, "num_cpus": 2})),
            ([{"CPU": 1}], {"ray_actors": 2}, ("cpu", "float32", {"actors": 2, "num_cpus": 0.5})),
            ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}], {}, ("cuda", "bfloat16", {"actors": 6, "num_gpus": 1})),
            ([{"CPU": 8, "GPU": 4}], {"device": "cpu"}, ("cpu", "float32", {"actors": 1, "num_cpus": 8})),
            (
                [{"CPU": 8, "GPU": 4}],
                {"ray_actors": 3, "dtype": "float16"},
                ("cuda", "float16", {"actors": 3, "num_gpus": 1}),
            ),
        ],
    )
    def test_actors_and_what_they_reserve(self, monkeypatch, nodes, options, place):
        gone = {"Alive": False, "Resources": {"CPU": 64}}
        monkeypatch.setattr(ray, "nodes", lambda: [gone] + [{"Alive": True, "Resources": n} for n in nodes])
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": sum(n.get("GPU", 0) for n in nodes)})
        args = Namespace(**{"device": None, "dtype": None, "ray_actors": None} | options)
        resources = _place(args)
        assert (args.device, args.dtype, resources) == place


class TestPartWriter:
    """In this process: what needs no Ray."""

    @pytest.fixture
    def writer(self, here, checkpoint):
        from siglip_fast.cli.main import _parser

        args = ["embed", "in", "--model", str(checkpoint), "--out", str(here / "out"), "--device", "cpu"]
        (here / "out/_errors").mkdir(parents=True)
        return PartWriter(_parser().parse_args(args), str(here))

    def test_a_part_without_an_embedding_has_its_columns(self, here, writer):
        part = {"index": 0, "rows": 2, "images": ["x.png", "y.png"]}
        assert writer({"part": [json.dumps(part)]}) == {"rows": [2], "route": [""], "failure": [""]}
        assert read("out")[0] == []
        assert parquet.read_schema("out/part-000000.parquet").field("embedding").type.list_size == TINY["hidden_size"]
        assert errors("out") == {"x.png": "No such file or directory", "y.png": "No such file or directory"}

    def test_it_gives_up_on_a_part_that_killed_others(self, here, writer):
        save("a.png", picture(0))
        part = {"index": 3, "rows": 1, "images": ["a.png"]}
        for i in range(ATTEMPTS):
            Path(f"out/.part-000003.parquet.{i}.part").touch()
        (failure,) = writer({"part": [json.dumps(part)]})["failure"]
        assert f"{ATTEMPTS} workers died of part 3 (a.png to a.png)" in failure
        Path("out/.part-000003.parquet.0.part").unlink()
        assert writer({"part": [json.dumps(part)]})["failure"] == [""]

    def test_a_table_that_breaks_is_told(self, here, writer):
        parquet.write_table(pa.table({"image": [os.urandom(9000)], "path": ["a"]}), "a.parquet", compression="zstd")
        whole = bytearray(Path("a.parquet").read_bytes())
        whole[4:400] = bytes(396)
        Path("a.parquet").write_bytes(whole)
        part = {
            "index": 0,
            "rows": 1,
            "file": "a.parquet",
            "groups": [0, 1],
            "start": 0,
            "image": "image",
            "id": "path",
        }
        (failure,) = writer({"part": [json.dumps(part)]})["failure"]
        assert failure.startswith("a.parquet: ")
        assert files("out") == []


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder(str(checkpoint), image_column="img", id_column="key", device="cpu")


class TestEmbedder:
    def test_in_map_batches(self, checkpoint):
        images = [encode(picture(i)) for i in range(9)]
        images[3] = images[3][:200]
        rows = [{"image": image, "path": f"{i}"} for i, image in enumerate(images)]
        settings = {"model": str(checkpoint), "device": "cpu", "normalize": True, "workers": 1}
        dataset = ray.data.from_items(rows, override_num_blocks=3).map_batches(
            Embedder, fn_constructor_kwargs=settings, batch_size=2, compute=ray.data.ActorPoolStrategy(size=1)
        )
        result = {row["path"]: row for row in dataset.take_all()}
        assert sorted(result) == [row["path"] for row in rows]
        bad = result.pop("3")
        assert bad["embedding"] is None and "truncated" in bad["error"]
        assert all(row["error"] is None for row in result.values())
        wanted = expected(checkpoint, [picture(i) for i in range(9) if i != 3])
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        order = sorted(result)
        check(np.array([result[name]["embedding"] for name in order], np.float32), wanted)

    def test_hugging_face_columns_nulls_and_repeated_ids(self, embedder, checkpoint):
        cells = [{"bytes": encode(picture(i)), "path": None} for i in range(3)]
        cells[1] = None
        batch = {"img": np.array(cells, object), "key": np.array([7, 7, 8])}
        table = embedder(batch)
        assert table.schema.types == [pa.string(), pa.list_(pa.float32(), TINY["hidden_size"]), pa.string()]
        assert table["path"].to_pylist() == ["7", "7", "8"]
        assert table["error"].to_pylist() == [None, "empty", None]
        rows = table["embedding"].to_pylist()
        assert rows[1] is None
        check(np.array([rows[0], rows[2]], np.float32), expected(checkpoint, [picture(0), picture(2)]))

    def test_other_batches_are_errors(self, embedder):
        with pytest.raises(ValueError, match=re.escape("no column 'img' in the batch, which has ['image', 'key']")):
            embedder({"image": np.array([b""]), "key": np.array(["a"])})
        with pytest.raises(TypeError, match="holds ndarray, expected bytes"):
            embedder({"img": np.zeros((1, 4, 4, 3), np.uint8), "key": np.array(["a"])})
