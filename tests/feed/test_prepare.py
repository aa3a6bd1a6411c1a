"""What becomes of an image before the model: the pixels of Hugging Face's processor, by any decoder, and the same refusals."""

import functools
import io
import pickle
import random
import sys

import numpy as np
import pytest
import torch
import transformers
from embed_command import here, make_checkpoint, picture, read, run
from PIL import Image, ImageOps, features

from siglip_fast.cli import main
from siglip_fast.errors import UserError
from siglip_fast.feed import decoders
from siglip_fast.feed.decoders import DECODERS, missing
from siglip_fast.feed.kinds import batch_of, inputs_of
from siglip_fast.feed.prepare import Prepare
from siglip_fast.feed.recipe import recipe_of

__all__ = ["here"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")
EACH_DECODER = pytest.mark.parametrize(
    "decoder",
    [pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason="missing")) for name in DECODERS],
)
FASTER = pytest.mark.parametrize(*EACH_DECODER.args[:1], EACH_DECODER.args[1][1:])


def processor(kind: str = "Siglip", **settings):
    on_pillow = getattr(transformers, f"{kind}ImageProcessorPil", None)
    return (on_pillow or getattr(transformers, f"{kind}ImageProcessor"))(**settings)


PROCESSORS = {
    "fixed": lambda: processor(size={"height": 24, "width": 32}),
    "naflex": lambda: processor("Siglip2", patch_size=4, max_num_patches=30),
}


@functools.cache
def photograph(name: str) -> Image.Image:
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    return Image.fromarray(getattr(data, name)())


def photo(height: int, width: int, name: str = "astronaut") -> Image.Image:
    return photograph(name).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG", orientation: int | None = None, **settings) -> bytes:
    file = io.BytesIO()
    if orientation is not None:
        settings["exif"] = Image.Exif()
        settings["exif"][0x0112] = orientation
    image.save(file, format, **settings)
    return file.getvalue()


def upright(source: bytes) -> Image.Image:
    """Straight from the book: every step a copy."""
    image = Image.open(io.BytesIO(source))
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode == "I":
        upright = Image.fromarray(np.round(np.asarray(upright) / 257).astype(np.uint8))
    return upright.convert("RGB")


def for_the_model(prepare: Prepare, source: bytes) -> dict[str, torch.Tensor]:
    """A batch of one, normalised where that is left to the model."""
    batch = batch_of([prepare(source)])
    batch = prepare.recipe.ready(batch)
    if batch["pixel_values"].dtype == torch.uint8:
        batch["pixel_values"] = prepare.recipe.normalization(batch["pixel_values"])
    return batch


@functools.cache
def many_images() -> dict[str, bytes]:
    base = photo(67, 45)
    gray16 = Image.fromarray((np.asarray(base.convert("L")).astype(np.uint16) * 257 + 3).astype(np.uint16))
    made = {f"mode {mode}": encoded(base.convert(mode)) for mode in ("RGB", "L", "LA", "P", "RGBA", "1")}
    made |= {
        f"{h}x{w}": encoded(photo(h, w)) for h, w in ((1, 1), (1, 90), (200, 2), (3, 3), (24, 32), (400, 41), (41, 400))
    }
    made |= {f"orientation {i}": encoded(photo(67, 45), "JPEG", i) for i in range(1, 9)}
    made |= {f"tall, orientation {i}": encoded(photo(300, 40), "JPEG", i) for i in (3, 6, 8)}
    made |= {
        "PNG, turned": encoded(base, "PNG", 6),
        "TIFF, turned": encoded(base, "TIFF", 8),
        "GIF": encoded(base, "GIF"),
    }
    made |= {"no such orientation": encoded(base, "JPEG", 9), "16 bits": encoded(gray16)}
    made |= {
        "palette": encoded(base.quantize(9), transparency=3),
        "half clear": encoded(base.quantize(9), transparency=b"\x80" * 9),
    }
    made |= {
        "clear": encoded(base.quantize(9).convert("RGB"), transparency=base.quantize(9).convert("RGB").getpixel((5, 5)))
    }
    made |= {"CMYK": encoded(base.convert("CMYK"), "JPEG"), "CMYK TIFF": encoded(base.convert("CMYK"), "TIFF")}
    if features.check("webp"):
        made["WebP"] = encoded(base, "WEBP", 5)
    return made


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_processors_pixels(kind):
    """To float32's rounding of values of about one; the inputs that say where the pixels are exactly."""
    theirs = PROCESSORS[kind]()
    prepare = Prepare(theirs)
    assert prepare.recipe is not None and prepare.decoder == "pillow"
    for name, source in many_images().items():
        expected, actual = inputs_of(upright(source), theirs), for_the_model(prepare, source)
        assert expected.keys() == actual.keys(), name
        for key, values in expected.items():
            assert values.dtype == actual[key].dtype and values.shape == actual[key][0].shape, name
            assert (values - actual[key][0]).abs().max() <= 1.2e-7, name
        pixels = prepare(source)["pixel_values"]
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()


