"""What a forward has to multiply, and how fast oneDNN multiplies here: the limit that CPU forwards are held against."""

import time

import torch


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


def matmul_peak(dtype) -> float:
    """GFLOP/s of oneDNN's best plain GEMM here and now: the limit that the forward is held against."""
    x, w = torch.randn(1024, 3072).to(dtype), torch.randn(3072, 3072).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(w)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        times.append(time.perf_counter() - start)
    return 2 * 1024 * 3072 * 3072 / min(times) / 1e9
