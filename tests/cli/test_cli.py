"""`siglip-fast embed` and `demo`: what they write, what they refuse, and what a failure leaves behind."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from transformers import SiglipVisionConfig

from siglip_fast.cli import demo
from siglip_fast.cli.main import main
from siglip_fast.feed import encoder, paths, sinks
from siglip_fast.models.variants import VARIANTS, UnknownVariantError, config_for

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
# Not SigLIP's defaults, so that a processor whose file nobody reads fails the tests.
PROCESSOR = {"resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2]}
DEFAULTS = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def make_checkpoint(folder: Path, processor: dict | None = PROCESSOR, **config) -> Path:
    torch.manual_seed(1)
    model = transformers.SiglipVisionModel(SiglipVisionConfig(**TINY | config))
    with torch.no_grad():
        for parameter in model.parameters():  # Hugging Face's own are zero or tiny in places
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    if processor is not None:
        settings = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings | processor))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_variant(monkeypatch) -> str:
    monkeypatch.setitem(VARIANTS, "tiny-patch8-32", TINY)
    return "tiny-patch8-32"


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: str | Path, pixels: np.ndarray) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def expected(checkpoint: Path, images: list[np.ndarray], processor=PROCESSOR, pool="head", dtype=None):
    """Stock transformers on RGB pixels, with the preprocessing written out."""
    mean, std = (np.float32(processor[key]) for key in ("image_mean", "image_std"))
    batch = [
        (np.float32(Image.fromarray(image).resize((32, 32), processor["resample"])) / 255 - mean) / std
        for image in images
    ]
    model = transformers.SiglipVisionModel.from_pretrained(checkpoint).to(dtype or torch.float32).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2))
    return (output.pooler_output if pool == "head" else output.last_hidden_state.mean(1)).float().numpy()


def run(checkpoint: Path | None, *args: object) -> int:
    model = ["--model", str(checkpoint)] if checkpoint else []
    return main(["embed", "--device", "cpu", *model, *map(str, args)])


def read(path: str | Path) -> tuple[list[str], np.ndarray]:
    table = parquet.read_table(path)
    return table["path"].to_pylist(), np.array(table["embedding"].to_pylist(), dtype=np.float32)


def check(rows: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    assert rows.shape == wanted.shape
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    if len(wanted) > 1:  # images that look alike to the model would hide a wrong order
        distance = np.abs(wanted[:, None] - wanted[None]).max(-1) + np.eye(len(wanted)) * 1e9
        assert distance.min() > 10 * tolerance * np.abs(wanted).max()


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


class TestModels:
    def test_random_weights_are_seeded_and_loud(self, here, tiny_variant, capsys):
        names = [save(f"{i}.png", picture(i)) for i in range(2)]
        assert run(None, *names, "--random-weights", tiny_variant, "--seed", 5, "--out", "out.parquet") == 0
        assert "!!!  RANDOM WEIGHTS: tiny-patch8-32, seed 5, not trained." in capsys.readouterr().err
        metadata = parquet.read_schema("out.parquet").metadata
        assert metadata[b"model"] == b"tiny-patch8-32" and metadata[b"random_weights"] == b"seed 5"
        torch.manual_seed(5)
        transformers.SiglipVisionModel(SiglipVisionConfig(**TINY)).save_pretrained("stock")
        check(read("out.parquet")[1], expected(here / "stock", [picture(0), picture(1)], processor=DEFAULTS))

    def test_exactly_one_model_is_asked_for(self, here, checkpoint):
        for args in ([], ["--model", str(checkpoint), "--random-weights", "base-patch16-224"]):
            with pytest.raises(SystemExit) as exit:
                run(None, "a.png", "--out", "out.npy", *args)
            assert exit.value.code == 2

    def test_unknown_variants_list_the_known(self, here, capsys):
        save("a.png", picture(0))
        assert run(None, "a.png", "--random-weights", "huge-patch1-1", "--out", "out.npy") == 2
        err = capsys.readouterr().err
        assert "'huge-patch1-1'" in err and "so400m-patch14-384" in err
        with pytest.raises(UnknownVariantError):
            config_for("base-patch16")

    def test_every_variant_has_a_config(self):
        assert len(VARIANTS) == 17
        for name, sizes in VARIANTS.items():
            config = config_for(name)
            assert name.endswith(f"-patch{config.patch_size}-{config.image_size}")
            assert config.hidden_size % config.num_attention_heads == 0
            assert {key: getattr(config, key) for key in sizes} == sizes
        assert config_for("so400m-patch14-384").intermediate_size == 4304

    def test_pool_mean_for_a_model_without_head(self, here, capsys):
        checkpoint = make_checkpoint(here / "headless", vision_use_head=False)
        names = [save(f"{i}.png", picture(i)) for i in range(2)]
        assert run(checkpoint, *names, "--out", "out.parquet") == 2
        assert "has no pooling head: use --pool mean" in capsys.readouterr().err
        assert not Path("out.parquet").exists()
        assert run(checkpoint, *names, "--out", "out.parquet", "--pool", "mean") == 0
        check(read("out.parquet")[1], expected(checkpoint, [picture(0), picture(1)], pool="mean"))

    def test_bfloat16(self, here, checkpoint):
        names = [save(f"{i}.png", picture(i)) for i in range(2)]
        assert run(checkpoint, *names, "--out", "out.parquet", "--dtype", "bfloat16") == 0
        rows = read("out.parquet")[1]
        full = expected(checkpoint, [picture(0), picture(1)])
        stock = expected(checkpoint, [picture(0), picture(1)], dtype=torch.bfloat16)
        assert 1e-6 < np.linalg.norm(rows - full) <= 2 * np.linalg.norm(stock - full)
        assert parquet.read_schema("out.parquet").metadata[b"dtype"] == b"bfloat16"

    def test_the_stock_path_tells_why_it_ran(self, here, capsys):
        checkpoint = make_checkpoint(here / "relu", hidden_act="relu")
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.parquet") == 0
        assert "ran on: stock transformers, because " in capsys.readouterr().out
        assert b"stock transformers, because" in parquet.read_schema("out.parquet").metadata[b"backend"]
        check(read("out.parquet")[1], expected(checkpoint, [picture(0)]))

    def test_a_checkpoint_with_its_text_tower(self, here, capsys):
        text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=TINY)
        model = transformers.SiglipModel(config)
        model.save_pretrained("whole")
        save("a.png", picture(0))
        assert run(Path("whole"), "a.png", "--out", "out.parquet") == 0
        err = capsys.readouterr().err
        assert "whole has no preprocessor_config.json: using SigLIP's defaults" in err
        assert "UNEXPECTED" not in err and "text_model" not in err
        check(read("out.parquet")[1], expected(here / "whole", [picture(0)], processor=DEFAULTS))

    def test_models_that_cannot_be_loaded(self, here, capsys):
        save("a.png", picture(0))
        make_checkpoint(here / "broken")
        Path("broken/model.safetensors").write_bytes(b"not weights at all")
        Path("empty").mkdir()
        bert = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        transformers.BertModel(transformers.BertConfig(vocab_size=9, **bert)).save_pretrained("bert")
        transformers.Siglip2TextConfig().save_pretrained("text")
        for name, change in {"wide": {"intermediate_size": 72}, "deep": {"num_hidden_layers": 3}}.items():
            config = json.loads((make_checkpoint(here / name) / "config.json").read_text())
            (here / name / "config.json").write_text(json.dumps(config | change))
        Path("in").mkdir()
        for model, message in {
            "broken": "cannot load broken: ",
            "empty": "empty: ",
            "/no/such/model": "/no/such/model: no such folder, and no id on the Hugging Face Hub (OWNER/NAME)",
            "in/models": "in/models: no such folder",  # in a folder that there is
            "here": "here: no such folder",
            "bert": "bert is no SigLIP model: its config has model_type 'bert'",
            "text": "text is no SigLIP model: its config has model_type 'siglip2_text_model'",
            "wide": "cannot load wide: ",
            "deep": "deep is no SigLIP vision model: lacks 16 weights such as ",
        }.items():
            capsys.readouterr()
            assert run(Path(model), "a.png", "--out", "out.parquet") == 2
            err = capsys.readouterr().err
            assert message in err.splitlines()[-1]
            assert "Traceback" not in err and "above" not in err
            if model == "wide":
                told = "[128], by the config [72]" if transformers.__version__ > "5" else "not of the config's shape"
                assert f"mlp.fc1.bias is {told}" in err.splitlines()[-1]
        assert not Path("out.parquet").exists()

    @pytest.mark.parametrize(
        ("processor", "message"),
        [
            (PROCESSOR | {"size": {"height": 16, "width": 16}}, "makes [16, 16] pixels, the model takes 32²"),
            (PROCESSOR | {"do_resize": False}, "makes [9, 8] pixels"),
            (PROCESSOR | {"image_processor_type": "CLIPImageProcessor"}, "the image processor CLIPImageProc"),
        ],
    )
    def test_a_processor_that_does_not_fit(self, here, capsys, processor, message):
        checkpoint = make_checkpoint(here / "model", processor=processor)
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.parquet") == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("args", "message"),
        [(["--device", "nonsense"], "--device nonsense: "), (["--backend", "triton"], "backend='triton' cannot")],
    )
    def test_where_it_cannot_run(self, here, checkpoint, capsys, monkeypatch, args, message):
        import triton

        from siglip_fast.backends import select

        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        select._triton_unavailable.cache_clear()
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.parquet", *args) == 2
        select._triton_unavailable.cache_clear()
        assert message in capsys.readouterr().err

    def test_options_for_ray_are_not_ignored_without_it(self, here, checkpoint, capsys):
        save("a.png", picture(0))
        assert run(checkpoint, "a.png", "--out", "out.npy", "--ray-actors", 3) == 2
        assert "--ray-actors is for --ray" in capsys.readouterr().err
        assert run(checkpoint, "a.png", "--out", "out.npy", "--part-size", 3) == 2
        assert "--part-size is for a folder" in capsys.readouterr().err
        assert os.listdir() == ["a.png"]

    def test_arguments_that_make_no_sense(self, checkpoint, capsys):
        for args in (["--batch-size", "0"], ["--workers", "-1"], ["--pool", "max"], ["--dtype", "int8"]):
            with pytest.raises(SystemExit) as exit:
                run(checkpoint, "a.png", "--out", "out.npy", *args)
            assert exit.value.code == 2
            assert args[0] in capsys.readouterr().err


CODE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from siglip_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
)
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}


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


def shared_files(process: int) -> list[str]:
    """In /dev/shm, the locks of its queues at least."""
    files = re.findall(r"/dev/shm/sem\S+", Path(f"/proc/{process}/maps").read_text())
    assert files
    return files


def wait_until_gone(group: int, shared: list[str]) -> None:
    """No process of the group is left, and none of these files."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not any(map(os.path.exists, shared))


