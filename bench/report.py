"""Markdown, CSV and plots of benchmark results: `python bench/report.py ROWS.jsonl… --out FOLDER`.

ROWS.jsonl are what `pytest bench/test_model.py --rows ROWS.jsonl` and the same of bench/test_kernels.py wrote, whole or
cut short. A file that is not there, or holds nothing, is named; what the others hold is reported. What was measured on
an H200 is set beside docs/predictions.json. Without matplotlib there are no plots.
"""

import argparse
import csv
import importlib.util
import io
import sys
from pathlib import Path

import beside
import results
import tables

from siglip_fast.files import atomic
from siglip_fast.tuning.cache import source_hash

PREDICTIONS = Path(__file__).resolve().parents[1] / "docs" / "predictions.json"


def write(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    arguments = parser.parse_args()
    measured, wrong = results.load(arguments.results)
    if not measured:
        print("nothing to report: " + "; ".join(wrong))
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    flat = results.rows(measured)
    sheet = io.StringIO()
    table = csv.DictWriter(sheet, results.union(flat), lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    write(arguments.out / "results.csv", sheet.getvalue())
    predicted = beside.section(measured, beside.load(PREDICTIONS), source_hash())
    write(arguments.out / "README.md", tables.markdown(measured, wrong, predicted, []))  # should a plot fail
    if importlib.util.find_spec("matplotlib"):
        import plots

        pictures = plots.draw(measured, arguments.out)
        missing = []
    else:
        pictures, missing = [], ["no plots: matplotlib is not installed"]
    text = tables.markdown(measured, wrong + missing, predicted, pictures)
    write(arguments.out / "README.md", text)
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
