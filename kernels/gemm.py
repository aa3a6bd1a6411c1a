"""What the GEMM kernels share: tile order, main loop, GELU-tanh, default tiles, dot precision; the GPU at hand.

Every GEMM here is `x[M, K] · w[N, K]ᵀ` with both operands contiguous along K and fp32 accumulation.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.runtime import driver


@triton.jit
def tile_indices(M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column indices of this program's output tile.

    Programs walk GROUP_M tile rows column by column, so that neighbours in time share operands in L2
    (the order of the Triton matrix-multiplication tutorial).
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_rows
    tile_n = (pid % (GROUP_M * tiles_n)) // group_rows
    # [BLOCK_M], [BLOCK_N]; int64 because row · row stride passes 2^31 at ordinary batch sizes
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, columns


@triton.jit
def main_loop(
    x_ptr,
    w_ptr,
    rows,
    columns,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_X: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    shift=None,
):
    """fp32 `[BLOCK_M, BLOCK_N]` tile of x · wᵀ, or of (x − shift) · wᵀ with an fp32 shift `[BLOCK_M]`.

    Rows ≥ M and columns ≥ N hold copies of the last valid one.
    """
    # Clamping instead of masking: the loop then needs no mask but the K tail's.
    rows = tl.minimum(rows, M - 1)
    columns = tl.minimum(columns, N - 1)
    offs_k = tl.arange(0, BLOCK_K)
    # [BLOCK_M, BLOCK_K]
    x_ptrs = x_ptr + rows[:, None] * STRIDE_X + offs_k[None, :]
    # [BLOCK_K, BLOCK_N]
    w_ptrs = w_ptr + columns[None, :] * K + offs_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
        if shift is not None:
            x -= shift[:, None]
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def gelu_tanh(x):
    """GELU, tanh form (Hendrycks & Gimpel 2016): 0.5·x·(1 + tanh u) = x·sigmoid(2u), u = √(2/π)·(x + 0.044715·x³)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp2(-2.8853900817779268 * u))  # 2·log2(e)


def gemm_config(dtype: torch.dtype, arch: str) -> dict[str, int]:
    """The default tile of a GEMM kernel; compiles without spills on every architecture of docs/static.md."""
    fp32 = dtype == torch.float32
    if arch.startswith("gfx11"):
        tile = {"BLOCK_M": 64 if fp32 else 128, "BLOCK_K": 16 if fp32 else 32, "num_stages": 2}
    else:
        tile = {"BLOCK_M": 128, "BLOCK_K": 16 if fp32 else 64, "num_stages": 3}
    return tile | {"BLOCK_N": 128, "GROUP_M": 8, "num_warps": 8}


def gemm_grid(M: int, N: int, config: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]),)


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies fp32 operands: IEEE unless torch allows TF32 (16-bit operands ignore it)."""
    # Not torch.get_float32_matmul_precision(), which raises once the settings below were used directly.
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":
        setting = torch.backends.fp32_precision
    return "tf32" if dtype == torch.float32 and setting == "tf32" and torch.version.hip is None else "ieee"


def gpu_arch() -> str:
    """The current device's architecture, such as "sm_90" or "gfx942"; "" where Triton interprets."""
    return "" if triton.knobs.runtime.interpret else _arch_of(driver.active.get_current_device())


@functools.cache
def _arch_of(device) -> str:
    # of the current device, which is the key
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


def device_guard(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
