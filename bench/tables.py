"""Benchmark results as Markdown."""

from results import entered, fastest_of_ours, grouped, ratio

# Ratios to reach on a Hopper GPU (set for an H100) in bf16 with the fastest of ours, by model and batch: against sdpa, against max-autotune.
TARGETS = {
    ("base-patch16-224", 1): (10, 1.3),
    ("base-patch16-224", 8): (4, 1.15),
    ("base-patch16-224", 64): (1.4, 1.1),
    ("base-patch16-224", 256): (1.35, 1.1),
    ("so400m-patch14-384", 1): (4, 1.15),
    ("so400m-patch14-384", 8): (1.3, 1.05),
    ("so400m-patch14-384", 64): (1.25, 1.05),
    ("so400m-patch14-384", 256): (1.25, 1.03),
}
TARGET_PEERS = ("stock sdpa", "torch.compile, max-autotune")


def markdown(results: list[dict], wrong: list[str], predicted: list[str], pictures: list[str]) -> str:
    """`predicted` is the section about the predictions, of bench/beside.py."""
    models = [r for r in results if r["kind"] == "model"]
    kernels = [r for r in results if r["kind"] == "kernel"]
    packed = [r for r in results if r["kind"] == "packed"]
    lines = [_IMITATED] if results[0]["about"]["imitated"] else ["# Benchmark"]
    lines += ["", "Written by `python bench/report.py`, which bench/run_gpu.sh runs.", ""]
    for about in {r["about"]["measured"]: r["about"] for r in results}.values():  # of each session
        lines += [*where_measured(about), ""]
    lines += [f"\n**{problem}**" for problem in wrong]
    if models:
        lines += ["", "## The whole model", "", _MODELS, *model_tables(models), *latency_tables(models)]
        lines += target_table(models)
        lines += ["", "## Agreement", "", _AGREEMENT, "", *errors(models)]
    if packed:
        lines += ["", "## Images of any size", "", _PACKED, *model_tables(packed), "", *errors(packed)]
    if kernels:
        lines += ["", "## The operations", "", _KERNELS, *kernel_tables(kernels)]
    lines += predicted
    for picture in pictures:
        lines += ["", f"![{picture.removesuffix('.png').replace('_', ' ')}]({picture})"]
    if lacking := missing(models) + missing(packed) + missing(kernels):
        lines += ["", "## Not there", "", *lacking]
    if results[0]["about"]["imitated"]:
        lines = [f"{text}, NONSENSE" if text.startswith("##") else text for text in lines]
    return "\n".join([*lines, ""])


_IMITATED = """\
# Rehearsal: no GPU, nothing measured

**Every time and every rate below is nonsense, and nothing was computed**: bench/imitated_gpu.py stood in for a GPU."""
_MODELS = """\
Images a second, from the median time of a forward, the host's part included; in parentheses how many times faster the
fastest of ours is. Every round ran each candidate once, in turns. The matmul peak is that of the vendor's best plain
GEMM, measured after the case. All of it, with the clocks before and after, is in results.csv and rows.jsonl."""
_LATENCY = """\
Median milliseconds of a forward that is waited for before the next one begins, as a single request is, in the same
cases."""
_AGREEMENT = """\
Relative error of pooler_output against stock eager in float32, of up to eight images of the batch, checked before the
timing in the same run."""
_PACKED = """\
As above, of towers that take such; what each batch holds is in bench/packed_cases.py. On a CPU they have four layers."""
_KERNELS = """\
Median microseconds a call; in parentheses how many times faster siglip_fast is. TFLOP/s and GB/s (each argument and
result moved once) are siglip_fast's. Results are checked against float64 before the timing. bench/test_kernels.py
says how it is done."""


def where_measured(about: dict) -> list[str]:
    where = f"driver {about['driver']}" if about["gpu_measured"] else f"{about['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['device']}, {where}, {versions}. Revision {about['revision']}, measured {about['measured']}.",
        f"Tuned configurations: {', '.join(about['tuned']) or 'none'}.",
    ]
    if about["imitated"]:
        lines = ["**IMITATED GPU: not measured.**", "", *lines]
    elif not about["gpu_measured"]:
        lines = ["**GPU: not measured.** These are a CPU's figures, of the cpu backend.", "", *lines]
    return lines


