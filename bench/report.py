"""Markdown, JSON, CSV and plots of benchmark results: `python bench/report.py RESULTS.json… --out FOLDER`.

RESULTS.json are what `pytest bench/test_model.py --benchmark-json RESULTS.json` and the same of bench/test_kernels.py
wrote. A file that is not there, or holds nothing, is named; what the others hold is reported. What was measured on an
H200 is set beside docs/predictions.json.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

import beside
import plots
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
    write(arguments.out / "results.json", json.dumps(flat, indent=1) + "\n")
    sheet = io.StringIO()
    table = csv.DictWriter(sheet, results.union(flat), lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    write(arguments.out / "results.csv", sheet.getvalue())
    predicted = beside.section(measured, beside.load(PREDICTIONS), source_hash())
    text = tables.markdown(measured, wrong, predicted, plots.draw(measured, arguments.out))
    write(arguments.out / "README.md", text)
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
