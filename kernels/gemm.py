"""What the GEMM kernels share: tile order, main loop, GELU, operands and grid, dot precision; the GPU at hand.

Every GEMM here is `x[M, K] · w[N, K]ᵀ` with both operands contiguous along K and fp32 accumulation; x is rounded to w's
dtype where that is another.
Configurations are those of tiles.py.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import gemm_default


@triton.jit
def tile_origin(tile, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row (int64) and column of an output tile.

    Tiles are counted down GROUP_M tile rows, column by column, so that neighbours in time share operands in L2
    (the order of the Triton matrix-multiplication tutorial).
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    group = tile // (GROUP_M * tiles_n)
    group_rows = min(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (tile % (GROUP_M * tiles_n)) % group_rows
    tile_n = (tile % (GROUP_M * tiles_n)) // group_rows
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
    x_rows=None,
):
    """fp32 `[BLOCK_M, BLOCK_N]` tile of x · wᵀ, or of (x − shift) · wᵀ with an fp32 shift `[BLOCK_M]`.

    Of x the rows from `row` on, or without TMA int64 x_rows `[BLOCK_M]`, all of which exist.

    With SPLIT_K > 1 only the part of K that is this program's in the grid's second axis. With TMA, x_ptr and w_ptr
    are tensor descriptors of [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]. Rows ≥ M and columns ≥ N hold no result.
    """
    # Parts of as many whole blocks each, the last ones maybe beyond K: a loop that ends at K would have no constant
    # length, and ptxas for Hopper then has every product wait for the last.
    PART: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K) * BLOCK_K
    first = tl.program_id(1) * PART if SPLIT_K > 1 else 0
    if not TMA:
        # Clamping instead of masking: the loop then needs no mask but the K tail's.
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1) if x_rows is None else x_rows
        columns = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1)
        offs_k = tl.arange(0, BLOCK_K)
        # [BLOCK_M, BLOCK_K]
        x_ptrs = x_ptr + rows[:, None] * STRIDE_X + (first + offs_k)[None, :]
        # [BLOCK_K, BLOCK_N]
        w_ptrs = w_ptr + columns[None, :] * K + (first + offs_k)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(0, PART, BLOCK_K):
        k = first + step
        if TMA:
            # Zero beyond M, N and K.
            x = x_ptr.load([row.to(tl.int32), k])
            w = w_ptr.load([column, k]).T
        elif K % (BLOCK_K * SPLIT_K) == 0:
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
def operands_at(
    x_ptr,
    w_ptr,
    row,
    column,
    k,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """`[BLOCK_M, BLOCK_K]` of x and `[BLOCK_K, BLOCK_N]` of wᵀ, wherever they are: what a persistent program loads."""
    if TMA:
        x = x_ptr.load([row.to(tl.int32), k])
        w = w_ptr.load([column, k]).T
    else:
        rows = tl.minimum(row + tl.arange(0, BLOCK_M), M - 1)
        columns = tl.minimum(column + tl.arange(0, BLOCK_N), N - 1)
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * K + offs_k[None, :], mask=offs_k[None, :] < K, other=0.0)
        w = tl.load(w_ptr + columns[None, :] * K + offs_k[:, None], mask=offs_k[:, None] < K, other=0.0)
    return x, w


@triton.jit
def persistent_steps(M, N: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of K of all tiles of this program of a persistent grid.

    It goes through them in one loop: a loop a tile would drain its loads before the epilogue and fill them after it.
    """
    tiles = tl.cdiv(M, BLOCK_M) * ((N + BLOCK_N - 1) // BLOCK_N)
    return tl.cdiv(tiles - tl.program_id(0), tl.num_programs(0)) * BLOCKS


@triton.jit
def next_step(
    x_ptr,
    w_ptr,
    tile,
    block,
    row,
    column,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    """The next of a persistent program's blocks of K, of the BLOCKS of a tile: where it is, and its operands."""
    block = tl.where(block == BLOCKS - 1, 0, block + 1)
    if block == 0:
        tile += tl.num_programs(0)
        row, column = tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    x, w = operands_at(x_ptr, w_ptr, row, column, block * BLOCK_K, M, N, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
    return tile, block, row, column, x, w


@triton.jit
def halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of `x [BLOCK_M, BLOCK_N]`. Epilogues go from half to half, because all at once
    they would hold more registers than the main loop."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def gelu(x, FORM: tl.constexpr):
    """GELU (Hendrycks & Gimpel 2016); x as it is where FORM is None.

    "erf": 0.5·x·(1 + erf(x / √2)), which is exact.
    "tanh": 0.5·x·(1 + tanh u) = x·sigmoid(2u), u = √(2/π)·(x + 0.044715·x³).
    "quick": x·sigmoid(1.702·x).
    """
    if FORM == "erf":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if FORM == "tanh":
        # −2·log2(e)·√(2/π) and 0.044715 times that
        return _gated(x, x * (-2.302208198144325 - 0.1029432395800235 * (x * x)))
    if FORM == "quick":
        return _gated(x, x * -2.4554669595930156)  # −1.702·log2(e)
    return x


@triton.jit
def _gated(x, v):
    """x·sigmoid(−v / log2(e)) = x / (1 + 2^v)."""
    r = tl.rsqrt(1.0 + tl.exp2(v))
    return x * r * r


def gemm_grid(M: int, N: int, config: dict[str, int]) -> tuple[int, int]:
    tiles = -(-M // config["BLOCK_M"]) * -(-N // config["BLOCK_N"])
    programs = min(tiles, multiprocessors()) if config.get("PERSISTENT") else tiles
    return programs, config.get("SPLIT_K", 1)


def default_config(x: torch.Tensor, weight: torch.Tensor, split: bool = False) -> dict[str, int]:
    """For `x [..., K]` by `weight [N, K]`."""
    N, K = weight.shape
    aligned = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return gemm_default(x.dtype, gpu_arch(), x.numel() // K, N, K, tma=aligned, split=split, sms=multiprocessors())


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


def multiprocessors() -> int:
    """Of the current device; where Triton interprets, so few that persistent programs have more than one tile."""
    return 2 if triton.knobs.runtime.interpret else _multiprocessors_of(driver.active.get_current_device())


@functools.cache
def _multiprocessors_of(device) -> int:
    return driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def device_guard(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