def model_tables(results: list[dict]) -> list[str]:
    """One a model and dtype: a row a candidate, a column a batch size."""
    lines = []
    for (model, dtype), group in grouped(results, "model", "dtype").items():
        lines += ["", f"### {model}, {dtype}", "", header("images/s", [f"B = {r['batch_size']}" for r in group])]
        for name in entered(group):
            lines.append(line(name, [cell(r, name) for r in group]))
        best = [fastest_of_ours(r) for r in group]
        figures = [r["candidates"][name] for r, name in zip(group, best, strict=True)]
        lines.append(line("*fastest of ours*", best))
        lines.append(line("*its TFLOP/s*", [f"{f['tflops']:.4g}" for f in figures]))
        lines.append(line("*its share of the matmul peak*", [f"{f['percent_of_peak']:.0f} %" for f in figures]))
        lines.append(line("*the matmul peak, TFLOP/s*", [f"{r['matmul_peak_tflops']:.4g}" for r in group]))
    return lines


def latency_tables(results: list[dict]) -> list[str]:
    """One a model and dtype for which latency was measured."""
    lines = []
    for (model, dtype), group in grouped(results, "model", "dtype").items():
        columns = [{name: f.get("latency_milliseconds") for name, f in r["candidates"].items()} for r in group]
        if not any(value for column in columns for value in column.values()):
            continue
        lines += ["", f"### Latency of {model}, {dtype}", "", _LATENCY, ""]
        lines.append(header("ms", [f"B = {r['batch_size']}" for r in group]))
        for name in entered(group):
            lines.append(line(name, [number(column[name]) if column.get(name) else "–" for column in columns]))
    return lines


def target_table(results: list[dict]) -> list[str]:
    """Only of GPUs of an H100's architecture, for which the targets were set."""
    wanted = [r for r in results if r["about"]["capability"] == "9.0" and r["dtype"] == "bfloat16"]
    wanted = [r for r in wanted if (r["model"], r["batch_size"]) in TARGETS]
    if not wanted:
        return []
    columns = [f"times {peer}: {what}" for peer in TARGET_PEERS for what in ("target", "measured")]
    lines = ["", "## Targets", "", header("model, B", columns)]
    for r in wanted:
        targets = zip(TARGET_PEERS, TARGETS[r["model"], r["batch_size"]], strict=True)
        cells = [text for peer, target in targets for text in (f"≥ {target}", verdict(r, peer, target))]
        lines.append(line(f"{r['model']}, {r['batch_size']}", cells))
    return lines


def verdict(result: dict, peer: str, target: float) -> str:
    if peer not in result["candidates"]:
        return "not measured"
    if result["about"]["imitated"]:
        return "nonsense"
    reached = ratio(result, peer)
    return f"{reached:.2f}, {'met' if reached >= target else '**missed**'}"


def errors(results: list[dict]) -> list[str]:
    lines = [header("relative error", ["siglip_fast, the worst of its variants", "the worst of the peers"])]
    for r in results:
        found = {name: figures["relative_error"] for name, figures in r["candidates"].items()}
        ours = max(error for name, error in found.items() if name.startswith("siglip_fast"))
        others = max((error for name, error in found.items() if not name.startswith("siglip_fast")), default=0)
        case = f"{r['model']}, {r['batch_size']}, {r['dtype']}"
        lines.append(line(case, [f"{ours:.1e}", f"{others:.1e}"]))
    return lines


def kernel_tables(results: list[dict]) -> list[str]:
    lines = []
    for (model, batch_size, dtype), group in grouped(results, "model", "batch_size", "dtype").items():
        names = entered(group)
        lines += ["", f"### {model}, B = {batch_size}, {dtype}", ""]
        lines.append(header("µs", [*names, "TFLOP/s", "% of the matmul peak", "GB/s"]))
        for r in group:
            cells = [cell(r, name, "milliseconds", 1e3) for name in names]
            ours = r["candidates"]["siglip_fast"]
            rates = [f"{ours['tflops']:.3g}", f"{ours['percent_of_peak']:.0f}"] if ours["tflops"] else ["–", "–"]
            lines.append(line(r["operation"], [*cells, *rates, number(r["mb"] / ours["milliseconds"])]))
    return lines


def missing(results: list[dict]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in results:
        for name, why in r["missing"].items():
            case = f"{r['model']} {r['batch_size']} {r['dtype']} {r.get('operation', '')}".strip()
            reasons.setdefault((name, why), []).append(case)
    return [
        f"- {name}: {why} ({'everywhere' if len(cases) == len(results) else ', '.join(cases)})"
        for (name, why), cases in reasons.items()
    ]


def header(first: str, others: list[str]) -> str:
    return f"{line(first, others)}\n|---{'|---' * len(others)}|"


def line(first: str, cells: list[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def cell(result: dict, name: str, key: str = "images_per_second", scale: float = 1) -> str:
    """The figure and, of others than the fastest of ours, how many times faster that is."""
    if name not in result["candidates"]:
        return "–"
    value = number(scale * result["candidates"][name][key])
    return value if name == fastest_of_ours(result) else f"{value} ({ratio(result, name):.2f})"


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