@pytest.mark.parametrize("resample", Image.Resampling)
def test_orientation_and_every_filter(resample):
    """Bits, also where an image is mirrored after it was resized; noise, in which nothing is symmetric."""
    prepare = Prepare(processor(size={"height": 24, "width": 32}, resample=int(resample)))
    for orientation in range(1, 9):
        for size in ((50, 41), (90, 200), (13, 7), (151, 20)):
            source = encoded(Image.fromarray(picture(orientation, *size)), "PNG", orientation)
            expected = np.array(upright(source).resize((32, 24), resample)).transpose(2, 0, 1)
            assert np.array_equal(prepare(source)["pixel_values"].numpy(), expected), (orientation, size)


@EACH_DECODER
def test_nothing_is_copied_or_converted(decoder, monkeypatch):
    """Of an upright RGB image, whose pixels Pillow has once and the model's size of them once more."""
    prepare, source = Prepare(processor(), decoder), encoded(photo(700, 600), "JPEG", 1)
    for name in ("copy", "convert", "transpose", "__array_interface__"):
        monkeypatch.setattr(Image.Image, name, property(lambda image, name=name: pytest.fail(name)))
    assert prepare(source)["pixel_values"].shape == (3, 224, 224)


class TestOtherProcessors:
    """They run themselves."""

    @pytest.mark.parametrize(
        "settings",
        [
            {"do_rescale": False},
            {"do_normalize": False},
            {"do_resize": False},
            {"do_center_crop": True, "crop_size": {"height": 20, "width": 20}},
            {"do_pad": True, "pad_size": {"height": 300, "width": 300}},
            {"size": {"shortest_edge": 30}},
            {"image_mean": 0.5, "image_std": 0.5},
        ],
        ids=lambda settings: next(iter(settings)),
    )
    def test_settings(self, settings):
        assert recipe_of(processor(**settings)) is None

    def test_nor_is_naflex_without_resizing(self):
        assert recipe_of(processor("Siglip2", do_resize=False)) is None
        assert recipe_of(processor("Siglip2", do_convert_rgb=True)) is not None

    def test_another_class(self):
        class SiglipImageProcessor(type(processor())):
            pass

        assert recipe_of(SiglipImageProcessor()) is None
        assert recipe_of(processor("CLIP")) is None

    @pytest.mark.parametrize("kind", PROCESSORS)
    @pytest.mark.parametrize("of", ["class", "instance"])
    def test_a_method_was_replaced(self, kind, of, monkeypatch):
        theirs = PROCESSORS[kind]()
        rescale = type(theirs).rescale
        changed = type(theirs) if of == "class" else theirs
        args = (lambda args: args) if of == "class" else (lambda args: (theirs, *args))
        monkeypatch.setattr(changed, "rescale", lambda *a, **kwargs: rescale(*args(a), **kwargs) * 0.99)
        assert recipe_of(theirs) is None

    def test_it_makes_the_inputs(self):
        theirs = processor(
            size={"height": 24, "width": 32}, do_rescale=False, image_mean=[90.0] * 3, image_std=[60.0] * 3
        )
        source = encoded(photo(40, 50), "JPEG", 6)
        inputs = Prepare(theirs)(source)
        assert torch.equal(inputs["pixel_values"], inputs_of(upright(source), theirs)["pixel_values"])
        assert Prepare(theirs, "auto").decoder == "pillow"

    @pytest.mark.parametrize("options", [{"decoder": "torch"}, {"draft": True}])
    def test_a_faster_decoder_is_refused(self, options):
        with pytest.raises(UserError, match=rf"--{next(iter(options))}.*does more than resize"):
            Prepare(processor(do_rescale=False), **options)


