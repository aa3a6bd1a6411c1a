"""`siglip-fast embed`: images, paths and output files, what it refuses and what a failure leaves behind."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import transformers
from embed_command import check, checkpoint, expected, here, picture, read, run, save
from PIL import Image
from torch.nn import functional as F

from siglip_fast.feed import encoder, paths, sinks

__all__ = ["checkpoint", "here"]  # fixtures


# A file closed before its writer shows only as an exception that Python ignored.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


class TestImages:
    def test_a_mixed_folder(self, here, checkpoint, capsys):
        good = ["photos/1.png", "photos/b/naïve 日本.PNG", "photos/b/z.webp", "photos/c.tiff", "photos/a/ü.bmp"]
        for seed, path in enumerate(good):
            if path.endswith("webp"):
                (here / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(seed)).save(path, lossless=True)
            else:
                save(path, picture(seed))
        whole = Path(save("photos/d.png", picture(99))).read_bytes()
        Path("photos/d.png").unlink()
        bad = ["photos/empty.jpg", "photos/text.jpg", "photos/cut.png", "photos/gone.png", "photos/b/bits.png"]
        Path(bad[0]).touch()
        Path(bad[1]).write_text("not an image")
        Path(bad[2]).write_bytes(whole[: len(whole) // 2])
        Path(bad[3]).symlink_to("nowhere.png")
        Path(bad[4]).write_bytes(whole[:200] + bytes(200) + whole[400:])
        Path("photos/notes.txt").write_text("not even asked for")

        assert run(checkpoint, "photos", "--out", "out.parquet", "--batch-size", 2) == 1

        paths, rows = read("out.parquet")
        order = ["photos/1.png", "photos/c.tiff", "photos/a/ü.bmp", "photos/b/naïve 日本.PNG", "photos/b/z.webp"]
        assert paths == order
        check(rows, expected(checkpoint, [picture(good.index(path)) for path in order]))
        out, err = capsys.readouterr()
        assert all(err.count(f"skipped {path}: ") == 1 for path in bad)
        assert err.count("skipped ") == len(bad)
        assert "skipped photos/gone.png: No such file or directory" in err
        assert "notes.txt" not in err
        assert "5 images embedded, 5 skipped" in out
        assert "images/s" in out and "out.parquet" in out and "backend cpu (float32 on cpu)" in out
        assert "image/s" in err  # the progress bar

    def test_every_kind_of_pixels(self, here, checkpoint):
        rgb = picture(7)
        gray = rgb[..., 0]
        palette = Image.fromarray(rgb).quantize(16)
        cmyk = Image.fromarray(rgb[::-1]).convert("CMYK")
        images = {
            "gray.png": (Image.fromarray(gray), np.dstack([gray] * 3)),
            "gray16.png": (Image.fromarray(gray.T.astype(np.uint16) * 257), np.dstack([gray.T] * 3)),
            "gray16.tif": (Image.fromarray(gray[::-1].astype(np.uint16) * 257), np.dstack([gray[::-1]] * 3)),
            "gray16.pgm": (Image.fromarray(gray[:9].astype(np.uint16) * 257), np.dstack([gray[:9]] * 3)),
            "rgba.png": (Image.fromarray(np.dstack([rgb, gray])), rgb),
            "la.png": (Image.fromarray(np.dstack([gray[::2], gray[::2]]), "LA"), np.dstack([gray[::2]] * 3)),
            "palette.png": (palette, np.asarray(palette.convert("RGB"))),
            "bilevel.png": (Image.fromarray(gray > 128), np.dstack([(gray > 128) * np.uint8(255)] * 3)),
            "cmyk.tif": (cmyk, np.asarray(cmyk.convert("RGB"))),
            "three_high.png": (Image.fromarray(rgb[:3]), rgb[:3]),
            "one_high.png": (Image.fromarray(rgb[5:6]), rgb[5:6]),
            "three_wide.png": (Image.fromarray(rgb[:, :3]), rgb[:, :3]),
            "one_pixel.png": (Image.fromarray(rgb[9:10, 9:10]), rgb[9:10, 9:10]),
        }
        for name, (image, _) in images.items():
            image.save(name)
        assert run(checkpoint, *images, "--out", "out.parquet") == 0
        paths, rows = read("out.parquet")
        assert paths == list(images)
        check(rows, expected(checkpoint, [np.ascontiguousarray(pixels) for _, pixels in images.values()]))

    def test_exif_orientation(self, here, checkpoint):
        upright = picture(3)
        for orientation, stored in {6: np.rot90(upright), 3: np.rot90(upright, 2), 2: upright[:, ::-1]}.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            Image.fromarray(np.ascontiguousarray(stored)).save(f"{orientation}.png", exif=exif)
        assert run(checkpoint, "2.png", "3.png", "6.png", "--out", "out.parquet") == 0
        wanted = expected(checkpoint, [upright])
        for row in read("out.parquet")[1]:
            check(row[None], wanted)
        turned = expected(checkpoint, [np.ascontiguousarray(np.rot90(upright))])
        assert np.abs(turned - wanted).max() > 0.01 * np.abs(wanted).max()

    def test_floating_pixels_have_no_white(self, here, checkpoint, capsys):
        Image.fromarray(np.float32(picture(0)[..., 0])).save("float.tif")
        Image.fromarray(np.int32(picture(0)[..., 0])).save("int.tif")
        assert run(checkpoint, "float.tif", "int.tif", "--out", "out.parquet") == 2
        err = capsys.readouterr().err
        assert "float.tif: Pillow mode F" in err and "int.tif: Pillow mode I" in err
        assert not Path("out.parquet").exists()

    def test_names_that_cannot_be_written_and_files_that_would_block(self, here, checkpoint, capsys):
        save("a.png", picture(0))
        Path("nothing.png").touch()
        os.mkfifo("pipe.png")
        os.link("a.png", b"\xff.png")
        os.link("a.png", "two\nlines.png")
        assert run(checkpoint, ".", "--out", "out.npy") == 1
        assert Path("out.paths.txt").read_text() == "./a.png\n"
        err = capsys.readouterr().err
        assert "pipe.png: not a regular file" in err
        assert "nothing.png: empty" in err
        assert "'./\\udcff.png': its name is not UTF-8" in err
        assert "'./two\\nlines.png': a line break in its name" in err
        assert run(checkpoint, ".", "--out", "out.parquet") == 1
        assert read("out.parquet")[0] == ["./a.png", "./two\nlines.png"]

    def test_warnings_stay_out_of_the_progress_bar(self, here, checkpoint, capsys, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # of which Pillow warns, from a thread
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.parquet") == 0
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        (warning,) = [line for line in lines if "DecompressionBomb" in line]
        assert warning.startswith("siglip-fast: DecompressionBombWarning: Image size (2000 pixels)")
        assert not any("warnings.warn" in line for line in lines)

    def test_an_embedding_that_is_not_finite_is_skipped(self, here, checkpoint, capsys, monkeypatch):
        names = [save(f"{i}.png", picture(i)) for i in range(5)]
        call = encoder.Encoder.__call__

        def spoiled(self, inputs, model):
            rows = call(self, inputs, model).clone()  # which is no inference tensor
            rows[1, 5] = np.inf
            return rows

        monkeypatch.setattr(encoder.Encoder, "__call__", spoiled)
        assert run(checkpoint, *names, "--out", "out.parquet", "--batch-size", 3) == 1
        paths, rows = read("out.parquet")
        assert paths == ["0.png", "2.png", "3.png"]
        check(rows, expected(checkpoint, [picture(i) for i in (0, 2, 3)]))
        err = capsys.readouterr().err
        assert all(f"skipped {name}: its embedding is not finite" in err for name in ("1.png", "4.png"))


class TestPaths:
    def test_repeats_are_embedded_once_where_first_met(self, here, checkpoint, capsys):
        for seed, name in enumerate("abc"):
            save(f"in/{name}.png", picture(seed))
        assert run(checkpoint, "in/c.png", "in", "./in/a.png", here / "in/b.png", "--out", "out.parquet") == 0
        paths, rows = read("out.parquet")
        assert paths == ["in/c.png", "in/a.png", "in/b.png"]
        check(rows, expected(checkpoint, [picture(2), picture(0), picture(1)]))
        assert "3 images embedded, 3 repeated paths left out" in capsys.readouterr().out

    def test_globs(self, here):
        for name in ("x/1.png", "x/y/2.png", "x/y/3.jpg", "x/[4].png", "x/4.png"):
            save(name, picture(0))
        every = paths.find_files(["x/**/*.png"])[0]
        assert every == sorted(every) == sorted(["x/1.png", "x/4.png", "x/[4].png", "x/y/2.png"])
        assert paths.find_files(["x/[4].png"])[0] == ["x/[4].png"]  # a file of this name comes first
        assert paths.find_files(["x/[14].png"])[0] == ["x/1.png", "x/4.png"]
        assert paths.find_files(["x/y*"])[0] == ["x/y/2.png", "x/y/3.jpg"]  # a folder that a glob matched

    @pytest.mark.parametrize("pattern", ["nowhere.png", "*.gif", "empty", "texts"])
    def test_a_pattern_without_images_is_an_error(self, here, checkpoint, capsys, pattern):
        save("a.png", picture(0))
        Path("empty").mkdir()
        Path("texts").mkdir()
        Path("texts/a.txt").touch()
        assert run(checkpoint, "a.png", pattern, "--out", "out.parquet") == 2
        assert f"error: {pattern}: no " in capsys.readouterr().err
        assert not Path("out.parquet").exists()

    def test_a_folder_that_cannot_be_read_is_an_error(self, here, checkpoint, capsys, monkeypatch):
        save("in/a.png", picture(0))
        save("in/secret/b.png", picture(1))
        scandir = os.scandir

        def denied(path):
            if str(path).endswith("secret"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", denied)  # tests may run as root, whom no mode keeps out
        assert run(checkpoint, "in", "--out", "out.parquet") == 2
        assert "cannot read folder in/secret: Permission denied" in capsys.readouterr().err


class TestOutput:
    def test_parquet_schema_and_metadata(self, here, checkpoint):
        names = [save(f"{i}.png", picture(i)) for i in range(2)]
        assert run(checkpoint, *names, "--out", "out.parquet", "--normalize") == 0
        schema = parquet.read_schema("out.parquet")
        assert [str(schema.field(name).type) for name in schema.names] == [
            "string",
            "fixed_size_list<element: float>[64]",
        ]
        assert schema.names == ["path", "embedding"]
        metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
        versions = json.loads(metadata.pop("versions"))
        assert versions["torch"] == torch.__version__
        assert versions["transformers"] == transformers.__version__
        assert {"siglip_fast", "PIL"} < set(versions)
        assert metadata == {
            "model": str(checkpoint),
            "random_weights": "no",
            "revision": "",
            "dtype": "float32",
            "pool": "head",
            "normalized": "yes",
            "decoder": "pillow",
            "backend": "backend cpu",
        }
        wanted = expected(checkpoint, [picture(0), picture(1)])
        check(read("out.parquet")[1], wanted / np.linalg.norm(wanted, axis=1, keepdims=True))

    @pytest.mark.parametrize("pool", ["head", "mean"])
    @pytest.mark.parametrize("batch_invariant", [True, False])
    def test_batch_invariant(self, here, checkpoint, monkeypatch, pool, batch_invariant):
        """With libraries whose results depend on the size of the batch, in the model and behind it."""
        linear, mean, normalize = F.linear, torch.Tensor.mean, F.normalize
        monkeypatch.setattr(F, "linear", lambda x, *args: linear(x, *args) + 1e-3 * len(x))
        monkeypatch.setattr(torch.Tensor, "mean", lambda x, dim: mean(x, dim) + 1e-3 * len(x))
        monkeypatch.setattr(F, "normalize", lambda x, dim: normalize(x, dim=dim) * (1 + 1e-3 * len(x)))
        names = [save(f"{i}.png", picture(i)) for i in range(5)]
        flags = ["--backend", "torch", "--normalize", "--pool", pool, *["--batch-invariant"] * batch_invariant]
        assert run(checkpoint, *names, "--out", "of5.parquet", "--batch-size", "5", *flags) == 0
        assert run(checkpoint, *names, "--out", "of2.parquet", "--batch-size", "2", *flags) == 0
        assert np.array_equal(read("of5.parquet")[1], read("of2.parquet")[1]) is batch_invariant
        backend = parquet.read_schema("of5.parquet").metadata[b"backend"]
        assert backend == (b"backend torch, batch invariant" if batch_invariant else b"backend torch")

    @pytest.mark.parametrize(("images", "groups"), [(11, 2), (12, 2), (13, 3)])
    def test_parquet_is_written_in_row_groups(self, here, checkpoint, monkeypatch, images, groups):
        monkeypatch.setattr(sinks, "ROW_GROUP", 4)  # with batches of 3: as soon as there are 6
        names = [save(f"{i}.png", picture(i)) for i in range(images)]
        assert run(checkpoint, *names, "--out", "out.parquet", "--batch-size", 3) == 0
        assert parquet.ParquetFile("out.parquet").num_row_groups == groups
        paths, rows = read("out.parquet")
        assert paths == names
        check(rows, expected(checkpoint, [picture(i) for i in range(images)]))

    def test_npy_and_its_paths(self, here, checkpoint):
        names = [save(f"in/é {i}.png", picture(i)) for i in range(5)]
        assert run(checkpoint, *reversed(names), "--out", "out.npy", "--batch-size", 2) == 0
        assert Path("out.paths.txt").read_text(encoding="utf-8").splitlines() == names[::-1]
        check(np.load("out.npy"), expected(checkpoint, [picture(i) for i in range(4, -1, -1)]))
        assert sorted(os.listdir()) == ["in", "out.npy", "out.paths.txt"]

    @pytest.mark.parametrize(
        ("out", "existing"), [("out.parquet", "out.parquet"), ("out.npy", "out.npy"), ("out.npy", "out.paths.txt")]
    )
    def test_existing_output_needs_force(self, here, checkpoint, capsys, monkeypatch, out, existing):
        save("a.png", picture(0))
        Path(existing).write_text("precious")
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "Encoder", lambda args: pytest.fail("the model was loaded first"))
            assert run(checkpoint, "a.png", "--out", out) == 2
        assert f"{existing} exists" in capsys.readouterr().err
        assert Path(existing).read_text() == "precious"
        assert sorted(os.listdir()) == sorted(["a.png", existing])
        assert run(checkpoint, "a.png", "--out", out, "--force") == 0
        assert b"precious" not in Path(existing).read_bytes()

    @pytest.mark.parametrize(
        ("out", "message"),
        [
            ("out.csv", "expected a name that ends in .parquet or .npy"),
            ("a.png/", "a.png is a file; --out names a folder"),
            ("nowhere/out.parquet", "its folder does not exist"),
            ("folder.npy", "folder.npy is a folder"),
        ],
    )
    def test_an_impossible_output_is_refused_before_the_model_loads(
        self, here, checkpoint, capsys, monkeypatch, out, message
    ):
        save("a.png", picture(0))
        Path("folder.npy").mkdir()
        monkeypatch.setattr(encoder, "Encoder", lambda args: pytest.fail("the model was loaded first"))
        assert run(checkpoint, "a.png", "--out", out, "--force") == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize("out", ["out.parquet", "out.npy"])
    @pytest.mark.parametrize("force", [False, True])
    def test_a_failure_midway_leaves_everything_as_it_was(self, here, checkpoint, monkeypatch, out, force):
        names = [save(f"{i}.png", picture(i)) for i in range(6)]
        if force:
            Path(out).write_text("precious")
        before = {path: path.read_bytes() for path in Path().iterdir()}
        call, calls = encoder.Encoder.__call__, []

        def failing(self, inputs, model):
            calls.append(len(inputs["pixel_values"]))
            if len(calls) == 3:
                assert any(path.suffix == ".part" for path in Path().iterdir())
                raise ZeroDivisionError
            return call(self, inputs, model)

        monkeypatch.setattr(sinks, "ROW_GROUP", 1)
        monkeypatch.setattr(encoder.Encoder, "__call__", failing)
        with pytest.raises(ZeroDivisionError):
            run(checkpoint, *names, "--out", out, "--batch-size", 2, *["--force"] * force)
        assert calls == [2, 2, 2]
        assert {path: path.read_bytes() for path in Path().iterdir()} == before

    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (KeyboardInterrupt(), 130, "siglip-fast: interrupted"),
            (OSError(28, "No space left on device"), 2, "No space left on device"),
            (torch.OutOfMemoryError("CUDA out of memory."), 2, "Try a smaller --batch-size"),
        ],
    )
    def test_foreseeable_failures_are_one_line(self, here, checkpoint, capsys, monkeypatch, error, status, message):
        save("a.png", picture(0))

        def fail(self, *args, **kwargs):
            raise error

        target = sinks.ParquetSink if isinstance(error, OSError) else transformers.SiglipVisionModel
        monkeypatch.setattr(target, "write" if isinstance(error, OSError) else "__call__", fail)
        assert run(checkpoint, "a.png", "--out", "out.parquet") == status
        err = capsys.readouterr().err
        assert message in err.splitlines()[-1]
        assert "Traceback" not in err
        assert os.listdir() == ["a.png"]
