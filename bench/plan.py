"""What a run does, stage by stage: commands, time limits and needs, for bench/run.py. Imports nothing that takes long."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
SECONDS = {"quick": 235, "second": 235, "full": 50_000}  # of a run on a GPU
REPORT = 15  # of them, kept for the report
PATIENCE = 900  # seconds of a stage that measures no GPU
CLI = ("-c", "import sys; from siglip_fast.cli.main import main; sys.exit(main())")
PYTEST = ("-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider")
KERNELS = ("patch_embed", "layernorm_linear", "attention", "linear_residual", "layernorm", "attention_pool",
           "residual_epilogue", "tiles", "float32_stream")  # fmt: skip
# In the order in which they are begun, should the time not do: "load" hands them out so
TESTS = (*(f"kernels/test_{name}.py" for name in KERNELS), "models/test_siglip.py", "models/test_weights.py",
         "running/test_plans.py", "running/test_graphs.py", "running/test_traced.py", "kernels/test_configs.py")  # fmt: skip
# Images of any size, in a full run: the short ones have no time for them yet.
PACKED_TESTS = (*(f"kernels/test_{name}.py" for name in ("attention_segments", "patch_rows", "rotation")),
                "models/test_siglip2.py", "models/test_qwen3_vl.py", "running/test_packed_plans.py")  # fmt: skip
# Of TESTS, in a short run. The cpu and torch backends are no GPU's business, nor are models of full size, which the
# benchmark compares too; of torch.compile's tests those that do not compile again and again.
ON_GPU = (
    "not (cpu or torch-) and not (published or full_depth or real_width or deep_model or giant- or large-)"
    " and (not test_traced or one_operation or opcheck or modes)"
)
ON_CPU = (
    "fp32 and cpu and base or fp32 and triton and one-token or TestOutputs and cpu"
    " or outputs_survive or weight_edits or opcheck"
)


class Stage(NamedTuple):
    name: str
    arguments: tuple[str, ...]  # of Python
    seconds: float  # at most; the run's limit counts too
    needs: tuple[str, ...] = ()  # of NEEDS, without which it cannot run
    partial: bool = False  # whether exit status 1 means no more than that there was not time for all


def stages(extent: str, on_gpu: bool, imitated: bool, workers: int, out: Path) -> list[Stage]:
    """In their order. Correctness comes before tuning, that before what it is to make faster, the report last."""
    rows, short = str(out / "rows.jsonl"), extent != "full"
    compiler = ("cc",) if on_gpu else ()
    found = []
    if not (short and on_gpu):  # there tests and benchmarks check the same
        found.append(Stage("info", (*CLI, "info", "--dtype", "bfloat16" if on_gpu else "float32"), 30, compiler))
    if extent != "second":
        found.append(Stage("tests", _tests(short, on_gpu, imitated, workers), 80, compiler))
    if extent != "second" and on_gpu:
        found += [_tune(*each, 45 if short else 600) for each in _tuned(short)]
    if extent != "quick" or not on_gpu:
        found.append(_bench("kernels", rows, 100, compiler))
    found.append(_bench("model", rows, SECONDS[extent], compiler))
    if not short:
        found.append(_bench("packed", rows, SECONDS[extent], compiler))
    if on_gpu and not imitated and not short:
        found = [stage._replace(seconds=20_000) for stage in found]
    report = (str(REPO / "bench/report.py"), rows, "--out", str(out))
    found.append(Stage("report", report, REPORT))
    return found if on_gpu and not imitated else [stage._replace(seconds=PATIENCE) for stage in found]


def _tests(short: bool, on_gpu: bool, imitated: bool, workers: int) -> tuple[str, ...]:
    chosen = ("-k", ON_GPU if on_gpu else ON_CPU) if short else ()
    parallel = ("-n", str(workers), "--dist", "load") if find_spec("xdist") else ()
    plugin = ("-p", "imitated_gpu") if imitated else ()
    marked = "not slow and not mutants" if short else "not mutants"
    return (*PYTEST, "-o", "addopts=--import-mode=importlib", *plugin, *parallel, "-m", marked, *chosen,
            *(str(REPO / "tests" / name) for name in (TESTS if short else (*TESTS, *PACKED_TESTS))))  # fmt: skip


def _tuned(short: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """Model, dtype and batch sizes, the most telling first."""
    if short:
        return [("base-patch16-224", "bfloat16", ("64", "1"))]
    variants = ("base-patch16-224", "base-patch16-384", "large-patch16-384", "so400m-patch14-224",
                "so400m-patch14-384", "so400m-patch14-896")  # fmt: skip
    return [(v, dtype, ("64", "1", "8", "256")) for v in variants for dtype in ("bfloat16", "float16")]


def _tune(variant: str, dtype: str, batch_sizes: tuple[str, ...], budget: int) -> Stage:
    command = (*CLI, "tune", "--random-weights", variant, "--batch-sizes", *batch_sizes, "--dtype", dtype)
    return Stage(f"tune-{variant}-{dtype}", (*command, "--budget", str(budget)), budget + 12, ("cc",), partial=True)


def _bench(name: str, rows: str, seconds: float, needs: tuple[str, ...]) -> Stage:
    command = (*PYTEST, str(REPO / f"bench/test_{name}.py"), "--rows", rows)
    return Stage(f"bench-{name}", command, seconds, ("pytest_benchmark", *needs))


# What a stage needs, and what it does less without, as people are told
NEEDS = {
    "torch": "the package torch",
    "triton": "the package triton",
    "transformers": "the package transformers",
    "pytest": "the package pytest",
    "pytest_benchmark": "the package pytest-benchmark",
    "cc": "a C compiler (gcc or clang on PATH, or CC), with which Triton builds what launches kernels",
    "xdist": "the package pytest-xdist: tests run one after the other",
    "timm": "the package timm: a peer is missing",
    "pynvml": "the package nvidia-ml-py: no clocks, no driver version",
    "matplotlib": "the package matplotlib: no plots",
}


def lacks(need: str) -> bool:
    if need == "cc":
        return not ("CC" in os.environ or shutil.which("gcc") or shutil.which("clang"))
    return find_spec(need) is None
