"""The CPU backend against its peers: `pip install -e '.[bench]' && pytest bench/test_cpu.py --benchmark-json OUT.json`.

Every round runs each peer once, in turns, so that a busy machine slows all of them; the medians and their ratios to
siglip_fast's are in the JSON's extra_info, and `python bench/report.py OUT.json` writes table and plot. Each peer's
pooler_output is compared with stock eager in float32 first. A peer that is not installed is named as missing.
"""

import statistics
import time

import peers
import pytest
import torch
from matmul_limit import flops, matmul_peak

from siglip_fast.info import version_of
from siglip_fast.variants import config_for

CASES = [
    ("base-patch16-224", 1, 20),
    ("base-patch16-224", 8, 10),
    ("base-patch16-512", 1, 8),
    ("so400m-patch14-384", 1, 5),
]
# Of the relative error against float32; what bf16 costs stock too (its own error is in the JSON)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
VERSIONS = ("torch", "transformers", "onnxruntime", "openvino")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


def build(config, dtype, pixels) -> tuple[dict[str, peers.Forward], list[str]]:
    built, missing = {}, []
    for name, make in peers.PEERS.items():
        try:
            built[name] = make(config, dtype, pixels)
        except (ImportError, peers.NoSuchKernels) as reason:
            missing.append(f"{name}: {reason}")
    return built, missing


@pytest.mark.skipif(torch.cuda.is_available(), reason="times CPUs; bench/test_forward.py times GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant, batch_size, rounds", CASES)
@torch.no_grad()
def test_cpu(benchmark, variant, batch_size, rounds, dtype):
    config = config_for(variant)
    torch.manual_seed(1)
    pixels = torch.randn(batch_size, 3, config.image_size, config.image_size)
    expected = peers.eager(config, torch.float32, pixels)()
    others, missing = build(config, dtype, pixels.to(dtype))
    ours = peers.siglip_fast(config, dtype, pixels.to(dtype))
    errors = {name: relative_error(run(), expected) for name, run in (others | {"siglip_fast": ours}).items()}
    assert max(errors.values()) < TOLERANCE[dtype], errors
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def run_the_others():
        for name, run in others.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    benchmark.group = f"{variant} B={batch_size}"
    benchmark.pedantic(ours, setup=run_the_others, rounds=rounds, warmup_rounds=1)
    median = benchmark.stats["median"]
    medians = {name: statistics.median(values) for name, values in seconds.items()} | {"siglip_fast": median}
    benchmark.extra_info |= {
        "case": [variant, batch_size, str(dtype).removeprefix("torch.")],
        "milliseconds": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "speedup": {name: round(value / median, 3) for name, value in medians.items()},
        "relative_error": {name: float(f"{value:.1e}") for name, value in errors.items()},
        "missing": missing,
        "gflops": round(sum(flops(config, batch_size).values()) / 1e9, 1),
        "matmul_peak_gflops": round(matmul_peak(dtype)),
        "threads": torch.get_num_threads(),
        "versions": {name: version for name in VERSIONS if (version := version_of(name))},
    }
