"""What a forward costs the host, beside as many bare launches of a kernel that does nothing. Needs no GPU, and measures none.

    python bench/host.py [--markdown OUT]

Triton believes that it has an sm_90; kernels are compiled for it, never loaded, and launched by a function that does
nothing. So what is left is Python: Triton's launch path for the bare launches, whatever precedes a launch for ours. On a
GPU each launch takes the driver's time too, on both sides. Forwards and launches take turns; figures are medians in µs.
Copies into and out of a graph's memory go to tensors without memory: a CPU would really copy.
The second table is of images of any size: without launch plans; of sizes that are new, where layers are planned; and of sizes
that came before. The last table is a CPU's: the cpu backend's forward with its operations replaced by ones that compute nothing.
"""

import argparse
import contextlib
import gc
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not launched

import packed_launches
import torch
import transformers
import triton
from pretended import Driver
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import siglip_fast
from siglip_fast import SiglipVisionModel
from siglip_fast.backends import cpu, select
from siglip_fast.files import atomic
from siglip_fast.models.variants import config_for
from siglip_fast.running import graphs, plans
from siglip_fast.running.packed_plans import PackedPlans

HEAD = [
    "# What a forward costs the host",
    "",
    "Made by `python bench/host.py --markdown docs/host.md`, whose first lines say how: no GPU is there, none is measured, and a",
    "CPU tensor stands for each of its tensors. Medians in µs, bfloat16; in brackets the ratio to as many bare launches.",
    "Targets: a forward at most 1.0; a replay at most 40 µs, which is **missed**: the graph begins after about that long, and",
    "its weights are checked while it runs.",
    "",
]
MODELS = ("base-patch16-224", "so400m-patch14-384")
PACKED = [name for name in packed_launches.CASES if "27 layers, eight images" not in name and "full" not in name]
ROUNDS = 60


class Pool:
    """`torch.empty` as torch's CUDA allocator has it: what was freed is handed out again, at the same address. A CPU maps
    and unmaps the pages of large tensors each time."""

    def __init__(self):
        self._tensors: dict[tuple, list[torch.Tensor]] = {}
        self._empty = torch.empty

    def __call__(self, *shape, **options) -> torch.Tensor:
        known = self._tensors.setdefault((shape, *options.values()), [])
        for i in range(len(known)):
            if sys.getrefcount(known[i]) == 2:  # the list's and the call's
                return known[i]
        known.append(self._empty(*shape, **options))
        return known[-1]


class Recorder:
    """In the place of `siglip_fast.running.graphs.Recorder`: a replay only notes when it began."""

    began = 0.0

    def __init__(self, device):
        pass

    def record(self, run):
        def replay():
            Recorder.began = time.perf_counter()

        return replay, run()

    def in_order(self):
        return contextlib.nullcontext()


@triton.jit
def nothing(x_ptr, n):
    pass


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """CPU tensors go the way of those on an sm_90."""
    driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    with (
        mock.patch.object(select, "_triton_unavailable", lambda device: None),
        mock.patch.object(plans, "applies", lambda tensor: True),
        mock.patch.object(graphs, "Recorder", Recorder),
        mock.patch.object(plans, "torch", types.SimpleNamespace(**vars(torch) | {"empty": Pool()})),
    ):
        yield


def medians(runs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Of so many turns of each, in µs."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    gc.collect()
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # what ran before has left nothing of this one in the caches
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) * 1e6 for name, times in samples.items()}


def make_model(name: str, backend: str) -> SiglipVisionModel:
    config = config_for(name)
    return zeros(lambda: SiglipVisionModel(config, backend=backend, strict=True))


