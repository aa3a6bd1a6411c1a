"""Compile every shipped kernel for every published model and GPU architecture, without a GPU, and gate the result.

    python bench/static.py [--arch sm_80 --arch sm_90 …] [--json OUT] [--markdown OUT]

What is compiled is what a forward pass launches: `siglip_fast.forward` runs on meta tensors while Triton believes it
has the GPU in question and every launch is turned into a compilation, so shapes, configurations and specializations
are the product's own. Exit status 1 and the names on the last line when a gate fails. Every number is a property of
the machine code or a lower bound; none is a measurement, and no GPU is involved.
"""

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import packed_towers as packed
import static_report as report
import torch
import triton
from bound import Work
from gates import TENSOR, Row, failures
from machine_code import inspect
from pretended import Driver
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from siglip_fast.files import atomic
from siglip_fast.models.variants import VARIANTS, config_for

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What tells the specializations of a kernel apart: those of its constants that are no configuration.
SHAPE = ("N", "K", "D", "HEADS", "HEAD_DIM", "PATCH", "TAPS", "MERGED", "ACTIVATION", "HAS_RESIDUAL", "TAIL_N")

UNUSED = {"HEAD_DIM": 0, "MERGED": 1, "ACTIVATION": None}  # which layernorm_linear is without

MODELS = (*VARIANTS, *packed.TOWERS)

Task = tuple[str, str, tuple[str, ...], int]  # architecture, dtype, models, batch size


@dataclass(eq=False)
class NotCompiled:
    """In place of a kernel."""

    reason: str


@contextlib.contextmanager
def launches_of(arch: str):
    """Collects (JIT function, its arguments, grid, CompiledKernel or NotCompiled) of every launch; nothing runs."""
    launches: list[tuple] = []
    failed: dict[tuple, NotCompiled] = {}
    target = gpu_target(arch)
    run, hip = JITFunction.run, torch.version.hip

    def compile_only(self, *args, grid, warmup, **kwargs):
        key = (self, *kwargs.items())
        try:
            kernel = failed.get(key) or run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever a compiler raises is a failed gate, not the end of the table
            kernel = failed[key] = NotCompiled(f"does not compile: {' '.join(str(error).split())[-200:]}")
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs, grid, kernel))

    driver.set_active(Driver(target))
    JITFunction.run, torch.version.hip = compile_only, "pretended" if target.backend == "hip" else None
    try:
        yield launches
    finally:
        JITFunction.run, torch.version.hip = run, hip


def gpu_target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def forward(name: str, dtype: torch.dtype, batch: int, batch_invariant: bool = False) -> None:
    """One forward pass of a published model on meta tensors, launching what it would launch."""
    from torch.utils._pytree import tree_map
    from transformers import SiglipVisionModel

    from siglip_fast.forward import forward
    from siglip_fast.models.weights import tower_weights
    from siglip_fast.ops import Ops

    config = config_for(name)
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    with torch.device("meta"):
        model = SiglipVisionModel(config).to(torch.bfloat16)
        pixels = torch.empty((batch, 3, config.image_size, config.image_size), dtype=dtype)
    tower = getattr(model, "vision_model", model)
    ops = Ops("triton", batch_invariant=batch_invariant)
    # Not Derived, which refuses meta parameters; in bf16 first, because fp16 would look at values.
    weights = tower_weights(tower, ops)
    weights = weights._replace(layers=weights.layers * layers)
    weights, position = tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x,
        (weights, tower.embeddings.position_embedding.weight),
    )
    forward(ops, weights, pixels, position)


