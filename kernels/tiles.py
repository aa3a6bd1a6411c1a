"""Which tiles a kernel may run with, and which it runs with unless tuning says otherwise: by the work and the GPU.

A configuration of a GEMM is a tile (BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M), num_warps and num_stages, and where it may be
    TMA         read x and w through tensor descriptors (16-bit dtypes, sm_90 or newer; `can_describe`)
    PERSISTENT  one program an SM, which goes on from tile to tile and loads the next while it finishes the last
    SPLIT_K     share K out among so many programs (linear_residual)
    TAIL        a smaller tile, itself such a configuration, for the rows whose tiles would not fill all SMs once more

The default is the tile of the lowest estimated time. The estimate counts, for the fullest SM, rounds of programs; in
each a fixed cost to fill and drain it, and the main loop, which waits for tensor cores, for the SM's port to L2 or, where
few stages are in flight, for L2's latency; and beside that L2's bandwidth for all SMs together. Its constants are rough,
and enough to tell tiles apart; `bench/predict.py` does the same from machine code.
"""

import functools
from typing import NamedTuple

import torch
import triton

Config = dict[str, int]


class Gpu(NamedTuple):
    """SMs, and FLOPs of dense bf16 products a clock and SM, of data sheets (Hopper's what the vendor's GEMM reaches)."""

    sms: int
    flops: int


GPUS = {
    "sm_80": Gpu(108, 2048), "sm_86": Gpu(84, 512), "sm_89": Gpu(128, 512), "sm_90": Gpu(132, 3000),
    "sm_100": Gpu(148, 8192), "sm_120": Gpu(170, 512),
}  # fmt: skip
# Clocks: to start a program and fill its pipeline, to drain it, from a load to its use, between two kernels.
FILL, DRAIN, LATENCY, LAUNCH = 1600, 1400, 650, 1650
FP32_FLOPS = 256  # a clock and SM, without tensor cores
PORT, L2 = 64, 3800  # bytes a clock: of an SM, and of L2 for all of them
EPILOGUE = 0.14  # clocks for each element of a tile


def gemm_tile(BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, num_warps: int, num_stages: int, **more: int) -> Config:
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K, "GROUP_M": 8}
    return tile | {"num_warps": num_warps, "num_stages": num_stages} | more


# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages; none spills on sm_90 in 16 bits
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
TMA_TILES = [
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (256, 128, 64, 8, 3),
]
PERSISTENT_TILES = [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4)]
# Those that a default in 16 bits is chosen from: they spill nowhere.
DEFAULT_TILES = [(128, 128, 64, 8, 3), (64, 128, 64, 4, 3), (64, 64, 64, 4, 4), (16, 64, 64, 4, 4)]
DEFAULT_SPLITS = {(128, 128): (2, 4), (64, 128): (4, 8), (64, 64): (8,), (16, 64): (8,)}  # of BLOCK_M and BLOCK_N
SPLITS = (2, 4, 8)


@functools.lru_cache(4096)
def gemm_default(
    dtype: torch.dtype, arch: str, M: int, N: int, K: int, tma: bool = False, split: bool = False, sms: int = 0
) -> Config:
    """For `[M, K]` by `[N, K]`. `tma`: the kernel may be persistent and read through descriptors. `split`: it may split K.
    `sms`: the device's, where they are not the data sheet's."""
    tiles = gemm_defaults(dtype, arch, K, tma, split)
    if arch not in GPUS:
        return tiles[0]
    gpu = GPUS[arch]._replace(sms=sms or GPUS[arch].sms)
    fitting = [tile for tile in tiles if "TAIL" not in tile or 0 < whole_waves(tile, gpu.sms, M, N) < M]
    return min(fitting, key=lambda tile: clocks(tile, gpu, dtype.itemsize, M, N, K))