def levels(a: Prepare, b: Prepare, source: bytes) -> np.ndarray:
    """How far apart, of 255."""
    return (a(source)["pixel_values"].int() - b(source)["pixel_values"].int()).abs().numpy()


def outcome(prepare: Prepare, source: bytes | str) -> tuple[type, str] | None:
    """How it was refused, if it was."""
    try:
        prepare(source)
    except Exception as error:
        return type(error), str(error)


class TestDecoders:
    @FASTER
    @pytest.mark.parametrize("kind", PROCESSORS)
    def test_within_a_level_of_pillow(self, decoder, kind):
        """Images of all kinds, most of them shrunk by more than two."""
        exact, fast = Prepare(PROCESSORS[kind]()), Prepare(PROCESSORS[kind](), decoder)
        for name, source in many_images().items():
            assert levels(exact, fast, source).max() <= 1, name

    @FASTER
    @pytest.mark.parametrize("resample", [2, 3])
    @pytest.mark.parametrize("factors", [(0.1, 0.99), (1, 2), (2, 20)], ids=["enlarged", "a little smaller", "shrunk"])
    def test_sizes(self, decoder, resample, factors):
        """Photographs, noise and checks. Where the target is of at most half the size, never more than one level; where it
        is larger, one value in some hundred thousand may differ by two; where the image has to grow, Pillow resizes it."""
        rng, size = random.Random(0), {"height": 48, "width": 40}
        exact, fast = (Prepare(processor(size=size, resample=resample), name) for name in ("pillow", decoder))
        apart = []
        for name in ("astronaut", "coffee", "noise", "checks") * 4:
            height, width = (max(1, int(side * rng.uniform(*factors))) for side in size.values())
            if name == "noise":
                image = Image.fromarray(picture(height, height, width))
            elif name == "checks":
                image = Image.fromarray(np.indices((height, width)).sum(0).astype(np.uint8) % 2 * 255)
            else:
                image = photo(height, width, name)
            apart.append(levels(exact, fast, encoded(image, "JPEG", rng.randint(1, 8), quality=95)).flatten())
        apart = np.concatenate(apart)
        assert apart.max() <= (2 if factors[0] == 1 else factors[0] == 2)
        assert (apart > 1).mean() <= 1e-4 and (apart > 0).any() == (factors[0] >= 1)

    @FASTER
    def test_as_tall_as_it_gets(self, decoder):
        """Pillow 13 resizes columns before rows where that is cheaper, torch never does by itself: up to six levels."""
        exact, fast = (Prepare(processor(), name) for name in ("pillow", decoder))
        for orientation in (1, 2, 6, 7):
            for size in ((900, 225), (230, 1300)):
                source = encoded(photo(*size), "JPEG", orientation, quality=95)
                apart = levels(exact, fast, source)
                assert apart.max() <= 2 and (apart > 1).mean() <= 1e-4, (orientation, size)

    @EACH_DECODER
    def test_jpegs_of_all_kinds(self, decoder):
        base = photo(150, 130)
        kinds = {
            "progressive": encoded(base, "JPEG", progressive=True),
            "4:4:4": encoded(base, "JPEG", subsampling=0),
            "4:2:0": encoded(base, "JPEG", subsampling=2),
            "gray": encoded(base.convert("L"), "JPEG"),
            "not YCbCr": encoded(base, "JPEG", keep_rgb=True),
            "CMYK": encoded(base.convert("CMYK"), "JPEG"),
            "MPO": encoded(base, "MPO", save_all=True, append_images=[photo(20, 20, "coffee")]),
            "text behind it": encoded(base, "JPEG") + b"text",
        }
        exact, fast = (Prepare(processor(size={"height": 24, "width": 32}), name) for name in ("pillow", decoder))
        for name, source in kinds.items():
            with Image.open(io.BytesIO(source)) as image:
                decoded = decoders._decoded(image, decoder, exact.recipe).numpy()[..., :3]
            assert np.array_equal(decoded, np.asarray(upright(source))), name
            assert levels(exact, fast, source).max() <= 1, name

    @EACH_DECODER
    def test_the_same_refusals(self, decoder, tmp_path):
        """Type and text, from bytes and from files; whatever a decoder finds in them, Pillow has the last word."""
        whole = encoded(photo(150, 130), "JPEG")
        sources = {f"cut at {i}": whole[:i] for i in (1, 3, 20, 300, len(whole) // 2, len(whole) - 30, len(whole) - 2)}
        sources |= {
            f"progressive, cut at {i}": encoded(photo(150, 130), "JPEG", progressive=True)[:i] for i in (900, 2000)
        }
        sources |= {"PNG": encoded(photo(20, 30))[:300], "nothing": b"", "text": b"text" * 50, "zeros": bytes(1000)}
        sources |= {
            "float": encoded(Image.new("F", (9, 9)), "TIFF"),
            "spoiled": whole[:900] + b"\xff\xd9" + whole[900:],
        }
        exact, fast = (Prepare(processor(), name) for name in ("pillow", decoder))
        refused = 0
        for name, content in sources.items():
            (tmp_path / "file").write_bytes(content)
            for source in (content, str(tmp_path / "file")):
                outcomes = [outcome(prepare, source) for prepare in (exact, fast)]
                assert outcomes[0] == outcomes[1], name
                refused += outcomes[0] is not None
        assert refused >= 2 * (len(sources) - 2)

    @EACH_DECODER
    def test_too_large_to_be_true(self, decoder, monkeypatch):
        source, prepare = encoded(photo(20, 30), "JPEG"), Prepare(processor(), decoder)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        with pytest.raises(Image.DecompressionBombError):
            prepare(source)

    @EACH_DECODER
    def test_images_of_more_than_a_block(self, decoder):
        """Pillow cuts what is larger than 16 MB."""
        prepare = Prepare(processor(size={"height": 8, "width": 8}), decoder)
        pixels = prepare(encoded(Image.new("RGB", (2400, 2000), (200, 100, 50)), "JPEG"))["pixel_values"]
        assert (pixels.flatten(1).float().mean(1) - torch.tensor([200.0, 100, 50])).abs().max() < 2

    def test_what_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
        with pytest.raises(UserError, match=r"--decoder simplejpeg: .*pip install -e '.\[fast\]'"):
            Prepare(processor(), "simplejpeg")
        monkeypatch.setattr(decoders, "_shared", lambda image: (_ for _ in ()).throw(ValueError("two blocks\nor more")))
        with pytest.raises(UserError, match="--decoder torch: Pillow .* does not share its memory: two blocks$"):
            Prepare(processor(), "torch")
        assert Prepare(processor(), "auto").decoder == "pillow"

    def test_auto_is_what_took_the_least_time(self, monkeypatch):
        prepare = Prepare(processor(), "auto")
        assert set(prepare.milliseconds) == {name for name in DECODERS if not missing(name)}
        assert prepare.milliseconds[prepare.decoder] == min(prepare.milliseconds.values())
        resized, clock = decoders.resized, iter(range(1000))

        def slow(image, recipe, decoder):
            seconds = {"pillow": 1, "torch": 3, "simplejpeg": 2}[decoder]
            [next(clock) for _ in range(seconds)]
            return resized(image, recipe, decoder)

        monkeypatch.setattr(decoders, "resized", slow)
        monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
        assert Prepare(processor(), "auto").decoder == "pillow"

    @EACH_DECODER
    @pytest.mark.parametrize("kind", PROCESSORS)
    def test_sent_to_another_process(self, decoder, kind):
        prepare, source = Prepare(PROCESSORS[kind](), decoder), encoded(photo(200, 150), "JPEG", 6)
        copy = pickle.loads(pickle.dumps(prepare))
        for name, values in prepare(source).items():
            assert torch.equal(copy(source)[name], values)


class TestDraft:
    SIZE = {"height": 24, "width": 32}

    @EACH_DECODER
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_a_fraction_of_at_least_twice_the_size(self, decoder, orientation, monkeypatch):
        seen = []
        for name in ("_by_pillow", "_by_torch"):
            by = getattr(decoders, name)
            monkeypatch.setattr(decoders, name, lambda image, *args, by=by: (seen.append(image), by(image, *args))[1])
        source = encoded(photo(400, 250), "JPEG", orientation)
        plain, draft = (Prepare(processor(size=self.SIZE), decoder, draft=draft)(source) for draft in (False, True))
        sizes = [image.size[::-1] if isinstance(image, Image.Image) else tuple(image.shape[:2]) for image in seen]
        assert sizes == [(400, 250), (200, 125) if orientation == 1 else (100, 63)]
        apart = (plain["pixel_values"].int() - draft["pixel_values"].int()).abs()
        assert 0 < apart.max() < 15 and apart.float().mean() < 1

    @EACH_DECODER
    def test_what_is_small_or_no_jpeg_stays(self, decoder):
        for source in (encoded(photo(90, 100), "JPEG"), encoded(photo(130, 150))):
            plain, draft = (Prepare(processor(size=self.SIZE), decoder, draft=draft)(source) for draft in (False, True))
            assert torch.equal(plain["pixel_values"], draft["pixel_values"])

    def test_naflex_keeps_the_grid_of_the_whole_image(self):
        source = encoded(photo(401, 203), "JPEG", 8)
        plain, draft = (Prepare(PROCESSORS["naflex"](), draft=draft)(source) for draft in (False, True))
        assert torch.equal(plain["spatial_shapes"], draft["spatial_shapes"])
        assert not torch.equal(plain["pixel_values"], draft["pixel_values"])


class TestCommand:
    @EACH_DECODER
    def test_embeddings(self, here, decoder, capsys):
        """Of those that a level apart would not show in, and of the decoder that is told in the file."""
        import pyarrow.parquet as parquet

        checkpoint = make_checkpoint(here / "checkpoint")
        names = [f"{i}.jpg" for i in range(3)]
        for i, name in enumerate(names):
            photo(90 + i, 120, ("astronaut", "coffee", "rocket")[i]).save(name)
        for choice in ("pillow", decoder):
            assert run(checkpoint, *names, "--out", f"{choice}.parquet", "--decoder", choice, "--force") == 0
        rows = [read(f"{choice}.parquet")[1] for choice in ("pillow", decoder)]
        assert np.abs(rows[0] - rows[1]).max() <= 0.02 * np.abs(rows[0]).max()
        assert parquet.read_schema(f"{decoder}.parquet").metadata[b"decoder"] == decoder.encode()
        assert "decoder" not in capsys.readouterr().err

    def test_every_decoder_can_be_named(self):
        for name in (*DECODERS, "auto"):
            args = ["embed", "a", "--out", "b.npy", "--model", "c", "--decoder", name]
            assert main._parser().parse_args(args).decoder == name

    def test_auto_and_draft(self, here, capsys):
        import pyarrow.parquet as parquet

        photo(300, 400).save("a.jpg")
        assert run(make_checkpoint(here / "c"), "a.jpg", "--out", "out.parquet", "--decoder", "auto", "--draft") == 0
        chosen, _, draft = parquet.read_schema("out.parquet").metadata[b"decoder"].decode().partition(", ")
        assert chosen in DECODERS and draft == "draft"
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "ms a megapixel here" in line]
        assert line.startswith(f"siglip-fast: decoder {chosen}: of pillow ")
