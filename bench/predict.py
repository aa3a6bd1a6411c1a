"""Predict a forward on an H200, from compiled machine code and data sheets, before any GPU has run it.

    python bench/predict.py [--model M …] [--batch-sizes B …] [--markdown OUT --json OUT]

docs/predictions.md and .json are its output of the day that they name; a GPU's results are set beside them
(bench/report.py), and they are not edited afterwards. No GPU is involved.
"""

import argparse
import json
import os
import sys
from collections import Counter
from datetime import date
from pathlib import Path

import gpu_model
import peer_model
import static
import torch
import triton
from bound import Work
from gpu_model import Time, time_of
from static import describe, forward, launches_of

from siglip_fast.models.variants import VARIANTS, config_for
from siglip_fast.tuning.cache import source_hash

MODELS = ("base-patch16-224", "so400m-patch14-384")
BATCH_SIZES = (1, 8, 64, 256)
OPERATIONS = ("patch_embed", "qkv", "attention", "out_proj", "fc1", "fc2", "layernorm", "attention_pool", "head")


def ours(model: str, batch: int, batch_invariant: bool = False) -> list[tuple[str, int, static.Row, Work, Time]]:
    """(operation, how many times in a forward, compiled kernel, its work, its time) of each distinct launch."""
    found: Counter = Counter()
    facts = {}
    with launches_of("sm_90") as launches:
        forward(model, torch.bfloat16, batch, batch_invariant)
    for operation, (function, arguments, grid, kernel) in zip(_operations(launches, model), launches, strict=True):
        key = operation, kernel, grid, arguments.get("M")
        if key not in facts:
            row = describe("sm_90", "bf16", function, arguments, kernel)
            work = Work.of(row.kernel, arguments, grid)
            facts[key] = row, work, time_of(row.kernel, work, row.code)
        found[key] += 1
    return [(key[0], count, *facts[key]) for key, count in found.items()]


def _operations(launches: list[tuple], model: str) -> list[str]:
    """That of each launch, in their order: a GEMM's epilogue or tail is its operation's, all after the pool the head's."""
    config, names = config_for(model), []
    linears = {
        ("layernorm_linear", 3 * config.hidden_size): "qkv",
        ("layernorm_linear", config.intermediate_size): "fc1",
        ("linear_residual", config.hidden_size): "out_proj",
        ("linear_residual", config.intermediate_size): "fc2",
    }
    for function, arguments, *_ in launches:
        kernel = function.__name__.strip("_").removesuffix("_kernel")
        if "head" in names or names[-1:] == ["attention_pool"] and kernel != "value":
            name = "head"
        elif kernel == "residual_epilogue":
            name = names[-1]
        elif kernel in ("pool", "value"):
            name = "attention_pool"
        else:
            size = arguments["N" if kernel == "layernorm_linear" else "K"] if "linear" in kernel else 0
            name = linears.get((kernel, size), kernel)
        names.append(name)
    return names


def prediction(model: str, batch: int, batch_invariant: bool = False) -> dict:
    """Of every route: microseconds of each operation once, and of the whole forward."""
    layers = config_for(model).num_hidden_layers
    found = ours(model, batch, batch_invariant)
    totals: Counter = Counter()
    for operation, count, *_, time in found:
        totals[operation] += count * time.microseconds
    routes = {"siglip_fast": (totals, sum(count for _, count, *_ in found))}
    routes |= peer_model.routes(config_for(model), batch)
    each = {"qkv", "attention", "out_proj", "fc1", "fc2"}
    return {
        "model": model,
        "batch_size": batch,
        "routes": {
            route: {
                "milliseconds": round(sum(times.values()) / 1e3, 4),
                "launches": launches,
                "operations_us": {
                    name: round(times[name] / (layers if name in each else 1), 2) for name in OPERATIONS if times[name]
                },
            }
            for route, (times, launches) in routes.items()
        },
        "kernels": [_kernel(*facts) for facts in found],
    }