def compile_models(task: Task) -> list[Row]:
    """A worker's task: the distinct kernels of some models, on one architecture in one dtype."""
    arch, dtype, names, batch = task
    rows: dict[object, Row] = {}
    with launches_of(arch) as launches:
        for name in names:
            launches.clear()
            (packed.forward if name in packed.TOWERS else forward)(name, DTYPES[dtype], batch)
            for function, arguments, grid, kernel in launches:
                if kernel not in rows:
                    rows[kernel] = describe(arch, dtype, function, arguments, kernel)
                if name in packed.TOWERS:  # gates only: no bound is drawn of segments whose lengths are on a device
                    continue
                calls = rows[kernel].calls.setdefault(name, Counter())
                calls[Work.of(rows[kernel].kernel, arguments, grid)] += 1
    return list(rows.values())


def describe(arch: str, dtype: str, function: JITFunction, arguments: dict, kernel) -> Row:
    name = function.__name__.removesuffix("_kernel").strip("_")
    constants = {p.name for p in function.params if p.is_constexpr} & set(SHAPE)
    stated = {key: arguments[key] for key in SHAPE if key in constants and arguments[key] != UNUSED.get(key, "")}
    shape = " ".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in stated.items())
    config = {
        k: v for k, v in arguments.items() if k.startswith(("BLOCK_", "GROUP_", "num_", "SPLIT_K", "TMA", "PERSISTENT"))
    }
    if isinstance(kernel, NotCompiled):
        return Row(arch, dtype, name, shape, config, None, kernel.reason)
    return Row(arch, dtype, name, shape, config, inspect(kernel))


def tasks(arches: list[str], dtypes: list[str], names: list[str], batch: int) -> list[Task]:
    """Models of one width share most kernels, so they are one task. In fp32 the two shown models are enough."""
    width_of = {name: VARIANTS[name]["hidden_size"] for name in VARIANTS} | {name: name for name in packed.TOWERS}
    todo: dict[Task, None] = {}
    for dtype in dtypes:
        chosen = [n for n in names if n in report.SHOWN] or names if dtype == "fp32" else names
        widths = {width_of[name] for name in chosen}
        for arch in arches:
            for width in sorted(widths, key=str, reverse=True):
                group = tuple(name for name in chosen if width_of[name] == width)
                todo[arch, dtype, group, batch] = None
    return list(todo)


def compile_all(todo: list[Task], processes: int) -> list[Row]:
    """In as many processes; BrokenProcessPool where a compiler crashes, which LLVM's assertions do."""
    rows: list[Row] = []
    spawn = multiprocessing.get_context("spawn")
    die_on_interrupt = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(processes, spawn, signal.signal, die_on_interrupt) as pool:
        futures = [pool.submit(compile_models, task) for task in todo]
        try:
            for future in tqdm(as_completed(futures), total=len(todo), unit="task", disable=None):
                rows += future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    order = list(TENSOR)
    return sorted(rows, key=lambda r: (order.index(r.arch), r.dtype, r.kernel, r.shape))


def write(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=TENSOR, help="default: all of them")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all of them")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all of them")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="default: 64")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels do not compile
    todo = tasks(
        arguments.arch or list(TENSOR),
        arguments.dtype or list(DTYPES),
        arguments.model or list(MODELS),
        arguments.batch_size,
    )
    try:
        rows = compile_all(todo, arguments.processes)
    except KeyboardInterrupt:
        print("interrupted; what was compiled stays in Triton's cache", file=sys.stderr)
        return 130
    except BrokenProcessPool:
        print("a compiler crashed: narrow --arch, --dtype and --model down to find on what")
        return 1
    command = " ".join(["python bench/static.py", *sys.argv[1:]])
    print("\n".join(report.summary(rows)))
    if arguments.markdown:
        write(arguments.markdown, report.markdown(rows, arguments.batch_size, command))
    if arguments.json:
        write(arguments.json, report.as_json(rows, arguments.batch_size, command))
    failed = [row for row in rows if failures(row)]
    print("\n".join(report.failure_lines(failed)))
    names = ", ".join(sorted({f"{row.kernel} on {row.arch} in {row.dtype}" for row in failed}))
    print(
        f"{len(rows)} kernels compiled by Triton {triton.__version__}, "
        + (f"{len(failed)} fail a gate: {names}" if failed else "every gate holds")
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