def gemm_defaults(dtype: torch.dtype, arch: str, K: int, tma: bool = False, split: bool = False) -> list[Config]:
    """What `gemm_default` chooses from, whatever M and N are."""
    if arch not in GPUS:
        return [_any_work(dtype, arch)]
    if dtype == torch.float32:  # smaller tiles spill in layernorm_linear
        return [gemm_tile(128, 128, 16, 8, 3)]
    tiles = [gemm_tile(*tile) for tile in DEFAULT_TILES]
    if arch == "sm_120":  # tiles of fewer columns spill
        tiles = [tile for tile in tiles if tile["BLOCK_N"] == 128]
    if arch == "sm_100":  # 64 by 64 with four warps spills in linear_residual
        tiles = [tile | {"num_warps": 8} if tile["BLOCK_M"] == tile["BLOCK_N"] == 64 else tile for tile in tiles]
    persistent = []
    if tma and can_describe(dtype, arch, K) and not arch.startswith("sm_12"):
        # The higher one spills 8 or 16 bytes in layernorm_linear under Triton 3.7 and 3.9, the wider one in linear_residual.
        chosen = PERSISTENT_TILES[1:2] if split else PERSISTENT_TILES[:1]
        persistent = [gemm_tile(*tile, TMA=True, PERSISTENT=True) for tile in chosen]
    if split:
        splits = [
            tile
            for tile in split_tiles(tiles, K)
            if tile["SPLIT_K"] in DEFAULT_SPLITS.get((tile["BLOCK_M"], tile["BLOCK_N"]), ())
        ]
        tails = [*tiles[:2], *splits[:1]]
        persistent += [tile | {"TAIL": tail} for tile in persistent for tail in tails]
        tiles += splits
    return tiles + persistent


def split_tiles(tiles: list[Config], K: int) -> list[Config]:
    """With two blocks of K or more for each program."""
    return [
        tile | {"SPLIT_K": splits}
        for tile in tiles
        for splits in SPLITS
        if not tile.get("PERSISTENT") and K >= 2 * splits * tile["BLOCK_K"]
    ]


def whole_waves(tile: Config, sms: int, M: int, N: int) -> int:
    """How many of M rows have tiles that keep all SMs busy to the end."""
    across = triton.cdiv(N, tile["BLOCK_N"])
    return M // tile["BLOCK_M"] * across // sms * sms // across * tile["BLOCK_M"]


def clocks(tile: Config, gpu: Gpu, itemsize: int, M: int, N: int, K: int) -> float:
    """The estimate described above."""
    if "TAIL" in tile:
        rows = whole_waves(tile, gpu.sms, M, N)
        body = {key: value for key, value in tile.items() if key != "TAIL"}
        parts = [(body, rows), (tile["TAIL"], M - rows)]
        return LAUNCH + sum(clocks(part, gpu, itemsize, count, N, K) for part, count in parts)
    m, n, k, splits = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"], tile.get("SPLIT_K", 1)
    programs = triton.cdiv(M, m) * triton.cdiv(N, n) * splits
    trips = triton.cdiv(K, k * splits)
    loaded = (m + n) * k * itemsize
    busy = max(2 * m * n * k / (gpu.flops if itemsize == 2 else FP32_FLOPS), loaded / PORT)
    loop = trips * max(busy, LATENCY / (tile["num_stages"] - 1))
    each = triton.cdiv(programs, gpu.sms)
    # Of small tiles two fit on an SM at once, or more.
    rounds = each if m * n > 128 * 128 else triton.cdiv(each, 2)
    finish = DRAIN + EPILOGUE * m * n
    chain = FILL + each * (loop + finish) if tile.get("PERSISTENT") else rounds * (FILL + loop + finish)
    # Partial sums in fp32 are written and read once more.
    epilogue = LAUNCH + FILL + DRAIN + 8 * splits * M * N / L2 if splits > 1 else 0
    return max(chain, each * trips * busy, programs * trips * loaded / L2) + epilogue


def _any_work(dtype: torch.dtype, arch: str) -> Config:
    """Where there are no figures to choose by."""
    fp32 = dtype == torch.float32
    if arch.startswith("gfx11"):
        return gemm_tile(64 if fp32 else 128, 128, 16 if fp32 else 32, 8, 2)
    return gemm_tile(128, 128, 16 if fp32 else 64, 8, 3)


