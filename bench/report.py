"""Table and plot of a CPU benchmark: `python bench/report.py RESULTS.json… [--markdown OUT.md] [--plot OUT.png]`.

RESULTS.json is what `pytest bench/test_cpu.py --benchmark-json RESULTS.json` wrote; several are put together.
"""

import argparse
import json
import sys
from pathlib import Path

from siglip_fast.sinks import atomic


def table(cases: list[dict]) -> list[str]:
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
        lines.append(f"| {variant}, {batch_size}, {dtype} | {' | '.join(cells)} | {matmul_limit(case):.0f} |")
    return lines


def matmul_limit(case: dict) -> float:
    """Milliseconds of the forward's FLOPs at the speed of the best GEMM."""
    return case["gflops"] / case["matmul_peak_gflops"] * 1e3


def markdown(about: dict, cases: list[dict], picture: str | None) -> str:
    machine, first = about["machine_info"], cases[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    missing = sorted({peer for case in cases for peer in case["missing"]})
    errors = [(case["case"], case["relative_error"]) for case in cases]
    return "\n".join(
        [
            "# The CPU backend against its peers",
            "",
            "Written by `python bench/report.py RESULTS.json --markdown docs/cpu.md --plot docs/cpu.png` from what",
            f"`pytest bench/test_cpu.py --benchmark-json RESULTS.json` measured on {about['datetime'][:10]}.",
            f"{machine['cpu']['brand_raw']}, {first['threads']} threads, Python {machine['python_version']}, {versions}.",
            "",
            "Median milliseconds a forward, and in parentheses how many times faster siglip_fast is. Every round ran each",
            "peer once, in turns. Matmul limit: the forward's FLOPs at the speed of oneDNN's best plain GEMM in the same run.",
            "",
            *table(cases),
            "",
            *([f"![The same as bars]({picture})", ""] if picture else []),
            "Relative error of pooler_output against stock eager in float32, siglip_fast's and the worst of all peers:",
            "",
            *(
                f"- {' '.join(map(str, case))}: {error['siglip_fast']:.1e}, worst {max(error.values()):.1e}"
                for case, error in errors
            ),
            *(["", "Not there: " + "; ".join(missing) + "."] if missing else []),
            "",
        ]
    )


def plot(cases: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(12, 2.4 * rows), squeeze=False, layout="constrained")
    for axis, case in zip(axes.flat, cases, strict=False):
        times = sorted(case["milliseconds"].items(), key=lambda item: -item[1])
        colors = ["tab:orange" if name == "siglip_fast" else "tab:gray" for name, _ in times]
        bars = axis.barh([name for name, _ in times], [value for _, value in times], color=colors)
        axis.bar_label(bars, fmt="%.0f", padding=2)
        axis.axvline(matmul_limit(case), color="tab:blue", linestyle=":")
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
    cases = [benchmark["extra_info"] for file in files for benchmark in file["benchmarks"]]
    if not cases:
        print("no benchmark in there")
        return 1
    print("\n".join(table(cases)))
    if arguments.markdown:
        with atomic(arguments.markdown) as file:
            picture = arguments.plot.name if arguments.plot else None
            file.write(markdown(files[0], cases, picture).encode())
    if arguments.plot:
        plot(cases, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
