"""Images a second that a core prepares for the model: each decoder, beside what it took before and beside bare libraries.

    python bench/feed.py [--rounds 9] [--json OUT] [--markdown docs/feed.md] [--plot docs/feed.png]

Photographs that come with scikit-image, side by side in their own resolution, fill 256×256, 1152×864 and 4000×3000 pixels; and
one of them, enlarged, is as smooth as what a camera makes: JPEGs of it are half as large, and take less time to decode.
Each candidate has a process of its own, as it would have in use: what others leave in the allocator makes it a fifth faster or
slower. In every round each has its turn, one after the other. Milliseconds are medians of processor time, so that another job
counts little and threads gain nothing; ratios are medians of the rounds' ratios. The peer `before` is what `siglip-fast embed`
did first: Pillow, a copy for EXIF, one for RGB, and Hugging Face's image processor. Pixels are compared in the same run, as
levels of 255. No model runs but for the last table, whose weights are random.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
from PIL import Image, ImageOps
from skimage import data
from torch import Tensor

from siglip_fast.errors import UserError
from siglip_fast.feed.decoders import DECODERS, missing
from siglip_fast.feed.kinds import batch_of, inputs_of, kind_of
from siglip_fast.feed.loading import load_processor
from siglip_fast.feed.prepare import Prepare
from siglip_fast.feed.recipe import Recipe, recipe_of
from siglip_fast.files import atomic
from siglip_fast.models.variants import config_for

VARIANTS = {"224²": "base-patch16-224", "NaFlex": "base-patch16-naflex"}
PHOTOS = ("astronaut", "coffee", "rocket", "chelsea", "hubble_deep_field", "retina")  # in scikit-image's wheel
SIZES = {"256²": (256, 256), "1 MP": (1152, 864), "12 MP": (4000, 3000)}
FORMATS = {"JPEG": {"quality": 90}, "PNG": {}, "WebP": {"quality": 90}}
TARGETS = {  # times `before`, of JPEGs at 224²
    ("pillow", "1 MP"): 2.2,
    ("pillow", "12 MP"): 2.0,
    ("simplejpeg", "256²"): 3.0,
    ("simplejpeg", "1 MP"): 4.5,
    ("simplejpeg", "12 MP"): 3.5,
}
SMOOTH = ", smooth"
LEAST_SECONDS = 0.1  # of a turn: several images where one is small, or it would find the caches as others left them
BEFORE, BARE, TORCHVISION = "before", "Pillow bare", "torchvision"
HEAD = """# What a core prepares for the model

`siglip-fast embed` decodes and resizes images by one of four names:

| `--decoder` | decodes | resizes | pixels |
|---|---|---|---|
| `pillow`, the default | Pillow | Pillow | those of Hugging Face's image processor, bit for bit |
| `torch` | Pillow | torch, antialiased | within one level of 255 |
| `simplejpeg` | JPEGs: libjpeg-turbo by simplejpeg (`pip install -e '.[fast]'`); others: Pillow | torch | as `torch` |
| `auto` | the fastest of these on this machine, measured at the start and told | | |

One level holds where the image is at least twice as large as what the model takes, on both sides. Nearer to it about one value
in 100,000 differs by two; an image that has to grow is resized by Pillow. Where several machines have to agree to the bit, name
a decoder instead of `auto`. Broken files are refused with Pillow's words by all of them. An image processor that does more than resize, rescale and
normalise runs as it is, and only `pillow` goes with it.

`--draft` decodes a JPEG at a half, a quarter or an eighth of its size, where that is at least twice what the model takes. It changes
pixels; the last table says how much.

## How this was measured

