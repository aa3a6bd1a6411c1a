"""Table and plot of a CPU benchmark: `python bench/report.py RESULTS.json… [--markdown OUT.md] [--plot OUT.png]`.

RESULTS.json is what `pytest bench/test_cpu.py --benchmark-json RESULTS.json` wrote; several are put together.
"""

import argparse
import json
import sys
from pathlib import Path

from siglip_fast.sinks import atomic


def table(results: dict) -> list[str]:
    cases = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    peers = list(dict.fromkeys(peer for case in cases for peer in case["milliseconds"]))
    lines = [
        f"| model, batch, dtype | {' | '.join(peers)} | matmul limit |",
        "|---|" + "---|" * (len(peers) + 1),
    ]
    for case in cases:
        variant, batch_size, dtype = case["case"]
        cells = []
        for peer in peers:
            if peer not in case["milliseconds"]:
                cells.append("–")
                continue
            ratio = "" if peer == "siglip_fast" else f" ({case['speedup'][peer]:.2f})"
            cells.append(f"{case['milliseconds'][peer]:.0f}{ratio}")
        limit = case["gflops"] / case["matmul_peak_gflops"] * 1e3
        lines.append(f"| {variant}, {batch_size}, {dtype} | {' | '.join(cells)} | {limit:.0f} |")
    return lines


def markdown(results: dict, picture: str | None) -> str:
    machine, first = results["machine_info"], results["benchmarks"][0]["extra_info"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    missing = sorted({m for benchmark in results["benchmarks"] for m in benchmark["extra_info"]["missing"]})
    errors = [
        (max(info["relative_error"].values()), info["relative_error"]["siglip_fast"], info["case"])
        for info in (benchmark["extra_info"] for benchmark in results["benchmarks"])
    ]
    return "\n".join(
        [
            "# The CPU backend against its peers",
            "",
            f"Written by `python bench/report.py` from `pytest bench/test_cpu.py`, {results['datetime'][:10]}.",
            f"{machine['cpu']['brand_raw']}, {first['threads']} threads, Python {machine['python_version']}, {versions}.",
            "",
            "Median milliseconds a forward, and in parentheses how many times faster siglip_fast is. Every round ran each",
            "peer once, in turns. Matmul limit: the forward's FLOPs at the speed of oneDNN's best plain GEMM in the same run.",
            "",
            *table(results),
            "",
            *([f"![The same as bars]({picture})", ""] if picture else []),
            "Relative error of pooler_output against stock eager in float32, siglip_fast's and the worst of all peers:",
            "",
            *(f"- {' '.join(map(str, case))}: {ours:.1e}, worst {worst:.1e}" for worst, ours, case in errors),
            *(["", "Not there: " + "; ".join(missing) + "."] if missing else []),
            "",
        ]
    )


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    columns = 2
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.4 * rows), squeeze=False, layout="constrained")
    for axis, case in zip(axes.flat, cases, strict=False):
        times = sorted(case["milliseconds"].items(), key=lambda item: -item[1])
        colors = ["tab:orange" if name == "siglip_fast" else "tab:gray" for name, _ in times]
        bars = axis.barh([name for name, _ in times], [value for _, value in times], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.axvline(case["gflops"] / case["matmul_peak_gflops"] * 1e3, color="tab:blue", linestyle=":")
        axis.set_title("{}, batch {}, {}".format(*case["case"]))
        axis.set_xlabel("ms (dotted: matmul limit)")
        axis.margins(x=0.12)
    for axis in list(axes.flat)[len(cases) :]:
        axis.remove()
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    files = [json.loads(path.read_text()) for path in arguments.results]
    results = files[0] | {"benchmarks": [benchmark for file in files for benchmark in file["benchmarks"]]}
    if not results["benchmarks"]:
        print("no benchmark in there")
        return 1
    print("\n".join(table(results)))
    if arguments.markdown:
        with atomic(arguments.markdown) as file:
            picture = arguments.plot.name if arguments.plot else None
            file.write(markdown(results, picture).encode())
    if arguments.plot:
        plot(results, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
