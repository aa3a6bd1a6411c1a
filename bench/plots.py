"""The pictures of a benchmark: images a second by batch size, and how many times faster ours is, model and kernels."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogFormatter  # noqa: E402
from results import entered, grouped, ratio, union  # noqa: E402

_OURS, _PEER = "tab:orange", "tab:gray"
_WARM = ["tab:orange", "tab:red", "gold", "firebrick", "sandybrown"]  # ours
_COOL = ["black", "dimgray", "darkgray", "tab:blue", "tab:cyan", "tab:purple", "tab:green", "olive", "navy", "teal"]


def draw(results: list[dict], folder: Path) -> list[str]:
    """Writes them, and returns their names."""
    models = [r for r in results if r["kind"] == "model"]
    kernels = [r for r in results if r["kind"] == "kernel"]
    drawn = []
    for name, make, chosen in [
        ("images_per_second.png", _speeds, models),
        ("ratios.png", _ratios, models),
        ("kernels.png", _kernels, kernels),
    ]:
        if chosen:
            figure = make(chosen)
            if chosen[0]["about"]["imitated"]:
                figure.suptitle("REHEARSAL: no GPU, nothing measured", color="red", size="x-large")
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
            drawn.append(name)
    return drawn


def _speeds(results: list[dict]) -> plt.Figure:
    """A panel a model and dtype, a line a candidate."""
    groups = grouped(results, "model", "dtype")
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1 + 5 * columns, 4.5 * rows), squeeze=False, layout="constrained"
    )
    names = entered(results)
    ours = [name for name in names if name.startswith("siglip_fast")]
    peers = [name for name in names if name not in ours]
    for axis, ((model, dtype), group) in zip(axes.flat, groups.items(), strict=False):
        for name in names:
            at = [k for k, r in enumerate(group) if name in r["candidates"]]
            speeds = [group[k]["candidates"][name]["images_per_second"] for k in at]
            width, color = (2.5, _WARM[ours.index(name)]) if name in ours else (1.2, _COOL[peers.index(name)])
            axis.plot(at, speeds, label=name, marker="o", lw=width, color=color)
        axis.set_xticks(range(len(group)), [str(r["batch_size"]) for r in group])
        axis.set(title=f"{model}, {dtype}", xlabel="batch size", ylabel="images/s")
        if len(group) > 1:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())  # 1000, not 10³
        axis.margins(x=0.1, y=0.1)
        axis.grid(alpha=0.3, which="both")
    for axis in list(axes.flat)[len(groups) :]:
        axis.remove()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def _ratios(results: list[dict]) -> plt.Figure:
    """A panel a case, a bar a candidate."""
    names = entered(results)
    colors = [_OURS if name.startswith("siglip_fast") else _PEER for name in names]
    figure, panels = _grid(results, len(names))
    for axis, (result,) in panels:
        found = result["candidates"]
        _bars(axis, names, [ratio(result, name) if name in found else math.nan for name in names], colors)
    figure.supxlabel("time ÷ that of the fastest of ours", fontsize="medium")
    return figure


def _kernels(results: list[dict]) -> plt.Figure:
    """A panel a case, a bar an operation."""
    names = union([r["operation"]] for r in results)
    figure, panels = _grid(results, len(names))
    for axis, group in panels:
        values = dict.fromkeys(names, math.nan)
        for r in group:
            routes = [f["milliseconds"] for name, f in r["candidates"].items() if name != "siglip_fast"]
            values[r["operation"]] = min(routes, default=math.nan) / r["candidates"]["siglip_fast"]["milliseconds"]
        _bars(axis, names, list(values.values()), [_PEER if v < 1 else _OURS for v in values.values()])
    figure.supxlabel("time of torch's fastest route ÷ ours (grey: torch is faster)", fontsize="medium")
    return figure


def _grid(results: list[dict], bars: int) -> tuple[plt.Figure, list]:
    """Rows of models and dtypes, columns of batch sizes; the axes with the results that belong into them."""
    models, sizes = list(grouped(results, "model", "dtype")), sorted({r["batch_size"] for r in results})
    figure, axes = plt.subplots(
        len(models),
        len(sizes),
        figsize=(2.5 + 3.2 * len(sizes), 0.6 + len(models) * (0.8 + 0.25 * bars)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    cases, panels = grouped(results, "model", "dtype", "batch_size"), []
    for row, (model, dtype) in zip(axes, models, strict=True):
        for axis, size in zip(row, sizes, strict=True):
            axis.set_title(f"{model}\n{dtype}, B = {size}", fontsize="medium")
            if group := cases.get((model, dtype, size)):
                panels.append((axis, group))
            else:
                axis.set_visible(False)
    return figure, panels


def _bars(axis: plt.Axes, names: list[str], values: list[float], colors: list[str]) -> None:
    places = range(len(names))
    widths = [0 if math.isnan(value) else value for value in values]
    axis.barh(places, widths, color=colors)
    axis.axvline(1, color="black", lw=0.8)
    for place, width in zip(places, widths, strict=True):
        axis.annotate(
            f"{width:.2f}" if width else "–",
            (width, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # the line at 1 does not cross it
        )
    axis.set_yticks(places, names)
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axis.set_xlim(0, 1.25 * max(*widths, 1))
