"""What the GEMM kernels share: tile order, main loop, GELU-tanh, configurations, dot precision; the GPU at hand.

Every GEMM here is `x[M, K] · w[N, K]ᵀ` with both operands contiguous along K and fp32 accumulation; x is rounded to w's
dtype where that is another.

A configuration is a tile (BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M), num_warps and num_stages, and where a kernel offers it
    TMA      read x and w through tensor descriptors (16-bit dtypes, sm_90 or newer; `gemm_operands` says when not)
    SPLIT_K  share K out among so many programs (linear_residual)
"""

import functools

import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_origin(M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row (int64) and column of this program's output tile.

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
    # int64 because row · row stride passes 2^31 at ordinary batch sizes
    return tile_m.to(tl.int64) * BLOCK_M, tile_n * BLOCK_N


@triton.jit
def main_loop(
    x_ptr,
    w_ptr,
    row,
    column,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_X: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    shift=None,
    SPLIT_K: tl.constexpr = 1,
    TMA: tl.constexpr = False,
):
    """fp32 `[BLOCK_M, BLOCK_N]` tile of x · wᵀ, or of (x − shift) · wᵀ with an fp32 shift `[BLOCK_M]`.

    With SPLIT_K > 1 only the part of K that is this program's in the grid's second axis. With TMA, x_ptr and w_ptr
    are tensor descriptors of [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]. Rows ≥ M and columns ≥ N hold no result.
    """
    # Whole blocks, so that only the last part meets the tail of K.
    PART: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    first = tl.program_id(1) * PART if SPLIT_K > 1 else 0
    last = min(first + PART, K) if SPLIT_K > 1 else K
    if not TMA:
        # Clamping instead of masking: the loop then needs no mask but the K tail's.
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)
        columns = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1)
        offs_k = tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        x_ptrs = x_ptr + rows[:, None] * STRIDE_X + (first + offs_k)[None, :]
        # [BLOCK_K, BLOCK_N]
        w_ptrs = w_ptr + columns[None, :] * K + (first + offs_k)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(first, last, BLOCK_K):
        if TMA:
            # Zero beyond M, N and K.
            x = x_ptr.load([row.to(tl.int32), k])
            w = w_ptr.load([column, k]).T
        elif K % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs, mask=offs_k[:, None] < K - k, other=0.0)
        if shift is not None:
            x -= shift[:, None]
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=INPUT_PRECISION)
        if not TMA:
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


# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages; none spills on sm_90
TILES = [
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 2),
    (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
]
SHORT_TILES = [  # for so few rows that most of a high tile would be empty
    (16, 64, 128, 4, 4),
    (16, 128, 128, 4, 3),
    (32, 64, 128, 4, 3),
    (32, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 64, 4, 4),
]
FP32_TILES = [
    (128, 128, 32, 8, 2),
    (128, 64, 16, 4, 3),
    (64, 128, 16, 4, 3),
    (64, 64, 16, 4, 3),
    (64, 64, 32, 4, 3),
    (64, 64, 32, 8, 2),
    (32, 64, 32, 4, 3),
    (16, 64, 32, 4, 3),
]
TMA_TILES = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)]


def gemm_tile(BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int, **more: int) -> dict[str, int]:
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "GROUP_M": 8}
    return tile | {"num_warps": num_warps, "num_stages": num_stages} | more


def gemm_configs(dtype: torch.dtype, arch: str, M: int) -> list[dict[str, int]]:
    """What any GEMM kernel may run with, the default first; some do not fit every architecture."""
    fp32, default = dtype == torch.float32, gemm_config(dtype, arch)
    tiles = FP32_TILES if fp32 else SHORT_TILES if M <= 64 else TILES
    if arch == "sm_90" and not fp32:  # with two products a step every second one waits
        tiles = [tile for tile in tiles if tile[2] >= 64]
    one_stage = [default | {"num_stages": 1}] if arch.startswith("gfx9") else []
    return [default, *(gemm_tile(*tile) for tile in tiles), *one_stage]


def tma_configs(dtype: torch.dtype, arch: str, M: int, K: int) -> list[dict[str, int]]:
    """Those with tensor descriptors, where there can be any."""
    tiles = [tile for tile in TMA_TILES if M > 64 or tile[0] <= 64]
    possible = arch.startswith("sm_") and int(arch[3:]) >= 90 and dtype.itemsize == 2 and K % 8 == 0
    return [gemm_tile(*tile, TMA=True) for tile in tiles] if possible else []


def gemm_grid(M: int, N: int, config: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"]), config.get("SPLIT_K", 1)


def gemm_operands(x: torch.Tensor, weight: torch.Tensor, config: dict[str, int]):
    """What a GEMM kernel reads `x [..., K]` and `weight [N, K]` through: themselves, or with TMA descriptors of them."""
    if not config.get("TMA"):
        return x, weight
    K = weight.shape[1]
    if x.element_size() != 2:
        raise ValueError(f"TMA: expected a 16-bit dtype, got {x.dtype}")
    if K % 8:
        raise ValueError(f"TMA: expected rows of a multiple of 16 bytes, got {2 * K} (K = {K})")
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"TMA: expected {name} at a multiple of 16 bytes, got {tensor.data_ptr():#x}")
    return (
        TensorDescriptor.from_tensor(x.view(-1, K), [config["BLOCK_M"], config["BLOCK_K"]]),
        TensorDescriptor.from_tensor(weight, [config["BLOCK_N"], config["BLOCK_K"]]),
    )


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