Made by `python bench/feed.py --rounds ROUNDS --markdown docs/feed.md --plot docs/feed.png`, whose first lines say how. *before* is what `embed` did
until these decoders: Pillow, a copy for EXIF, one for RGB, and Hugging Face's image processor.
""".splitlines()
Run = Callable[[bytes], Tensor]  # to uint8 pixels [3, h, w] or NaFlex's rows, or to normalised ones


def mosaic(width: int, height: int) -> Image.Image:
    """Photographs side by side and again, in their own resolution."""
    tiles = [
        np.tile(photo, (-(-height // len(photo)), 1, 1))[:height]
        for name in PHOTOS
        for photo in [getattr(data, name)()]
    ]
    row = np.concatenate(tiles, axis=1)
    return Image.fromarray(np.ascontiguousarray(np.tile(row, (1, -(-width // row.shape[1]), 1))[:, :width]))


def encoded(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **FORMATS[format])
    return file.getvalue()


def before(processor: Any) -> Run:
    def run(source: bytes) -> Tensor:
        with Image.open(io.BytesIO(source)) as image:
            return inputs_of(ImageOps.exif_transpose(image).convert("RGB"), processor)["pixel_values"]

    return run


def pillow_bare(recipe: Recipe) -> Run:
    def run(source: bytes) -> Tensor:
        image = Image.open(io.BytesIO(source))
        height, width = recipe.target(image.height, image.width)
        return torch.from_numpy(np.array(image.resize((width, height), recipe.resample)))

    return run


def torchvision_bare(recipe: Recipe) -> Run:
    """Raises ImportError or RuntimeError where torchvision is not installed, or was built for another torch."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    mode = {2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}[recipe.resample]

    def run(source: bytes) -> Tensor:
        image = decode_image(torch.frombuffer(bytearray(source), dtype=torch.uint8), ImageReadMode.RGB)
        return resize(image, list(recipe.target(*image.shape[1:])), mode, antialias=True)

    return run


def ours(processor: Any, name: str) -> Run:
    decoder, _, draft = name.partition(", ")
    prepare = Prepare(processor, decoder, bool(draft))
    return lambda source: prepare(source)["pixel_values"]


class Candidate:
    """In a process of its own, which has one core and one thread but where it is asked for all cores."""

    def __init__(self, name: str, variant: str):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(name, variant))
        self.missing: str | None = self._process.submit(_why_missing).result()

    def __call__(self, function: Callable, *args: Any) -> Any:
        return self._process.submit(function, *args).result()

    def end(self) -> None:
        self._process.shutdown()


_state: dict[str, Any] = {}  # of a candidate's process


def _begin(name: str, variant: str) -> None:
    torch.set_num_threads(1)
    processor = load_processor(None, kind_of(config_for(variant)))
    recipe = recipe_of(processor)
    _state.update(recipe=recipe, missing=None)
    makers = {BEFORE: (before, processor), BARE: (pillow_bare, recipe), TORCHVISION: (torchvision_bare, recipe)}
    maker, *args = makers.get(name, (ours, processor, name))
    try:
        _state["run"] = maker(*args)
    except (ImportError, RuntimeError, UserError) as error:
        _state["missing"] = str(error).splitlines()[0]


def _why_missing() -> str | None:
    return _state["missing"]


def _levels(source: bytes) -> Tensor:
    """uint8 as it is, normalised pixels as they were: SigLIP's mean, deviation and factor are the same for all channels."""
    values, (mean, std, factor) = _state["run"](source), _state["recipe"].normalization
    return values.int() if values.dtype == torch.uint8 else ((values * std[0] + mean[0]) / factor).round().int()


def _timed(source: bytes, calls: int = 1) -> float:
    """Processor seconds a call."""
    start = time.process_time()
    for _ in range(calls):
        _state["run"](source)
    return (time.process_time() - start) / calls