def _kernel(operation: str, count: int, row: static.Row, work: Work, time: Time) -> dict:
    return {
        "operation": operation,
        "kernel": row.kernel,
        "launches": count,
        "tile": _tile(row.config),
        "registers": row.code.registers,
        "spills": row.code.spills,
        "ctas_per_sm": time.resident,
        "programs": work.programs,
        "waves": round(time.waves, 2),
        "gsb0": f"{row.code.waiting}/{row.code.products}" if row.code.products else "–",
        "us": round(time.microseconds, 2),
        "binds": time.binds,
        "bounds_us": {name: round(us, 2) for name, us in sorted(time.bounds.items(), key=lambda x: -x[1])[:4]},
    }


def _tile(config: dict) -> str:
    sizes = "×".join(str(config[key]) for key in ("BLOCK_M", "IMAGES", "BLOCK_N", "BLOCK_K") if key in config)
    marks = [f"{config['num_warps']} warps"]
    marks += [f"{config['num_stages']} stages"] if "num_stages" in config else []
    marks += [key for key in ("TMA", "PERSISTENT") if config.get(key)]
    marks += [f"SPLIT_K {config['SPLIT_K']}"] if config.get("SPLIT_K", 1) > 1 else []
    return ", ".join([sizes, *marks])


def markdown(predictions: list[dict], command: str) -> str:
    lines = [
        "# Predictions for an H200, bf16",
        "",
        f"Made by `{command}` on {date.today()} with Triton {triton.__version__}, kernel sources {source_hash()}, before any",
        "GPU had run them. **Nothing here is a measurement**, and nothing here is edited after one.",
        "",
        "## The formula",
        "",
        *gpu_model.__doc__.strip().splitlines()[2:],
        "",
        "## The peers",
        "",
        *peer_model.__doc__.strip().splitlines()[2:],
    ]
    for p in predictions:
        routes = p["routes"]
        lines += ["", f"## {p['model']}, batch {p['batch_size']}", ""]
        lines += ["| µs an operation | " + " | ".join(routes) + " |", "|---" * (len(routes) + 1) + "|"]
        for name in OPERATIONS:
            cells = [str(r["operations_us"].get(name, "–")) for r in routes.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append(f"| launches | {' | '.join(str(r['launches']) for r in routes.values())} |")
        lines.append("| **forward, ms** | " + " | ".join(f"{r['milliseconds']:.3f}" for r in routes.values()) + " |")
        lines += ["", _faster(p), ""]
        lines += [
            "| operation | kernel | launches | tile | registers | CTAs/SM | programs | waves | gsb0 | µs | binds |"
        ]
        lines += ["|---" * 11 + "|"]
        for k in p["kernels"]:
            keys = ("operation", "kernel", "launches", "tile", "registers", "ctas_per_sm", "programs", "waves", "gsb0",
                    "us", "binds")  # fmt: skip
            lines.append(f"| {' | '.join(str(k[key]) for key in keys)} |")
    return "\n".join(lines) + "\n"


def _faster(p: dict) -> str:
    own = p["routes"]["siglip_fast"]["operations_us"]
    vendor = p["routes"]["vendor"]["operations_us"]
    names = [
        f"{name} ({own[name]} against {vendor[name]} µs)" for name in OPERATIONS if vendor.get(name, 1e9) < own[name]
    ]
    return f"The vendor's route is predicted to be faster at: {', '.join(names) or 'nothing'}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=VARIANTS, help=f"default: {' and '.join(MODELS)}")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="B")
    parser.add_argument("--batch-invariant", action="store_true", help="ours by one configuration for every batch")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    cases = [(m, b) for m in arguments.model or MODELS for b in arguments.batch_sizes]
    predictions = [prediction(*case, arguments.batch_invariant) for case in cases]
    command = " ".join(["python bench/predict.py", *sys.argv[1:]])
    if arguments.markdown:
        static.write(arguments.markdown, markdown(predictions, command))
    if arguments.json:
        about = {"about": "Predictions, see predictions.md", "made": str(date.today()), "kernels": source_hash()}
        text = json.dumps(about | {"predictions": predictions}, indent=1, ensure_ascii=False) + "\n"
        static.write(arguments.json, text)
    for p in predictions:
        times = ", ".join(f"{route} {r['milliseconds']:.3f}" for route, r in p["routes"].items())
        print(f"{p['model']}, batch {p['batch_size']}, predicted ms: {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
