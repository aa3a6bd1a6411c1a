"""Which models of transformers siglip_fast reaches: runs the zoo on the installed transformers and writes
docs/support-matrix.json and, from it, docs/support-matrix.md. Other versions' results are kept.

    python tests/helpers/support_matrix.py
"""

import json
import tempfile
from pathlib import Path

import transformers
import zoo
from packaging.version import Version

import siglip_fast

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, TABLE = DOCS / "support-matrix.json", DOCS / "support-matrix.md"

HEAD = """# Support matrix

Tiny random models of each architecture (`tests/helpers/zoo.py`), fp32 on the CPU; written by `python tests/helpers/support_matrix.py`
in an environment with the transformers version of the column, checked by `tests/models/test_support_matrix.py`.

- **fused**: the tower ran on the fused operations, every layer of it; behind it the largest relative error of any
  tensor of the model's output against stock's. Where `register()` is said too, `from_pretrained` builds the tower fast
  after `siglip_fast.register()` (AutoModel's, for SiglipVisionModel and Siglip2VisionModel); where it is not, the model needs
  `siglip_fast.apply_to(model)`.
- **delegated**: the tower is swapped and runs stock's code for these inputs.
- **untouched**: the tower is left as it is.
- **absent**: this transformers has no such model.

Where a tower runs fused it is batch invariant if asked (`batch_invariant=True`, docs/batch-invariance.md), but for what the
model computes around it; where it is delegated or untouched it is as stock's.

How many kernels each tower launches, and how often the host waits for it: [launches.md](launches.md).

Reasons are below the table.
"""


def outcome(model: transformers.PreTrainedModel, inputs: zoo.Inputs) -> dict[str, str | float]:
    """What `apply_to` does to a stock model: `path`, and `error` or `reason`."""
    expected = zoo.run(model, inputs)
    siglip_fast.apply_to(model)
    towers = siglip_fast.towers(model)
    if not any(tower.fast for tower in towers):
        return {"path": "untouched", "reason": "; ".join(tower.reason for tower in towers)}
    with zoo.fused_attentions() as attentions:
        actual = zoo.run(model, inputs)
    if attentions:
        return {"path": "fused", "error": float(f"{zoo.error(actual, expected):.0e}")}
    siglip_fast.restore(model)
    siglip_fast.apply_to(model, strict=True)
    try:
        zoo.run(model, inputs)
    except RuntimeError as error:
        return {"path": "delegated", "reason": str(error).removeprefix("the fused forward does not apply: ")}
    raise AssertionError("neither fused nor delegated")


def is_registered(model: transformers.PreTrainedModel) -> bool:
    """Whether `from_pretrained` builds a fast tower after `siglip_fast.register()`."""
    # which class is called for is not a registration's to change
    named = (transformers.SiglipVisionModel, transformers.Siglip2VisionModel)
    loader = transformers.AutoModel if type(model) in named else type(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        siglip_fast.register()
        try:
            loaded = loader.from_pretrained(folder)
        finally:
            siglip_fast.unregister()
    return any(tower.fast for tower in siglip_fast.towers(loaded))


def measure(name: str) -> dict[str, str | float | bool]:
    try:
        model, inputs = zoo.ZOO[name]()
    except zoo.Absent as error:
        return {"path": "absent", "reason": str(error)}
    registered = is_registered(model)
    return {"class": type(model).__name__, **outcome(model, inputs), "register": registered}


def table(results: dict[str, dict]) -> str:
    versions = sorted(results, key=Version)
    lines = ["| model | " + " | ".join(f"transformers {v}" for v in versions) + " |"]
    lines.append("|---" * (len(versions) + 1) + "|")
    reasons: dict[str, None] = {}  # ordered
    for name in zoo.ZOO:
        of_versions = [results[v].get(name, {"path": "not run"}) for v in versions]
        title = next((r["class"] for r in of_versions if "class" in r), name)
        cells = [cell(result, reasons) for result in of_versions]
        lines.append(f"| {title} (`{name}`) | " + " | ".join(cells) + " |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join([HEAD, *lines, "", *notes, ""])


def cell(result: dict, reasons: dict[str, None]) -> str:
    text = result["path"]
    if "error" in result:
        text += f" {result['error']:.0e}"
    if result.get("register"):
        text += ", `register()`"
    if "reason" in result:
        reasons.setdefault(result["reason"])
        text += f" ({list(reasons).index(result['reason']) + 1})"
    return text


def main() -> None:
    transformers.logging.set_verbosity_error()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[transformers.__version__] = {name: measure(name) for name in zoo.ZOO}
    results = {version: results[version] for version in sorted(results, key=Version)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text(table(results))


if __name__ == "__main__":
    main()
