"""`siglip-fast demo`: stock transformers and siglip_fast on the same photographs with the same weights.

Prints how well they agree and how fast each is here, and draws each photograph above the first three
principal components of its tokens, as red, green and blue.
"""

import copy
import functools
import math
import statistics
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling as Outputs

from ..errors import UserError
from ..feed.kinds import batch_of, inputs_of, kind_of
from ..feed.loading import load_model, load_processor, pick_device, route
from ..files import atomic
from ..models.base import Fused, stock_class

# in scikit-image's wheel: nothing is downloaded
PHOTOS = ("astronaut", "coffee", "rocket", "retina")
PARTS = {"rocket": (0.28, 1), "retina": (1, 0.4)}  # of width and height that a model for any aspect is shown
TOLERANCE = 1e-4  # largest difference, relative to the stock output's largest value where that exceeds 1
REPEATS = 5
ATTENTIONS = ("sdpa", "eager")  # of stock: its default, and the one written out in PyTorch


def run(args: Namespace) -> int:
    """The subcommand: 0 if the two models agree, 1 if they do not."""
    out = Path(args.out)
    if out.suffix != ".png":
        raise UserError(f"--out {out}: expected the name of a .png file")
    need_the_extra()
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions, good for 1e-3 only
    with atomic(out) as file:  # first: a refusal should not take a minute
        ours = load_model(args, device, torch.float32)
        models = {f"stock {attention}": stock_twin(ours, attention) for attention in ATTENTIONS}
        models["siglip_fast"] = ours
        kind = kind_of(ours.config)
        processor = load_processor(args.model, kind)
        photos = load_photos(kind.keeps_aspect)
        batch = batch_of([inputs_of(photo, processor) for photo in photos.values()])
        grids = kind.grids(batch)
        batch = {name: values.to(device) for name, values in batch.items()}
        with torch.inference_mode():
            ran_on = route(ours, batch)
            outputs = {label: model(**batch) for label, model in models.items()}
            seconds = measure({label: functools.partial(m, **batch) for label, m in models.items()}, device)
        name = args.model or f"{args.random_weights} with random weights (untrained)"
        print(f"{name}, float32 on {device}; siglip_fast ran on: {ran_on}\n")
        got, agree = outputs.pop("siglip_fast"), True
        for label, expected in outputs.items():
            differences, same = compare(list(photos), expected, got)
            agree &= same
            print(f"siglip_fast and {label}:\n{differences}\n")
        print_speeds(seconds, len(photos))
        tokens = [output.last_hidden_state.float().cpu() for output in (outputs["stock sdpa"], got)]
        draw(file, photos, grids, *tokens, title=name)
    print(f"\npicture: {out}\n" + ("They agree." if agree else f"THEY DISAGREE by more than {TOLERANCE}."))
    return 0 if agree else 1


def need_the_extra() -> None:
    """Raises UserError where a package of it is missing, now and not after the work."""
    try:
        import matplotlib  # noqa: F401
        import skimage  # noqa: F401
    except ImportError as error:
        raise UserError(f"the demo needs {error.name}: pip install -e '.[demo]' in the checkout") from error


def load_photos(any_aspect: bool) -> dict[str, Image.Image]:
    """The photographs: their middle square, or, where they may have any aspect, whole but for PARTS."""
    from skimage import data

    photos = {name: Image.fromarray(getattr(data, name)()) for name in PHOTOS}
    for name, photo in photos.items():
        width, height = PARTS.get(name, (1, 1))
        size = (round(photo.width * width), round(photo.height * height)) if any_aspect else (min(photo.size),) * 2
        photos[name] = ImageOps.fit(photo, size)
    return photos


def stock_twin(model: Fused, attention: str) -> nn.Module:
    """The stock model on the very parameters of `model`, with the attention implementation of that name."""
    stock = stock_class(type(model))(copy.deepcopy(model.config)).to(model.device)
    stock.set_attn_implementation(attention)
    stock.load_state_dict(model.state_dict(), assign=True)
    return stock.eval()