class TestDemo:
    @pytest.fixture(autouse=True)
    def needs_the_extra(self):
        pytest.importorskip("skimage")
        pytest.importorskip("matplotlib")

    def test_agreement_is_told_and_drawn(self, here, tiny_variant, capsys):
        Path("demo.png").write_text("older")
        args = ["demo", "--out", "demo.png", "--random-weights", tiny_variant, "--device", "cpu"]
        assert main(args) == 0
        out, err = capsys.readouterr()
        assert "RANDOM WEIGHTS" in err and "random weights" in out
        assert "backend cpu" in out and "They agree." in out
        for name in demo.PHOTOS:
            cosine, difference = next(line for line in out.splitlines() if line.startswith(name)).split()[1:3]
            assert float(cosine) == pytest.approx(1, abs=1e-6) and 0 <= float(difference) < 1e-4
        speeds = out[out.index("images/s") :].splitlines()[1:4]
        assert [line.split("  ")[1] for line in speeds] == ["stock sdpa", "stock eager", "siglip_fast"]
        assert all(" times" in line for line in speeds[:2])
        with Image.open("demo.png") as image:
            assert image.format == "PNG" and min(image.size) > 900
        assert os.listdir() == ["demo.png"]

    @pytest.mark.parametrize("spoiled", demo.ATTENTIONS)
    def test_disagreement_is_status_1(self, here, tiny_variant, capsys, monkeypatch, spoiled):
        twin = demo.stock_twin

        def wrong(model, attention):
            stock = twin(model, attention)
            assert stock.config._attn_implementation == attention
            assert type(stock) is transformers.SiglipVisionModel
            if attention == spoiled:
                mlp = getattr(stock, "vision_model", stock).encoder.layers[0].mlp
                shift = torch.zeros_like(mlp.fc2.bias)
                shift[3] = 0.01
                mlp.fc2.bias = torch.nn.Parameter(mlp.fc2.bias + shift)  # ours stays as it is
            return stock

        monkeypatch.setattr(demo, "stock_twin", wrong)
        args = ["demo", "--out", "demo.png", "--random-weights", tiny_variant, "--device", "cpu"]
        assert main(args) == 1
        assert "THEY DISAGREE" in capsys.readouterr().out
        assert Path("demo.png").exists()

    def test_a_model_without_head(self, here, capsys):
        checkpoint = make_checkpoint(here / "headless", vision_use_head=False)
        assert main(["demo", "--out", "demo.png", "--model", str(checkpoint), "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        assert "pooler_output" not in out and "last_hidden_state" in out
        assert "random" not in out and "RANDOM" not in err

    def test_the_missing_extra_is_named(self, here, tiny_variant, capsys, monkeypatch):
        for module in ("skimage", "matplotlib"):
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, module, None)
                assert main(["demo", "--random-weights", tiny_variant]) == 2
            assert "pip install -e '.[demo]'" in capsys.readouterr().err
        assert os.listdir() == []

    def test_a_failure_leaves_the_older_picture(self, here, tiny_variant, monkeypatch):
        Path("demo.png").write_text("older")

        def fail(*args, **kwargs):
            raise ZeroDivisionError

        monkeypatch.setattr(demo, "draw", fail)
        with pytest.raises(ZeroDivisionError):
            main(["demo", "--out", "demo.png", "--random-weights", tiny_variant, "--device", "cpu"])
        assert os.listdir() == ["demo.png"] and Path("demo.png").read_text() == "older"

    @pytest.mark.parametrize(("error", "agree"), [(0.0, True), (9e-5, True), (2e-4, False), (np.nan, False)])
    def test_tolerance(self, error, agree):
        def outputs(error, scale):
            tokens = torch.ones(2, 4, 3)
            tokens[1, 2, 1] += error
            return {"last_hidden_state": tokens * scale, "pooler_output": torch.ones(2, 3)}

        for scale in (1, 100):  # above 1 it is relative
            assert demo.compare(["a", "b"], outputs(0, scale), outputs(error, scale))[1] == agree
        small = demo.compare(["a", "b"], outputs(0, 0.01), outputs(error, 0.01))
        assert small[1] == np.isfinite(error)

    def test_principal_colors_show_what_differs(self):
        generator = torch.Generator().manual_seed(0)
        kinds = torch.randn(2, 32, generator=generator)
        side = torch.arange(16).reshape(4, 4) % 4 >= 2  # the right half
        tokens = kinds[side.long().flatten()] + 0.01 * torch.randn(16, 32, generator=generator)
        ours, stock = demo.principal_colors(tokens, tokens.clone(), (4, 4))
        assert ours.shape == (4, 4, 3) and ours.dtype == np.uint8
        assert (ours == stock).all()
        left, right = ours[:, :2, 0].astype(int), ours[:, 2:, 0].astype(int)
        assert abs(left.mean() - right.mean()) > 200 and np.ptp(left) < 50 and np.ptp(right) < 50
        changed = tokens.clone()
        changed[5] = kinds[1]
        ours, stock = demo.principal_colors(tokens, changed, (4, 4))
        assert (ours != stock).any(axis=2).sum() == 1 and (ours[1, 1] != stock[1, 1]).any()
