"""A GPU's measurements beside the predictions that bench/predict.py made of them, as Markdown."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from results import union
from tables import TARGET_PEERS, header, line, number

Case = tuple[str, int]  # model and batch size
# By predicted route, the candidates that measure it, the first that is there. Ours is predicted as in a graph.
FORWARDS = {"siglip_fast": ("siglip_fast, graph", "siglip_fast")} | {peer: (peer,) for peer in TARGET_PEERS}
ROUTES = ("siglip_fast", "vendor")  # the routes whose operations are measured by themselves


class Pair(NamedTuple):
    """One time, predicted and measured."""

    predicted: float | None
    measured: float | None

    @property
    def ratio(self) -> float | None:
        return self.measured / self.predicted if self.predicted and self.measured else None

    def cells(self) -> list[str]:
        times = ["–" if time is None else number(time) for time in (self.predicted, self.measured)]
        return [*times, "–" if self.ratio is None else f"{self.ratio:.2f}"]


Forwards = dict[Case, dict[str, Pair]]  # by route, in milliseconds
Operations = dict[Case, dict[str, dict[str, Pair]]]  # by operation and route, in microseconds


def load(path: Path) -> dict | None:
    """None where there are no predictions."""
    return json.loads(path.read_text()) if path.exists() else None


def section(results: list[dict], predictions: dict | None, kernels: str) -> list[str]:
    """Nothing without predictions or a GPU; `kernels` is the hash of the kernel sources of this checkout."""
    on_gpu = [r for r in results if r["about"]["gpu_measured"] or r["about"]["imitated"]]
    if predictions is None or not on_gpu:
        return []
    routes = {(p["model"], p["batch_size"]): p["routes"] for p in predictions["predictions"]}
    lines = ["", "## Beside the predictions", ""]
    found = [r for r in on_gpu if is_h200(r["about"]["device"]) and r["dtype"] == "bfloat16" and case(r) in routes]
    if not found:
        return [*lines, _NONE.format(models=" and ".join(union([model] for model, _ in routes)))]
    lines.append(_ORIGIN.format(made=predictions["made"]))
    if predictions["kernels"] != kernels:
        lines += ["", _OTHER_KERNELS.format(predicted=predictions["kernels"], kernels=kernels)]
    operations = pair_operations([r for r in found if r["kind"] == "kernel"], routes)
    lines += forward_table(pair_forwards([r for r in found if r["kind"] == "model"], routes))
    return [*lines, *furthest_line(operations), *operation_tables(operations)]


_ORIGIN = """\
The predictions (docs/predictions.md) were made on {made} and are not edited afterwards. A case is here if it was both
predicted and measured; – stands for what one of the two lacks. Measured ÷ predicted is above 1 where the GPU was slower."""
_NONE = "None of these measurements was predicted: the predictions are of {models} in bfloat16 on an H200."
_OTHER_KERNELS = (
    "**The predictions are of other kernels**: their sources are {predicted}, those of this checkout {kernels}."
)
_FORWARDS = """\
What is predicted is time on the GPU, as in a CUDA graph; what is measured includes the host's part. siglip_fast is the
one in a CUDA graph where that was measured."""
_OPERATIONS = """\
Microseconds a call: siglip_fast in its default configuration, and the fastest of the vendor's routes. The head is not
measured by itself."""


def is_h200(device: str) -> bool:
    return bool(re.search(r"\bH200\b", device))  # a GH200 is another GPU


def case(result: dict) -> Case:
    return result["model"], result["batch_size"]


def pair_forwards(models: list[dict], routes: dict[Case, dict]) -> Forwards:
    paired: Forwards = {}
    for r in models:
        predicted = {route: routes[case(r)].get(route, {}).get("milliseconds") for route in FORWARDS}
        measured = milliseconds(r)
        paired[case(r)] = {
            route: Pair(predicted[route], next((measured[name] for name in names if name in measured), None))
            for route, names in FORWARDS.items()
        }
    return paired


def pair_operations(kernels: list[dict], routes: dict[Case, dict]) -> Operations:
    """Every operation of a case of which one was measured, those that were predicted first and in their order."""
    paired: Operations = {}
    for r in kernels:
        predicted = {route: routes[case(r)].get(route, {}).get("operations_us", {}) for route in ROUTES}
        unmeasured = {name: pairs_of(name, predicted, {}) for name in union(predicted.values())}
        paired.setdefault(case(r), unmeasured)[r["operation"]] = pairs_of(r["operation"], predicted, milliseconds(r))
    return paired


def pairs_of(operation: str, predicted: dict[str, dict], measured: dict[str, float]) -> dict[str, Pair]:
    ours = [1e3 * time for name, time in measured.items() if name == "siglip_fast"]
    vendor = [1e3 * time for name, time in measured.items() if name.startswith("vendor: ")]
    times = zip(ROUTES, (ours, vendor), strict=True)
    return {route: Pair(predicted[route].get(operation), min(found, default=None)) for route, found in times}


def milliseconds(result: dict) -> dict[str, float]:
    return {name: figures["milliseconds"] for name, figures in result["candidates"].items()}


def forward_table(forwards: Forwards) -> list[str]:
    if not forwards:
        return []
    lines = ["", "### Forwards", "", _FORWARDS, "", header("ms, of model, B", columns(FORWARDS))]
    for (model, batch_size), pairs in forwards.items():
        lines.append(line(f"{model}, {batch_size}", [text for pair in pairs.values() for text in pair.cells()]))
    return lines


def operation_tables(operations: Operations) -> list[str]:
    """One a model and batch size."""
    lines = ["", _OPERATIONS] if operations else []
    for (model, batch_size), pairs in operations.items():
        lines += ["", f"### Operations of {model}, B = {batch_size}", "", header("µs", columns(ROUTES))]
        lines += [line(name, [text for pair in both.values() for text in pair.cells()]) for name, both in pairs.items()]
    return lines


def columns(routes: Iterable[str]) -> list[str]:
    return [f"{route}: {what}" for route in routes for what in ("predicted", "measured", "measured ÷ predicted")]


def furthest_line(operations: Operations) -> list[str]:
    named = [f"{name} of {model}, B = {batch_size}: {r:.2f}" for (model, batch_size), name, r in furthest(operations)]
    if not named:
        return []
    return ["", f"**Furthest from their predictions** (siglip_fast, measured ÷ predicted): {'; '.join(named)}."]


def furthest(operations: Operations) -> list[tuple[Case, str, float]]:
    """Case, operation and ratio of the three of siglip_fast furthest from 1, where half is as far as double."""
    ratios = [
        (of, name, ratio)
        for of, pairs in operations.items()
        for name, both in pairs.items()
        if (ratio := both["siglip_fast"].ratio)
    ]
    return sorted(ratios, key=lambda found: -abs(math.log(found[2])))[:3]