def can_describe(dtype: torch.dtype, arch: str, K: int) -> bool:
    """Whether tensor descriptors of rows of K are possible."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90 and dtype.itemsize == 2 and K % 8 == 0


def gemm_configs(dtype: torch.dtype, arch: str, M: int) -> list[Config]:
    """What any GEMM kernel may run with; some do not fit every architecture."""
    fp32 = dtype == torch.float32
    tiles = FP32_TILES if fp32 else SHORT_TILES if M <= 64 else TILES
    if arch == "sm_90" and not fp32:  # with two products a step every second one waits
        tiles = [tile for tile in tiles if tile[2] >= 64]
    one_stage = [_any_work(dtype, arch) | {"num_stages": 1}] if arch.startswith("gfx9") else []
    return [*(gemm_tile(*tile) for tile in tiles), *one_stage]


def tma_configs(dtype: torch.dtype, arch: str, M: int, K: int) -> list[Config]:
    """Those with tensor descriptors, persistent ones among them, where there can be any."""
    if not can_describe(dtype, arch, K):
        return []
    tiles = [gemm_tile(*tile, TMA=True) for tile in TMA_TILES if M > 64 or tile[0] <= 64]
    persistent = PERSISTENT_TILES if M > 64 and not arch.startswith("sm_12") else []
    return tiles + [gemm_tile(*tile, TMA=True, PERSISTENT=True) for tile in persistent]


def default_first(default: Config, configs: list[Config]) -> list[Config]:
    return [default, *(config for config in configs if config != default)]


def attention_default(dtype: torch.dtype, arch: str, B: int, N: int, H: int, d: int, sms: int = 0) -> Config:
    """No spills, a static bound within 5 % of the lowest, and of such tiles the most rows, because more rows read keys
    and values less often from L2, which the bound does not count (docs/tiles.md); on sm_90 by `bench/predict.py`."""
    if dtype == torch.float32:
        # 72's second slice of 8, padded to 16, spills at 64 rows.
        rows = 16 if arch.startswith("gfx11") else 32 if d % 32 else 64
        return {"BLOCK_M": rows, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    config = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    if arch == "sm_80" and 64 < d < 96:  # tiles of a lower bound spill 8 or 16 bytes under Triton 3.6
        return config | {"BLOCK_M": 64, "BLOCK_N": 128, "num_stages": 3}
    if arch == "sm_80":
        return config | {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3}
    if arch in ("sm_86", "sm_89", "sm_120") or arch.startswith("gfx11"):
        return config | {"BLOCK_N": 32, "num_stages": 2 if arch.startswith("gfx11") else 3}
    if arch == "sm_100":
        return config | {"BLOCK_N": 128}
    if arch == "sm_90" and d <= 96:
        # Four warps leave room for two CTAs an SM, one of which multiplies while the other is at its softmax. With two
        # stages the loop would wait for copies right after it issued them.
        config |= {"num_warps": 4, "num_stages": 3}
        if triton.cdiv(N, 128) * B * H < 2 * (sms or GPUS[arch].sms):
            return config | {"BLOCK_M": 64}
        return config | {"BLOCK_N": 64 if 64 < d < 96 else 32}
    return config


def attention_segments_default(
    dtype: torch.dtype, arch: str, M: int, longest: int, H: int, d: int, sms: int = 0
) -> Config:
    """As `attention_default` for as many tiles, of segments with M rows in all; a low tile where even the longest is short."""
    if longest <= 16 and dtype != torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1, "num_stages": 2}
    config = attention_default(dtype, arch, 1, M, H, d, sms)
    if dtype == torch.float32 and d > 64:  # 96 spills on sm_80 at 64 rows
        config |= {"BLOCK_M": min(config["BLOCK_M"], 32)}
    return config


# BLOCK_M, BLOCK_N, num_warps, num_stages, as in attention_default
ATTENTION_TILES = [
    (64, 64, 4, 2),
    (128, 64, 8, 2),
    (128, 64, 4, 3),
    (128, 32, 4, 3),
    (64, 32, 4, 2),
    (64, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 32, 8, 2),
    (128, 64, 4, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
]
FP32_ATTENTION_TILES = [(32, 16, 8, 2), (16, 16, 4, 2)]  # the others tried spill on sm_90 for one d of 64, 72 and 96


def attention_tiles(dtype: torch.dtype, arch: str) -> list[Config]:
    tiles = FP32_ATTENTION_TILES if dtype == torch.float32 else ATTENTION_TILES
    if arch == "sm_90":  # where too many products wait in a short loop of two slices and two stages
        tiles = [tile for tile in tiles if tile[1] != 32 or tile[3] > 2]
    return [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages} for m, n, warps, stages in tiles]