def measure(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Seconds of REPEATS calls of each of `runs`. They take turns: a busy machine is unfair to none."""
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(REPEATS):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[label].append(time.perf_counter() - start)
    return seconds


def print_speeds(seconds: dict[str, list[float]], images: int) -> None:
    print(f"images/s, batch of {images}, median of {REPEATS} interleaved runs (slowest to fastest):")
    ours = statistics.median(seconds["siglip_fast"])
    for label, times in seconds.items():
        median, slowest, fastest = (images / f(times) for f in (statistics.median, max, min))
        ratio = "" if label == "siglip_fast" else f"   siglip_fast: {statistics.median(times) / ours:.2f} times"
        print(f"  {label:<11}{median:10.2f}  ({slowest:.2f} to {fastest:.2f}){ratio}")


def compare(names: list[str], expected: Outputs, got: Outputs) -> tuple[str, bool]:
    """A table of how far `got` is from `expected` for each image, in the rows of padding too, and whether all is within
    TOLERANCE."""
    keys = [key for key in ("pooler_output", "last_hidden_state") if expected.get(key) is not None]
    lines = [" " * 12 + "".join(f"{key:>26}" for key in keys)]
    lines.append(f"{'photo':<12}" + f"{'cosine':>14}{'max |diff|':>12}" * len(keys))
    agree = True
    for i, name in enumerate(names):
        line = f"{name:<12}"
        for key in keys:
            a, b = (outputs[key][i].double().flatten() for outputs in (expected, got))
            difference = (a - b).abs().max().item()
            agree &= difference <= TOLERANCE * max(1.0, a.abs().max().item())  # not so for NaN
            line += f"{torch.cosine_similarity(a, b, dim=0).item():>14.9f}{difference:>12.1e}"
        lines.append(line)
    return "\n".join(lines), agree


def draw(
    file: BinaryIO,
    photos: dict[str, Image.Image],
    grids: list[tuple[int, int]],
    stock: torch.Tensor,
    ours: torch.Tensor,
    title: str,
) -> None:
    """A PNG of three rows: the photographs, and the tokens `[images, N, D]` of siglip_fast and of stock, those of the
    image's grid of patches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(photos), 10.2), layout="constrained")
    axes = figure.subplots(3, len(photos))
    for column, (name, photo) in enumerate(photos.items()):
        maps = [
            Image.fromarray(colors).resize(photo.size, Image.Resampling.BICUBIC)
            for colors in principal_colors(stock[column], ours[column], grids[column])
        ]
        for row, image in enumerate([photo, *maps]):
            axes[row, column].imshow(image)
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(name, fontsize=15)
    for row, label in enumerate(("photograph", "siglip_fast", "stock sdpa")):
        axes[row, 0].set_ylabel(label, fontsize=15)
    heading = "What the tokens hold: their first three principal components as red, green, blue"
    figure.suptitle(f"{heading}\n{textwrap.fill(title, 80)}", fontsize=16)
    figure.savefig(file, format="png", dpi=100)


def principal_colors(stock: torch.Tensor, ours: torch.Tensor, grid: tuple[int, int]) -> list[np.ndarray]:
    """Tokens `[N, D]`, the first of which are a grid of so many rows and columns, as images `[rows, columns, 3]`, ours
    and stock's.

    Both by the components and the scale of stock's tokens, so that equal tokens look equal.
    """
    stock, ours = (tokens[: math.prod(grid)] for tokens in (stock, ours))
    mean = stock.mean(0)
    components = torch.linalg.svd(stock - mean, full_matrices=False).Vh[:3].T
    low, high = torch.quantile((stock - mean) @ components, torch.tensor([0.01, 0.99]), dim=0)
    images = []
    for tokens in (ours, stock):
        colors = ((tokens - mean) @ components - low) / (high - low)
        images.append((colors.clamp(0, 1).nan_to_num() * 255).byte().reshape(*grid, 3).numpy())
    return images
