"""Kernels launched and waits of the host in a forward of every family of towers but SigLIP's own, stock's and ours.

    python tests/helpers/launch_counts.py --markdown docs/launches.md

Of narrow towers of 27 layers, on which neither depends, and three images (crops, tiles) of different sizes where a tower takes
such; how it counts is in bench/packed_launches.py. A forward that is not the first on these sizes. Nothing is timed.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import fixed_towers  # noqa: E402
import gridded_towers  # noqa: E402
import packed_launches  # noqa: E402
import packed_towers  # noqa: E402

from siglip_fast.files import atomic  # noqa: E402
from siglip_fast.models import minicpm, qwen3_vl  # noqa: E402

LAYERS = 27
Made = Callable[[], tuple[nn.Module, dict[str, Any]]]  # a stock tower, and the arguments of a call


def towers() -> Iterator[tuple[str, Made]]:
    """By the class's name, for those that this transformers has."""
    for name, part in qwen3_vl.MODULES.items():
        if _has(part):
            yield name, functools.partial(_qwen3_vl, name)
    for part in gridded_towers.INSTALLED:
        yield gridded_towers.FAMILIES[part].name, functools.partial(_gridded, part)
    for name, part in packed_towers.PADDED_IN.items():
        if _has(part):
            yield name, functools.partial(_padded, name)
    for name, part in minicpm.MODULES.items():
        if _has(part):
            yield f"{name}, merging", functools.partial(_minicpm, name, True)
            yield f"{name}, not merging", functools.partial(_minicpm, name, False)
    for part in fixed_towers.TOWERS:
        if _has(part):
            yield part, functools.partial(_fixed, part)


def _has(part: str) -> bool:
    return importlib.util.find_spec(f"transformers.models.{part}") is not None


def _qwen3_vl(name: str) -> tuple[nn.Module, dict[str, Any]]:
    rows, grids = packed_towers.qwen3_vl_inputs([(1, 4, 6), (1, 2, 2), (1, 8, 4)])
    return packed_towers.qwen3_vl_tower(name, depth=LAYERS), {"hidden_states": rows, "grid_thw": grids}


def _gridded(part: str) -> tuple[nn.Module, dict[str, Any]]:
    tower = gridded_towers.tower(part, num_hidden_layers=LAYERS)
    return tower, gridded_towers.FAMILIES[part].call(gridded_towers.MIXED)


def _padded(name: str) -> tuple[nn.Module, dict[str, Any]]:
    inputs = packed_towers.padded_inputs([(4, 4), (2, 3), (1, 4)], (4, 4))
    return packed_towers.padded_tower(name, num_hidden_layers=LAYERS), inputs


def _minicpm(name: str, merges: bool) -> tuple[nn.Module, dict[str, Any]]:
    inputs = packed_towers.minicpm_strip([(4, 6), (2, 2), (6, 2)]) | {"use_vit_merger": merges}
    return packed_towers.minicpm_tower(name, num_hidden_layers=LAYERS), inputs


def _fixed(part: str) -> tuple[nn.Module, dict[str, Any]]:
    return fixed_towers.TOWERS[part](num_hidden_layers=LAYERS), {"pixel_values": fixed_towers.inputs(part)}


def counts(make: Made) -> tuple[packed_launches.Count, packed_launches.Count]:
    """Of stock and of ours."""
    stock, ours = (packed_launches.count_of(*_in_bf16(make), ours) for ours in (False, True))
    return stock, ours


def _in_bf16(make: Made) -> tuple[nn.Module, dict[str, Any]]:
    tower, inputs = make()
    return tower.to(torch.bfloat16), inputs


def table() -> str:
    lines = ["| tower | kernels, stock sdpa | ours | waits, stock | ours |", "|---|---:|---:|---:|---:|"]
    for name, make in towers():
        stock, ours = counts(make)
        lines.append(f"| `{name}` | {stock.kernels} | {ours.kernels} | {stock.waits} | {ours.waits} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="OUT", required=True)
    arguments = parser.parse_args()
    command = f"python tests/helpers/launch_counts.py --markdown {arguments.markdown}"
    about = f"Written by `{command}`, transformers {transformers.__version__}. What it counts, and of which towers, is in that file."
    sizes = "NaFlex, other calls and bytes are in [packed-launches.md](packed-launches.md), SigLIP's own in `python bench/traffic.py`."
    with atomic(arguments.markdown) as file:
        file.write(f"# Kernels and waits of every tower\n\n{about}\n{sizes}\n\n{table()}\n".encode())


if __name__ == "__main__":
    main()