def zeros(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in bfloat16 whose parameters are zeros."""
    with torch.device("meta"):
        model = make().to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[1])[None])
    return model


def launches_of(planned: plans.Plans) -> int:
    """Of the last plan."""
    plan = [*planned._plans.values()][-1]
    assert plan is not None, "the forward was not planned"
    return plan.launches


def bare(count: int) -> Callable[[], None]:
    """So many launches of a kernel that does nothing."""
    argument = torch.zeros(16)

    def launch() -> None:
        for _ in range(count):
            nothing[(1,)](argument, 5)

    return launch


def without_memory(graph: graphs.Graph) -> graphs.Graph:
    """Copies into it and out of it are dispatched, and copy nothing."""
    return graph._replace(pixels=graph.pixels.to("meta"), outputs=tuple(out.to("meta") for out in graph.outputs))


def until_replay(captured: SiglipVisionModel, pixels: torch.Tensor) -> float:
    """From the call to the launch of its graph, the median in µs."""
    samples = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        captured(pixels)
        samples.append(Recorder.began - start)
    return statistics.median(samples) * 1e6


def on_gpu(name: str, batch: int) -> str:
    """A row of the table."""
    model, captured = make_model(name, "triton"), make_model(name, "triton")
    size = model.config.image_size
    pixels = torch.zeros(batch, 3, size, size, dtype=torch.bfloat16)
    images = torch.zeros(batch, 3, size, size, dtype=torch.uint8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    captured.capture([batch])
    recorded = captured._current().graphs._graphs
    recorded[batch] = without_memory(recorded[batch])
    model(pixels)
    count = launches_of(model._current().kept(plans.Plans))
    times = medians(
        {
            "bare": bare(count),
            "eager": lambda: model(pixels),
            "states": lambda: model(pixels, output_hidden_states=True),
            "uint8": lambda: model.forward_uint8(images),
            "compiled": lambda: compiled(pixels),
            "replay": lambda: captured(pixels),
            "route": lambda: model._route(pixels),
        }
    )
    ratios = (
        f"{times[key]:.0f} ({times[key] / times['bare']:.2f})" for key in ("eager", "states", "uint8", "compiled")
    )
    replay = (f"{times['replay']:.0f}", f"{until_replay(captured, pixels):.0f}", f"{times['route']:.0f}")
    cells = [name, batch, count, f"{times['bare']:.0f}", *ratios, *replay]
    return f"| {' | '.join(map(str, cells))} |"


def any_size(name: str) -> str:
    """A row of the second table."""
    config, architecture, inputs, _ = packed_launches.CASES[name]()
    if architecture is transformers.Siglip2VisionModel:
        # Masks and padding are looked at on the device: with fewer pixels a CPU is as good as done with it.
        config.patch_size, inputs["pixel_values"] = 2, inputs["pixel_values"][..., :12].contiguous()
    model = siglip_fast.apply_to(zeros(lambda: architecture(config)), backend="triton", strict=True)
    inputs = packed_launches.in_bf16(inputs)
    for _ in range(3):
        model(**inputs)
    planned = model._current().kept(PackedPlans)
    count = launches_of(planned._plans)

    def unplanned() -> None:
        with mock.patch.object(plans, "applies", lambda tensor: False):
            model(**inputs)

    def new() -> None:
        with mock.patch.object(PackedPlans, "__call__", lambda self, rows, sizes, pack: self.once(rows, pack())):
            model(**inputs)

    times = medians({"bare": bare(count), "unplanned": unplanned, "new": new, "again": lambda: model(**inputs)})
    ratios = (f"{times[key]:.0f} ({times[key] / times['bare']:.2f})" for key in ("unplanned", "new", "again"))
    cells = [name, count, f"{times['bare']:.0f}", *ratios]
    return f"| {' | '.join(map(str, cells))} |"


def on_cpu(name: str) -> str:
    """A row of the table: one image."""
    model = make_model(name, "cpu")
    size = model.config.image_size
    pixels = torch.zeros(1, 3, size, size, dtype=torch.bfloat16)
    whole = medians({"whole": lambda: model(pixels)}, 8)["whole"]
    y = torch.zeros(1, (size // model.config.patch_size) ** 2, model.config.hidden_size, dtype=torch.bfloat16)
    qkv, heads = y.repeat(1, 1, 3), (model.config.num_attention_heads, -1)
    nothing_at_all = {
        "patch_embed": lambda *_: (y, None),
        "layernorm_linear": lambda *_: qkv,
        "attention": lambda *_: y.unflatten(2, heads),
        "linear_residual": lambda x, *_: (y if x.ndim == 3 else y[:, 0], None),
        "layernorm": lambda *_: y,
        "attention_pool": lambda *_: y[:, 0],
    }
    with (
        mock.patch.multiple(cpu, **nothing_at_all),
        mock.patch.multiple("siglip_fast.ops", check_shape=lambda *_: None),
    ):
        times = medians({"host": lambda: model(pixels), "route": lambda: model._route(pixels)})
    share = times["host"] / whole
    return f"| {name} | {whole / 1e3:.1f} ms | {times['host']:.0f} | {share:.2%} | {times['route']:.0f} |"


def report() -> Iterator[str]:
    yield "| model | batch | launches | bare launches | eager | with hidden_states | forward_uint8 | torch.compile | graph replay | until it begins | route alone |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    with pretended(), torch.no_grad():
        for name in MODELS:
            for batch in (1, 8):
                yield on_gpu(name, batch)
        yield ""
        yield "| images of any size | launches | bare launches | without plans | new sizes | sizes that came before |"
        yield "|---|---|---|---|---|---|"
        yield from map(any_size, PACKED)
    yield ""
    yield "| cpu backend | forward, bf16 | host | share | route alone |"
    yield "|---|---|---|---|---|"
    with torch.no_grad():
        yield from map(on_cpu, MODELS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    lines = []
    for line in report():
        print(line, flush=True)
        lines.append(line)
    if arguments.markdown:
        with atomic(arguments.markdown) as file:
            file.write("\n".join([*HEAD, *lines, ""]).encode())


if __name__ == "__main__":
    main()
