"""`siglip-fast info`: versions, device, what would run here and why, whether it is right, and its cost in memory."""

import functools
import platform
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..backends.select import load
from ..errors import typed_line
from ..feed.kinds import kind_of
from ..feed.loading import load_model, pick_device, route
from ..models.base import Fused
from ..ops import Linear, NormedLinear, PatchEmbedding
from ..tuning import cache, packed_cases
from ..tuning.cache import LAUNCHES, Selection, version_of
from ..tuning.cases import Case, cases, inputs
from ..tuning.verify import Verifier


def run(args: Namespace) -> int:
    device = pick_device(args.device)
    print(versions())
    print(machine(device))
    model = load_model(args, device, getattr(torch, args.dtype))
    example = {name: values.to(device) for name, values in kind_of(model.config).example().items()}
    with torch.inference_mode():
        print(f"runs on: {route(model, example)}")
        fused = model.why_not(**example) is None
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    derived = f"{model.derived_bytes() / 1e6:.0f} MB"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        if fused and model.dtype == torch.float32 and not model.why_not(**example):  # which derives its own
            derived += f", and inside torch.autocast to bfloat16 {model.derived_bytes() / 1e6:.0f} MB in all"
    print(f"parameters: {parameters / 1e6:.0f} MB; derived weights beside them: {derived}")
    if not fused:
        return 0
    with torch.no_grad():
        return 0 if check_operations(model, device) else 1


def check_operations(model: Fused, device: torch.device) -> bool:
    """Prints, for each operation of a small forward, what runs it and whether its result is right here."""
    backend = model.backend_for(device)
    implementation = load(backend, Selection.load, model.batch_invariant)
    if backend == "triton":
        print(
            f"measured configurations: {'not used (batch invariant)' if model.batch_invariant else cache_state(device)}"
        )
        selection = implementation.selection(device)
    checks = checks_of(model)
    print(f"operations{checks.remark}, each checked against higher precision on made-up inputs:")
    all_right = True
    for case in checks.cases:
        try:
            run = getattr(implementation, case.operation.name)
            args = checks.inputs(case, device)
            args_as_run = packed(args, implementation, case.rows if checks.one_size else 1)
            wrong = Verifier(case, device, args)(functools.partial(run, *args_as_run))
        except Exception as error:  # a self-check tells of whatever fails
            wrong = typed_line(error)
        all_right &= wrong is None
        print(f"  {case}: {wrong or 'right'}")
        if backend == "triton":
            for launch in LAUNCHES:
                choice = selection.choice(*case.operation, case.rows, launch)
                print(f"    {launch}: {choice} ({selection.reason(case.operation, case.rows, launch)})")
    return all_right


ROWS = 282  # of the images that are checked, where they may have any size: the shares of packed_cases are then patches


class Checks(NamedTuple):
    """Of which operations, on what."""

    cases: list[Case]
    inputs: Callable[[Case, torch.device], tuple]
    one_size: bool  # of images, for whose number of tokens weights may be packed
    remark: str


def checks_of(model: Fused) -> Checks:
    """Those of a model's operations on one image, or on a mix of sizes where it takes any."""
    config = model.config
    if kind_of(config).keeps_aspect:
        keys = packed_cases.mix(ROWS).keys
        remark = f" on {len(keys)} images of {min(keys)} to {max(keys)} patches"
        return Checks(packed_cases.cases(config, model.dtype, ROWS), packed_cases.inputs, False, remark)
    return Checks(cases(config, packed_cases.usual_tokens(config), model.dtype, [1]), inputs, True, "")


def packed(args: tuple, implementation: Any, tokens: int) -> list:
    """With the weights as the backend wants them for images of so many tokens, as `siglip_fast.models.weights` packs them."""
    packable = (PatchEmbedding, Linear, NormedLinear)
    return [implementation.pack(arg, tokens) if isinstance(arg, packable) else arg for arg in args]


def cache_state(device: torch.device) -> str:
    """In words: where the cache file is and what it holds."""
    key = cache.Key.of(device)
    if cache.mode() == "off":
        return "not used (SIGLIP_FAST_TUNE=off)"
    entries = cache.read(key)
    if not entries:
        return f"none for {key.gpu}, driver {key.driver} (`siglip-fast tune` makes them)"
    every = [entry for buckets in entries.values() for entry in buckets.values()]
    raced = sum(map(cache.is_raced, every))
    how = f", {raced} of them raced, not tuned," if raced else ""
    return f"{len(every)} of {len(entries)} operations{how} in {key.path()}"


def versions() -> str:
    packages = ("siglip-fast", "torch", "triton", "transformers")
    found = [f"{name} {version_of(name) or 'not installed'}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device}: {platform.machine()}, {torch.get_num_threads()} threads, {onednn}, {capability}"
