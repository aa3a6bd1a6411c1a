"""Where a CPU forward spends its milliseconds, operation by operation, against the matmul limit of the same run.

    python bench/profile_cpu.py [--variant base-patch16-224] [--batch-size 8] [--dtype bfloat16] [--backend cpu]

FLOPs are those of the operation (multiply and add are two); the limit is oneDNN's best plain GEMM, measured first.
"""

import argparse
import statistics
import time
from collections import defaultdict

import torch
from matmul_limit import flops, matmul_peak

from siglip_fast import SiglipVisionModel, forward, ops
from siglip_fast.backends.select import NAMES
from siglip_fast.models.variants import VARIANTS, config_for

ROUNDS = 10


class Timed(ops.Ops):
    """The operations, with the seconds of each call by its name and output shape."""

    def __init__(self, backend: str):
        super().__init__(backend)
        self.seconds: dict[str, float] = defaultdict(float)

    def __getattribute__(self, name: str):
        attribute = super().__getattribute__(name)
        if name.startswith("_") or not callable(attribute):
            return attribute

        def timed(*args, **kwargs):
            start = time.perf_counter()
            out = attribute(*args, **kwargs)
            tensor = out[0] if isinstance(out, tuple) else out
            label = f"{name} → {tensor.shape[-1]}" if "linear" in name else name
            self.seconds[label] += time.perf_counter() - start
            return out

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=VARIANTS, default="base-patch16-224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", choices=NAMES, default="cpu")
    arguments = parser.parse_args()
    config, dtype = config_for(arguments.variant), getattr(torch, arguments.dtype)
    model = SiglipVisionModel(config, backend=arguments.backend, strict=True).to(dtype).eval()
    pixels = torch.randn(arguments.batch_size, 3, config.image_size, config.image_size).to(dtype)
    runs: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad():
        model(pixels)
        weights = model._current().weights
        position = model._tower.embeddings.position_embedding.weight
        for _ in range(ROUNDS):
            timed, start = Timed(arguments.backend), time.perf_counter()
            forward.forward(timed, weights, pixels, position)
            runs["all"].append(time.perf_counter() - start)
            for label, seconds in timed.seconds.items():
                runs[label].append(seconds)
    peak, needed = matmul_peak(dtype), flops(config, arguments.batch_size)
    needed["all"] = sum(needed.values())
    medians = {label: 1e3 * statistics.median(values) for label, values in runs.items()}
    print(
        f"{arguments.variant}, batch {arguments.batch_size}, {arguments.dtype}, backend {arguments.backend}, ", end=""
    )
    print(f"{torch.get_num_threads()} threads; best GEMM {peak:.0f} GFLOP/s\n")
    print("| operation | ms | % | GFLOP/s | % of the best GEMM |\n|---|---|---|---|---|")
    for label, ms in sorted(medians.items(), key=lambda item: -item[1]):
        rate = needed.get(label, 0) / ms / 1e6
        speed = f"{rate:.0f} | {100 * rate / peak:.0f}" if rate else "– | –"
        print(f"| {label} | {ms:.1f} | {100 * ms / medians['all']:.1f} | {speed} |")


if __name__ == "__main__":
    main()
