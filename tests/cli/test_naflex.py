"""The commands on NaFlex checkpoints: embeddings as stock's of images of any aspect, and `info`, `demo` and `tune`."""

import copy
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import reference
import torch
import transformers
import zoo
from checkpoints import save_tiny_naflex
from embed_command import here, picture, read, run, save
from PIL import Image
from transformers import Siglip2VisionConfig

from siglip_fast.backends import torch as plain
from siglip_fast.cli import demo
from siglip_fast.cli.info import ROWS
from siglip_fast.cli.main import main
from siglip_fast.models.variants import NAFLEX
from siglip_fast.tuning import packed_cases
from siglip_fast.tuning.verify import Verifier

__all__ = ["here"]  # a fixture

SIZES = [(40, 50), (33, 200), (300, 20), (64, 64), (3, 40), (1, 1), (16, 160)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("naflex")
    save_tiny_naflex(folder)
    return folder


@pytest.fixture
def images(here) -> list[str]:
    return [save(f"in/{i}.png", picture(i, *size)) for i, size in enumerate(SIZES)]


@pytest.fixture
def tiny_variant(monkeypatch) -> str:
    monkeypatch.setitem(NAFLEX, "tiny-naflex", zoo.SIGLIP2_VISION)
    return "tiny-naflex"


def stock_rows(model: torch.nn.Module, processor, pool: str, dtype: torch.dtype) -> torch.Tensor:
    """Of SIZES by stock transformers, an image at a time: its own processor and model, and its valid rows' mean."""
    rows, model = [], copy.deepcopy(model).to(dtype)
    for i, size in enumerate(SIZES):
        image = Image.fromarray(picture(i, *size))
        inputs = processor(image, input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            output = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)})
        valid = output.last_hidden_state[0, : inputs["spatial_shapes"].prod()]
        rows.append(
            output.pooler_output[0] if pool == "head" else valid.to(torch.promote_types(dtype, torch.float32)).mean(0)
        )
    return torch.stack(rows)


class TestEmbed:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("pool", ["head", "mean"])
    def test_as_stock(self, here, images, checkpoint, capsys, pool, dtype):
        args = ["--batch-size", 3, "--pool", pool, "--dtype", dtype]
        assert run(checkpoint, *images, "--out", "out.parquet", *args) == 0
        assert f"ran on: backend cpu ({dtype} on cpu)" in capsys.readouterr().out
        paths, rows = read("out.parquet")
        assert paths == images
        kind = getattr(transformers, "Siglip2ImageProcessorPil", None) or transformers.Siglip2ImageProcessor
        stock = transformers.Siglip2VisionModel.from_pretrained(checkpoint).eval(), kind.from_pretrained(checkpoint)
        exact = stock_rows(*stock, pool, torch.float64)
        same_dtype = stock_rows(*stock, pool, DTYPES[dtype]).float()
        reference.assert_accurate(torch.from_numpy(rows), exact, same_dtype)
        distance = torch.cdist(exact, exact) + torch.eye(len(exact)) * 1e9
        assert distance.min() > 10 * np.abs(rows - exact.numpy()).max() * rows.shape[1] ** 0.5  # no two look alike

    def test_batch_invariant(self, here, images, checkpoint):
        for size in (7, 2):
            flags = ["--batch-size", size, "--batch-invariant", "--pool", "mean", "--normalize"]
            assert run(checkpoint, *images, "--out", f"of{size}.parquet", *flags) == 0
        assert np.array_equal(read("of7.parquet")[1], read("of2.parquet")[1])
        assert parquet.read_schema("of7.parquet").metadata[b"backend"] == b"backend cpu, batch invariant"

    def test_the_tower_alone_and_one_without_head(self, here, images, checkpoint, capsys):
        save_tiny_naflex(here / "alone", vision_only=True)
        save_tiny_naflex(here / "headless", vision_only=True, vision_use_head=False)
        assert run(Path("headless"), *images, "--out", "out.npy") == 2
        assert "has no pooling head: use --pool mean" in capsys.readouterr().err
        for name in ("alone", "headless"):
            assert run(Path(name), *images, "--out", f"{name}.npy", "--pool", "mean") == 0
            assert np.isfinite(np.load(f"{name}.npy")).all()

    def test_random_weights(self, here, images, tiny_variant, capsys):
        assert run(None, *images, "--random-weights", tiny_variant, "--out", "out.npy") == 0
        out, err = capsys.readouterr()
        assert "!!!  RANDOM WEIGHTS: tiny-naflex, seed 0" in err and "ran on: backend cpu" in out
        assert np.load("out.npy").shape == (len(SIZES), 64)

    def test_what_cannot_be_read_is_skipped(self, here, images, checkpoint, capsys):
        Path("in/text.png").write_text("not an image")
        assert run(checkpoint, "in", "--out", "out.parquet", "--batch-size", 2) == 1
        assert read("out.parquet")[0] == images
        assert "skipped in/text.png: cannot identify an image in it" in capsys.readouterr().err


