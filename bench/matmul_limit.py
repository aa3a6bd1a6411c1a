"""What a forward has to multiply, and how fast the vendor's library multiplies here: the limit of every forward."""

import statistics
import time

import torch

from siglip_fast.ops import Linear, Ops


def flops(config, batch_size: int) -> dict[str, int]:
    """Of a forward, by operation and its output width; the pooling head, a thousandth of it, is left out."""
    D, F, L = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    N = (config.image_size // config.patch_size) ** 2
    rows = 2 * batch_size * N
    return {
        "patch_embed": rows * 3 * config.patch_size**2 * D,
        f"layernorm_linear → {3 * D}": L * rows * 3 * D * D,
        f"layernorm_linear → {F}": L * rows * D * F,
        f"linear_residual → {D}": L * rows * (D * D + D * F),
        "attention": L * rows * 2 * N * D,
    }


def matmul_peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """GFLOP/s of the best plain GEMM here and now, on random data: the limit that forwards are held against."""
    return _cuda_peak(dtype) if device == "cuda" else _cpu_peak(dtype)


def _cpu_peak(dtype: torch.dtype) -> float:
    """The faster one of the cpu backend's for an image and plain torch's."""
    linear = Linear(torch.randn(3072, 3072).to(dtype), torch.zeros(3072, dtype=dtype))
    x, times = torch.randn(1024, 3072).to(dtype), []
    backends = [Ops("cpu"), Ops("torch")]
    for ops, packed in 10 * [(ops, ops.pack(linear, tokens=len(x))) for ops in backends]:
        start = time.perf_counter()
        ops.linear_residual(x, packed, None)
        times.append(time.perf_counter() - start)
    return 2 * 1024 * 3072 * 3072 / min(times) / 1e9


def _cuda_peak(dtype: torch.dtype, n: int = 8192) -> float:
    """Of cuBLAS; the median, because a GPU's clock falls while it is at work, as it does in a forward."""
    x, w = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        x @ w
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * n**3 / statistics.median(times[3:]) / 1e9
