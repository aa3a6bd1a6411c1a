"""Device kernels launched, and times that the host waits for the device, by forwards of images of any size: stock and ours.

    python bench/packed_launches.py [--markdown OUT]

Counted as in bench/traffic.py, on CPU tensors of towers that are narrow and as deep as published ones: neither number depends
on the width. Every operator that makes or changes memory is a kernel, also of the few that look at masks and sizes;
scaled_dot_product_attention, LayerNorm and a GEMM with its bias are one each; copies to the device are none. The host waits
where Python asks a tensor for values (`tolist`, `item`, `bool`, …), or an operator's output has a size that depends on them. Sizes are
taken to be on the device. Nothing is timed.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import peers
import torch
import transformers
from torch import Tensor
from traffic import counting
from transformers import PretrainedConfig, Siglip2VisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

import siglip_fast.models.reasons
from siglip_fast.files import atomic

NARROW = {"hidden_size": 64, "intermediate_size": 128}
SIZES = [(4, 4), (2, 6), (6, 2), (4, 2), (2, 2), (8, 2), (2, 4), (6, 4)]  # patches of eight images
ASKS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
SIZED_BY_VALUES = ("nonzero", "repeat_interleave", "_unique2", "masked_select")  # operators

Inputs = dict[str, Tensor]


def naflex(layers: int, full: bool = False) -> tuple[PretrainedConfig, type, Inputs]:
    config = Siglip2VisionConfig(
        **NARROW, num_hidden_layers=layers, num_attention_heads=4, patch_size=4, num_patches=16
    )
    shapes = torch.tensor([(4, 6)] * 8 if full else SIZES)
    mask = (torch.arange(24) < shapes.prod(1)[:, None]).int()
    pixels = torch.randn(8, 24, 48) * mask[..., None]
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return config, transformers.Siglip2VisionModel, inputs


def qwen3_vl(grids: list[tuple[int, int, int]]) -> tuple[PretrainedConfig, type, Inputs]:
    sizes = {"depth": 27, "num_heads": 4, "out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 64}
    config = Qwen3VLVisionConfig(**NARROW, **sizes, deepstack_visual_indexes=[8, 16, 24])
    grid_thw = torch.tensor(grids)
    return (
        config,
        Qwen3VLVisionModel,
        {"hidden_states": torch.randn(int(grid_thw.prod(1).sum()), 96), "grid_thw": grid_thw},
    )


CASES: dict[str, Callable[[], tuple[PretrainedConfig, type, Inputs]]] = {
    "NaFlex, 12 layers, eight images": lambda: naflex(12),
    "NaFlex, 27 layers, eight images": lambda: naflex(27),
    "NaFlex, 27 layers, eight full images of one size": lambda: naflex(27, full=True),
    "Qwen3-VL, 27 layers, 3 taps, one image": lambda: qwen3_vl([(1, 4, 6)]),
    "Qwen3-VL, 27 layers, 3 taps, eight images": lambda: qwen3_vl([(1, *size) for size in SIZES]),
    "Qwen3-VL, 27 layers, 3 taps, a video of 16 frames": lambda: qwen3_vl([(16, 4, 6)]),
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


def count(make: Callable, ours: bool) -> tuple[int, int]:
    """Kernels and waits of a forward that is not the first."""
    config, stock, inputs = make()
    model = peers.stock(config, "sdpa", torch.float32, architecture=stock)
    if ours:
        siglip_fast.apply_to(model, backend="triton", strict=True)
    # Under the mode that counts ours would rather run stock's code.
    unseen = mock.patch.object(siglip_fast.models.reasons, "mode_reason", lambda: None)
    with unseen, counting([*model.parameters(), *model.buffers()]) as counter:
        model(**inputs)
        counter.launches.clear()
        with waits() as asked:
            model(**inputs)
    sized = sum(launch.name in SIZED_BY_VALUES for launch in counter.launches)
    return len(counter.launches), len(asked) + sized


def table() -> str:
    lines = ["| | kernels, stock sdpa | ours | waits, stock | ours |", "|---|---|---|---|---|"]
    for name, make in CASES.items():
        (kernels, waited), (own_kernels, own_waited) = (count(make, ours) for ours in (False, True))
        lines.append(f"| {name} | {kernels} | {own_kernels} | {waited} | {own_waited} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    about = f"Written by `python bench/packed_launches.py --markdown {arguments.markdown}`, transformers {transformers.__version__}."
    text = f"# Kernels and waits of forwards of images of any size\n\n{about} How it counts is in that file.\n\n{table()}\n"
    print(text)
    if arguments.markdown:
        with atomic(arguments.markdown) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