class TestInfo:
    @pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
    def test_each_operation_is_right(self, tiny_variant, capsys, backend):
        assert main(["info", "--random-weights", tiny_variant, "--device", "cpu", "--backend", backend]) == 0
        out = capsys.readouterr().out
        assert f"runs on: backend {backend}\n" in out and "derived weights beside them: 0 MB" in out
        assert "operations on 6 images of 1 to 100 patches" in out
        assert out.count(" rows: right\n") == 11
        names = ("patch_embed_rows", "attention_segments", "attention_pool_segments", "layernorm 64x1")
        assert all(out.count(f"  {name} ") == 1 for name in names)

    def test_the_self_check_fails(self, tiny_variant, capsys, monkeypatch):
        monkeypatch.setattr("siglip_fast.backends.cpu.attention_segments", lambda qkv, segments: qkv[:, 0] * 0)
        assert main(["info", "--random-weights", tiny_variant, "--device", "cpu"]) == 1
        assert "attention_segments 4x16 float32, 282 rows: wrong: relative error" in capsys.readouterr().out


def one_more_key(segments):
    return segments._replace(keys=tuple(min(q, k + 1) for q, k in zip(segments.queries, segments.keys, strict=True)))


def longer_by_the_neighbour(segments):
    """Each attends also to the first row behind it."""
    return segments._replace(
        queries=(*(q + 1 for q in segments.queries[:-1]), segments.queries[-1]),
        keys=(*(q + 1 for q in segments.queries[:-1]), segments.keys[-1]),
    )


MISTAKES = {
    "padding is a key": ("attention_segments", lambda qkv, s: plain.attention_segments(qkv, one_more_key(s))),
    "a neighbour's row is a key": (
        "attention_segments",
        lambda qkv, s: plain.attention_segments(qkv, longer_by_the_neighbour(s)),
    ),
    "padding is pooled": (
        "attention_pool_segments",
        lambda x, pool, s: plain.attention_pool_segments(x, pool, one_more_key(s)),
    ),
    "the rows before": (
        "patch_embed_rows",
        lambda x, patch, position, rows: plain.patch_embed_rows(x, patch, position, (rows - 1).clamp(min=0)),
    ),
    "positions in another order": (
        "patch_embed_rows",
        lambda x, patch, position, rows: plain.patch_embed_rows(
            x, patch, position._replace(index=position.index.flip(0)), rows
        ),
    ),
    "rows in another order": ("layernorm", lambda x, m, norm, rows: plain.layernorm(x, m, norm, rows.flip(0))),
}


@pytest.mark.parametrize("name", MISTAKES)
@torch.no_grad()
def test_the_checks_notice(name, dtype):
    """Each by itself, in 16 bits too."""
    operation, broken = MISTAKES[name]
    device = torch.device("cpu")
    cases = packed_cases.cases(Siglip2VisionConfig(**zoo.SIGLIP2_VISION), dtype, ROWS)
    (case,) = [case for case in cases if case.operation.name == operation]
    args = packed_cases.inputs(case, device)
    verify = Verifier(case, device, args)
    assert verify(lambda: getattr(plain, operation)(*args)) is None
    assert "wrong" in verify(lambda: broken(*args))


class TestDemo:
    @pytest.fixture(autouse=True)
    def needs_the_extra(self):
        pytest.importorskip("skimage")
        pytest.importorskip("matplotlib")

    @pytest.mark.parametrize("spoiled", [None, "padding"])
    def test_agreement_in_all_rows(self, here, tiny_variant, capsys, monkeypatch, spoiled):
        twin, drawn = demo.stock_twin, []

        def spoil(module, args, kwargs, output):
            output.last_hidden_state[kwargs["pixel_attention_mask"] == 0] += 0.01
            return output

        def stock_twin(*args):
            stock = twin(*args)
            assert type(stock) is transformers.Siglip2VisionModel
            if spoiled:
                stock.register_forward_hook(spoil, with_kwargs=True)
            return stock

        monkeypatch.setattr(demo, "stock_twin", stock_twin)
        monkeypatch.setattr(demo, "draw", lambda *args, **kwargs: drawn.append(args))
        monkeypatch.setattr(demo, "REPEATS", 1)
        assert main(["demo", "--random-weights", tiny_variant, "--device", "cpu"]) == bool(spoiled)
        out = capsys.readouterr().out
        assert ("THEY DISAGREE" in out) is bool(spoiled) and "backend cpu" in out
        (_, photos, grids, _, _) = drawn[0]
        shapes = {name: photo.width / photo.height for name, photo in photos.items()}
        assert shapes["rocket"] < 0.5 and shapes["retina"] > 2 and 1.4 < shapes["coffee"] < 1.6
        for (height, width), aspect in zip(grids, shapes.values(), strict=True):
            assert height * width <= 16 and abs(np.log(width / height / aspect)) < 0.7
        assert len({*grids}) == 4

    def test_each_map_is_of_its_own_grid(self):
        kinds = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
        right = torch.arange(10).reshape(2, 5) % 5 >= 3
        tokens = kinds[right.long().flatten()] + 0.01 * torch.randn(10, 32, generator=torch.Generator().manual_seed(1))
        padded = torch.cat([tokens, torch.full((6, 32), 1e4)])
        ours, stock = demo.principal_colors(padded, padded.clone(), (2, 5))
        assert ours.shape == (2, 5, 3) and (ours == stock).all()
        assert abs(ours[:, :3, 0].mean() - ours[:, 3:, 0].mean()) > 200
        photos = {"wide": Image.new("RGB", (50, 20)), "high": Image.new("RGB", (20, 50))}
        file = io.BytesIO()
        demo.draw(file, photos, [(2, 5), (5, 2)], torch.stack([padded] * 2), torch.stack([padded] * 2), title="two")
        with Image.open(file) as image:
            assert image.format == "PNG" and min(image.size) > 500
