"""Device kernels launched, times that the host waits for the device, and bytes moved, by forwards of images of any size: stock,
and ours.

    python bench/packed_launches.py [--markdown OUT]

Counted as in bench/traffic.py, in bf16, on CPU tensors of towers of published widths (tests: narrow ones, on which kernels and
waits do not depend). Every operator that makes or changes memory is a kernel, also of the few that look at masks and sizes;
scaled_dot_product_attention, LayerNorm and a GEMM with its bias are one each; copies to the device are none. The host waits
where Python asks a tensor for values (`tolist`, `item`, `bool`, …), or an operator's output has a size that depends on them. Sizes are
taken to be on the device. MB are those of activations in one call; weights and tables of positions, resized ones too, are none. The
fused minimum is that of the layers, of rows that are not padding. Nothing is timed.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import peers
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from traffic import counting
from transformers import PretrainedConfig, Siglip2VisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

import siglip_fast.models.reasons
from siglip_fast.files import atomic

NARROW = {"hidden_size": 64, "intermediate_size": 128}
BASE, SO400M = {"hidden_size": 768, "intermediate_size": 3072}, {"hidden_size": 1152, "intermediate_size": 4304}
HEADS = {64: 4, 768: 12, 1152: 16}  # by hidden_size
SIZES = [(16, 16), (8, 24), (24, 8), (16, 8), (8, 8), (32, 8), (8, 16), (12, 20)]  # patches of eight images
ASKS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
SIZED_BY_VALUES = ("nonzero", "repeat_interleave", "_unique2", "masked_select")  # operators

Widths = dict[str, int]


class Case(NamedTuple):
    config: PretrainedConfig
    architecture: type
    inputs: dict[str, Tensor]
    rows: int  # that are not padding

    @property
    def minimum(self) -> int:
        """Bytes of activations that the layers alone move when fused, as in bench/traffic.py."""
        D, F = self.config.hidden_size, self.config.intermediate_size
        layers = getattr(self.config, "num_hidden_layers", None) or self.config.depth
        return 2 * layers * self.rows * (4 * D + 4 * D + 3 * D + D + F + F + 2 * D)


class Count(NamedTuple):
    kernels: int
    waits: int
    bytes: int  # of activations


def naflex(layers: int, widths: Widths, full: bool = False) -> Case:
    config = Siglip2VisionConfig(
        **widths, num_hidden_layers=layers, num_attention_heads=HEADS[widths["hidden_size"]], num_patches=256
    )
    shapes = torch.tensor([(16, 16)] * 8 if full else SIZES)
    mask = (torch.arange(256) < shapes.prod(1)[:, None]).int()
    pixels = torch.randn(8, 256, 768) * mask[..., None]
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return Case(config, transformers.Siglip2VisionModel, inputs, int(mask.sum()))


def qwen3_vl(grids: list[tuple[int, int, int]], widths: Widths) -> Case:
    sizes = {
        "depth": 27,
        "num_heads": HEADS[widths["hidden_size"]],
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    grid_thw = torch.tensor(grids)
    rows = int(grid_thw.prod(1).sum())
    inputs = {"hidden_states": torch.randn(rows, 1536), "grid_thw": grid_thw}
    return Case(Qwen3VLVisionConfig(**widths, **sizes), Qwen3VLVisionModel, inputs, rows)


# By their names, what makes one of some widths; None: those of the published tower
CASES: dict[str, Callable[[Widths | None], Case]] = {
    "NaFlex, 12 layers, eight images": lambda widths=None: naflex(12, widths or BASE),
    "NaFlex, 27 layers, eight images": lambda widths=None: naflex(27, widths or SO400M),
    "NaFlex, 27 layers, eight full images of one size": lambda widths=None: naflex(27, widths or SO400M, full=True),
    "Qwen3-VL, 27 layers, 3 taps, one image": lambda widths=None: qwen3_vl([(1, 16, 24)], widths or SO400M),
    "Qwen3-VL, 27 layers, 3 taps, eight images": lambda widths=None: qwen3_vl(
        [(1, *size) for size in SIZES], widths or SO400M
    ),
    "Qwen3-VL, 27 layers, 3 taps, a video of 16 frames": lambda widths=None: qwen3_vl([(16, 8, 12)], widths or SO400M),
}


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Which methods of tensors ask for values meanwhile."""
    asked: list[str] = []

    def counted(name: str) -> Callable:
        own = getattr(Tensor, name)

        def ask(self, *args):
            inner = len(asked)
            value = own(self, *args)  # `bool` and others call `item`
            asked[inner:] = [name]
            return value

        return ask

    with contextlib.ExitStack() as patches:
        for name in ASKS:
            patches.enter_context(mock.patch.object(Tensor, name, counted(name)))
        yield asked


def count(case: Case, ours: bool) -> Count:
    config, architecture, inputs, _ = case
    return count_of(peers.stock(config, "sdpa", torch.bfloat16, architecture=architecture), inputs, ours)


def count_of(model: nn.Module, inputs: dict[str, Any], ours: bool) -> Count:
    """Of a forward of a stock tower in bf16, or of it made fast."""
    if ours:
        siglip_fast.apply_to(model, backend="triton", strict=True)
    inputs = in_bf16(inputs)
    # Under the mode that counts ours would rather run stock's code.
    unseen = mock.patch.object(siglip_fast.models.reasons, "mode_reason", lambda: None)
    with unseen:
        if ours:  # a forward that is not the first
            with counting([]):
                model(**inputs)
        with counting([*model.parameters(), *model.buffers(), *_derived(model)]) as counter, waits() as asked:
            model(**inputs)
    sized = sum(launch.name in SIZED_BY_VALUES for launch in counter.launches)
    return Count(len(counter.launches), len(asked) + sized, sum(launch.activations for launch in counter.launches))


def in_bf16(inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of its tensors that are floating, wherever they are in it."""
    return tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, inputs)


def _derived(model: nn.Module) -> list[Tensor]:
    """What a fast tower has made of its parameters, and keeps."""
    found = []
    for derived in getattr(model, "_derived", {}).values():
        kept = [vars(each) for each in derived._kept.values()]
        found += [leaf for leaf in tree_leaves([derived.weights, kept]) if isinstance(leaf, Tensor)]
    return found


def table() -> str:
    lines = [
        "| | kernels, stock sdpa | ours | waits, stock | ours | MB, stock | ours | ÷ fused minimum, stock | ours |",
        "|---|" + 8 * "---:|",
    ]
    for name, make in CASES.items():
        case = make()
        stock, ours = (count(case, ours) for ours in (False, True))
        cells = [f"{a} | {b}" for a, b in zip(stock[:2], ours[:2], strict=True)]
        megabytes = f"{stock.bytes / 1e6:.0f} | {ours.bytes / 1e6:.0f}"
        ratios = f"{stock.bytes / case.minimum:.2f} | {ours.bytes / case.minimum:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {megabytes} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    about = f"Written by `python bench/packed_launches.py --markdown {arguments.markdown}`, transformers {transformers.__version__}."
    text = f"# Kernels, waits and bytes of forwards of images of any size\n\n{about} How it counts is in that file.\n\n{table()}\n"
    print(text)
    if arguments.markdown:
        with atomic(arguments.markdown) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