def _on_all_cores(source: bytes, images: int) -> float:
    """Images a second of as many threads as there are cores for this process."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        start = time.perf_counter()
        list(pool.map(_state["run"], [source] * images))
        return images / (time.perf_counter() - start)


def compare(sources: dict[tuple[str, str], bytes], variant: str, rounds: int) -> tuple[list[dict], dict[str, str]]:
    """A row a size, format and candidate: milliseconds on one core, images/s on all, and how far its pixels are from before;
    and why others are missing."""
    names = (BEFORE, BARE, TORCHVISION, *DECODERS, *(f"{decoder}, draft" for decoder in (DECODERS[0], DECODERS[-1])))
    processes = [Candidate(name, variant) for name in names]
    rows = []
    for (size, format), source in sources.items():
        entered = [c for c in processes if not c.missing and (format == "JPEG" or not c.name.endswith("draft"))]
        exact, seconds, rates = entered[0](_levels, source), defaultdict(list), defaultdict(list)
        calls = {c.name: math.ceil(LEAST_SECONDS / min(c(_timed, source) for _ in range(2))) for c in entered}
        for _ in range(rounds):
            for candidate in entered:
                seconds[candidate.name].append(candidate(_timed, source, calls[candidate.name]))
        slowest = statistics.median(seconds[BEFORE])
        for _ in range(3):
            for candidate in entered:
                rates[candidate.name].append(candidate(_on_all_cores, source, math.ceil(0.3 / slowest) + 1))
        for candidate in entered:
            name = candidate.name
            of_one = statistics.median(seconds[name])
            row = {"size": size, "format": format, "candidate": name, "milliseconds": 1e3 * of_one}
            row |= {"images_per_second": 1 / of_one, "all_cores": statistics.median(rates[name])}
            row["times_before"] = statistics.median(a / b for a, b in zip(seconds[BEFORE], seconds[name], strict=True))
            pixels = candidate(_levels, source)
            if pixels.shape == exact.shape:  # bare rows are not cut into patches
                used = exact != exact[-1] if pixels.ndim == 2 else slice(None)
                apart = (pixels - exact).abs()[used]
                row |= {"levels": int(apart.max()), "share_above_one": float((apart > 1).float().mean())}
            rows.append(row)
            print(
                f"{variant} {size} {format}: {name} {row['milliseconds']:.2f} ms, ×{row['times_before']:.2f}",
                flush=True,
            )
    for candidate in processes:
        candidate.end()
    return rows, {candidate.name: candidate.missing for candidate in processes if candidate.missing}


def profile(source: bytes, rounds: int) -> list[dict]:
    """Where the time for one JPEG goes: milliseconds of each step, before and now."""
    torch.set_num_threads(1)
    processor = load_processor(None, kind_of(config_for(VARIANTS["224²"])))
    decoded = Image.open(io.BytesIO(source))
    decoded.load()
    upright, fast = ImageOps.exif_transpose(decoded), Prepare(processor)
    steps = {
        ("before", "decode"): lambda: Image.open(io.BytesIO(source)).load(),
        ("before", "copy for EXIF"): lambda: ImageOps.exif_transpose(decoded),
        ("before", "copy for RGB"): lambda: upright.convert("RGB"),
        ("before", "image processor: copies, resize, float32"): lambda: inputs_of(upright, processor),
        ("pillow", "decode"): lambda: Image.open(io.BytesIO(source)).load(),
        ("pillow", "resize"): lambda: decoded.resize((224, 224), fast.recipe.resample),
    }
    whole = {"before": before(processor), "pillow": fast}
    for decoder in DECODERS[1:]:
        if not missing(decoder):
            whole[decoder] = Prepare(processor, decoder)
    steps |= {(name, "all of it"): lambda run=run: run(source) for name, run in whole.items()}
    seconds: dict[tuple, list[float]] = {step: [] for step in steps}
    for _ in range(rounds):
        for step, run in steps.items():
            start = time.process_time()
            run()
            seconds[step].append(time.process_time() - start)
    return [
        {"path": path, "step": step, "milliseconds": 1e3 * statistics.median(of)}
        for (path, step), of in seconds.items()
    ]


def cost_of_draft() -> list[dict]:
    """What the decoders do to pixels and embeddings, of each photograph as a JPEG of 2000 pixels and more; random weights."""
    from siglip_fast import SiglipVisionModel

    config = config_for(VARIANTS["224²"])
    processor = load_processor(None, kind_of(config))
    torch.manual_seed(0)
    model = SiglipVisionModel(config).eval()
    sources = []
    for name in PHOTOS:
        photo = Image.fromarray(getattr(data, name)())
        factor = math.ceil(2000 / min(photo.size))
        sources.append(encoded(photo.resize([factor * side for side in photo.size], Image.Resampling.BICUBIC), "JPEG"))

    def embedded(prepare: Prepare) -> tuple[Tensor, Tensor]:
        images = batch_of([prepare(source) for source in sources])
        with torch.inference_mode():
            return images["pixel_values"].int(), prepare.recipe.run(model, images).pooler_output

    exact, wanted = embedded(Prepare(processor))
    rows = []
    for decoder in (name for name in DECODERS if not missing(name)):
        for draft in (False, True)[decoder == "pillow" :]:
            pixels, embeddings = embedded(Prepare(processor, decoder, draft))
            cosines = torch.nn.functional.cosine_similarity(embeddings.double(), wanted.double())
            apart = (pixels - exact).abs()
            row = {"candidate": decoder + ", draft" * draft, "levels": int(apart.max())}
            rows.append(row | {"mean_levels": float(apart.float().mean()), "lowest_cosine": float(cosines.min())})
    return rows


def markdown(result: dict) -> str:
    about, cores = result["about"], result["cores"]
    where = f"{about['device']}, {cores} cores, {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; {result['rounds']} rounds"
    lines = [line.replace("ROUNDS", str(result["rounds"])) for line in HEAD]
    lines += [f"{where}. {result['note']}".strip(), ""]
    for kind, rows in result["rows"].items():
        lines += [f"## {kind}: images a second on one core", ""]
        lines += [
            "| image | candidate | ms | images/s | all cores | × before | levels apart | cores for 1,000/s | 10,000/s |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for row in rows:
            rate, apart = row["images_per_second"], row.get("levels", "")
            if row.get("share_above_one"):
                apart = f"{apart} ({row['share_above_one']:.1e} more than 1)"
            cells = [f"{row['size']} {row['format']}", row["candidate"], f"{row['milliseconds']:.2f}", f"{rate:.0f}"]
            cells += [f"{row['all_cores']:.0f}", f"{row['times_before']:.2f}", str(apart)]
            lines.append("| " + " | ".join([*cells, *(f"{math.ceil(n / rate):,}" for n in (1_000, 10_000))]) + " |")
        lines.append("")
    lines += [f"{name} did not take part: {why}." for name, why in result["absent"].items()] + [""] * bool(
        result["absent"]
    )
    lines += ["## Targets", "", "| JPEG | decoder | × before | target | |", "|---|---|---|---|---|"]
    for (decoder, size), target in TARGETS.items():
        for row in result["rows"]["224²"]:
            if (row["candidate"], row["size"].removesuffix(SMOOTH), row["format"]) == (decoder, size, "JPEG"):
                verdict = "" if row["times_before"] >= target else "**missed**"
                lines.append(f"| {row['size']} | {decoder} | {row['times_before']:.2f} | {target} | {verdict} |")
    lines += ["", "## Where the time for a 12 MP JPEG goes", "", "| | step | ms |", "|---|---|---|"]
    lines += [f"| {row['path']} | {row['step']} | {row['milliseconds']:.1f} |" for row in result["profile"]]
    lines += ["", "## What the faster ones cost", ""]
    lines += [
        "Against `pillow`, JPEGs of at least 2000 pixels a side, base-patch16-224 with random weights: what the cosines are",
        "with trained ones nobody has measured.",
        "",
    ]
    lines += ["| decoder | most levels apart | mean | lowest cosine of embeddings |", "|---|---|---|---|"]
    for row in result["draft"]:
        cells = [row["candidate"], str(row["levels"]), f"{row['mean_levels']:.3f}", f"{row['lowest_cosine']:.6f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![images a second](feed.png)", ""])


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"]["224²"] if row["format"] == "JPEG"]
    figure, axes = plt.subplots(1, len(SIZES), figsize=(13, 3.8), layout="constrained")
    for axis, size in zip(axes, SIZES, strict=True):
        chosen = [row for row in rows if row["size"] == size][::-1]
        colors = ["tab:gray" if row["candidate"] in (BEFORE, BARE, TORCHVISION) else "tab:orange" for row in chosen]
        bars = axis.barh(
            [row["candidate"] for row in chosen], [row["images_per_second"] for row in chosen], color=colors
        )
        axis.bar_label(bars, [f"{row['images_per_second']:.0f}" for row in chosen], padding=3)
        axis.set(title=f"{size} JPEG", xlabel="images/s on one core")
        axis.margins(x=0.15)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="OUT")
    parser.add_argument("--note", default="", help="a sentence for the report: what else the machine was doing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sources = {}
    for size in (
        arguments.sizes
    ):  # the smallest first: a process that has had large images pays less for the memory of small ones
        sources |= {(size, format): encoded(mosaic(*SIZES[size]), format) for format in FORMATS}
        if size != arguments.sizes[0]:
            smooth = Image.fromarray(getattr(data, PHOTOS[0])()).resize(SIZES[size], Image.Resampling.BICUBIC)
            sources[size + SMOOTH, "JPEG"] = encoded(smooth, "JPEG")
    rows, absent = {}, {}
    for kind, variant in VARIANTS.items():
        chosen = sources if kind == "224²" else {key: s for key, s in sources.items() if key[1] == "JPEG"}
        rows[kind], absent = compare(chosen, variant, arguments.rounds)
    largest = sources[arguments.sizes[-1], "JPEG"]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        steps = process.submit(profile, largest, arguments.rounds).result()
    versions = {name: environment.version_of(name) for name in ("pillow", "torch", "simplejpeg", "transformers")}
    result = {
        "about": environment.about(),
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)),
        "rounds": arguments.rounds,
    }
    result |= {"note": arguments.note, "rows": rows, "absent": absent}
    result |= {"profile": steps, "draft": cost_of_draft()}
    if arguments.json:
        with atomic(arguments.json) as file:
            file.write(json.dumps(result, indent=1).encode())
    print(text := markdown(result))
    if arguments.markdown:
        with atomic(arguments.markdown) as file:
            file.write(text.encode())
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
