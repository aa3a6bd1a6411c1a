"""Lower bounds on the time of a forward pass, from nominal peaks and from the compiled kernels. No GPU is involved.

Two bounds for each launch, both uncalibrated:

roofline   max(FLOPs the operation needs / tensor peak, bytes of its arguments, each moved once / memory bandwidth)
compiled   the busiest pipe of the compiled main loop: instructions × warps × tiles on the fullest SM / pipe throughput

The second leaves out prologues, epilogues, latencies, bank conflicts, what HGMMA and UTCHMMA read from shared memory,
and clocks below boost: a kernel cannot be faster, and will be slower. Which pipe binds says what to optimise.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

from machine_code import MachineCode


@dataclass(frozen=True)
class Gpu:
    """Nominal, from the vendor's data sheets: dense bf16 FLOP/s with fp32 accumulation, bytes/s, boost clock."""

    name: str
    arch: str
    tflops: float
    gbs: float
    sms: int
    ghz: float


GPUS = [
    Gpu("A100", "sm_80", 312, 2039, 108, 1.41),
    Gpu("RTX 3090", "sm_86", 71, 936, 82, 1.695),
    Gpu("L4", "sm_89", 121, 300, 58, 2.04),
    Gpu("RTX 4090", "sm_89", 165, 1008, 128, 2.52),
    Gpu("H100", "sm_90", 989, 3350, 132, 1.98),
    Gpu("B200", "sm_100", 2250, 8000, 148, 1.965),
    Gpu("RTX 5090", "sm_120", 209.5, 1792, 170, 2.407),
]
# Operations a clock and SM (CUDA C++ Programming Guide, throughput of arithmetic instructions); a warp instruction is
# 32 operations. Only instructions whose pipe and rate are documented count; shared memory moves 128 bytes a clock.
_THROUGHPUT = {"fp32": 128, "mufu": 16, "alu": 64, "shared": 128, "issue": 128}
_FP32 = {"sm_80": 64}
_PIPES = {
    "fp32": re.compile(r"(FFMA|FMUL|FADD)(2)?(\.|$)"),
    "mufu": re.compile(r"(MUFU)()(\.|$)"),
    "alu": re.compile(r"(FMNMX|FSEL|FSETP|ISETP|SEL|LOP3|SHF|PRMT)()(\.|$)"),
}
_SHARED = re.compile(r"(LDS|STS|LDSM|STSM|LDGSTS)(\.|$)")
_FLOPS = {"HMMA.16816": 4096, "HMMA.1688": 2048, "HMMA.1684": 1024}


@dataclass(frozen=True)
class Work:
    """What one launch has to do: the operation's FLOPs and bytes; and what this tiling of it does."""

    rows: int  # or images, where the grid is over those
    flops: int
    bytes: int
    tiles: int  # of the result
    programs: int  # as many, but of a persistent grid, whose programs take several each
    program_flops: int  # of the main loop's dots for one tile, padding included
    trips: float  # of the main loop for one tile
    l2_bytes: int  # that a tile's main loop reads
    warps: int
    stages: int

    @classmethod
    def of(cls, kernel: str, a: dict, grid: tuple[int, ...]) -> "Work":
        values = [getattr(v, "base", v) for v in a.values()]  # a tensor descriptor's is its tensor
        tensors = [v for v in values if hasattr(v, "element_size")]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        flops, trips, trip_flops, trip_bytes = _FORMULAS[kernel](a, tensors)
        rows = a.get("M", tensors[0].shape[0])
        programs = math.prod(grid)
        tiles = -(-rows // a["BLOCK_M"]) * -(-a["N"] // a["BLOCK_N"]) if a.get("PERSISTENT") else programs
        return cls(
            rows, flops, moved, tiles, programs, trips * trip_flops, trips, trips * trip_bytes,
            a["num_warps"], a.get("num_stages", 1),
        )  # fmt: skip

    @property
    def trip_flops(self) -> float:
        return self.program_flops / max(self.trips, 1)

    @property
    def persistent(self) -> bool:
        return self.tiles > self.programs


def _gemm(a: dict, columns: str, rows: int) -> tuple[int, int, int, int]:
    trips = -(-a["K"] // (a["BLOCK_K"] * a.get("SPLIT_K", 1)))
    trip = a["BLOCK_M"] * a["BLOCK_N"] * a["BLOCK_K"]
    return 2 * rows * a[columns] * a["K"], trips, 2 * trip, 2 * (a["BLOCK_M"] + a["BLOCK_N"]) * a["BLOCK_K"]


def _attention(a: dict, tensors: list) -> tuple[int, float, int, int]:
    B, N, _, H, d = tensors[0].shape
    trips = N // a["BLOCK_N"] + a["TAIL_N"] / a["BLOCK_N"]
    trip = 4 * a["BLOCK_M"] * a["BLOCK_N"] * (a["WIDTH0"] + a["WIDTH1"])
    return 4 * B * H * N * N * d, trips, trip, 4 * a["BLOCK_N"] * d


def _pool(a: dict, tensors: list) -> tuple[int, int, int, int]:
    B, N, D = tensors[0].shape
    trips = 2 * -(-D // a["BLOCK_K"])  # half of them for the scores, with an fp32 weight each, half for the sums
    trip = 2 * a["BLOCK_H"] * a["BLOCK_N"] * a["BLOCK_K"]
    return 4 * B * a["HEADS"] * N * D, trips, trip, 2 * (a["BLOCK_H"] + a["BLOCK_N"]) * a["BLOCK_K"]


def _value(a: dict, tensors: list) -> tuple[int, int, int, int]:
    BLOCK_M = a["IMAGES"] * a["BLOCK_S"]
    trips = -(-a["splits"] // a["BLOCK_S"]) * -(-a["D"] // a["BLOCK_K"])
    bytes_ = 2 * (BLOCK_M + a["BLOCK_N"]) * a["BLOCK_K"]
    return 2 * a["B"] * a["D"] * a["D"], trips, 2 * BLOCK_M * a["BLOCK_N"] * a["BLOCK_K"], bytes_


# kernel: FLOPs of the operation, trips of the main loop for a tile, FLOPs of a trip, bytes that it reads (in 16 bits)
_FORMULAS = {
    "patch_embed": lambda a, _: _gemm(a, "D", a["M"]),
    "layernorm_linear": lambda a, _: _gemm(a, "N", a["M"]),
    "linear_residual": lambda a, _: _gemm(a, "N", a["M"]),
    "attention": _attention,
    "pool": _pool,
    "value": _value,
    "layernorm": lambda a, _: (0, 0, 0, 0),
    "residual_epilogue": lambda a, _: (0, 0, 0, 0),
}


def loop_flops(work: Work, code: MachineCode) -> float:
    """FLOPs that a program's warps do in one pass of the compiled loop, which may be several trips of the source's."""
    if code.unrolled:
        return work.program_flops
    flops = 0.0
    for opcode, count in code.tensor().items():
        if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
            flops += 2 * math.prod(map(int, shape.groups())) * count * work.warps / 4
        elif known := _FLOPS.get(".".join(opcode.split(".")[:2])):
            flops += known * count * work.warps
    return flops or work.trip_flops  # UTCHMMA does not say its shape, and its loops are not unrolled


def pipe_cycles(work: Work, code: MachineCode, gpu: Gpu) -> dict[str, float]:
    """Cycles of an SM that each pipe is busy with one tile's main loop."""
    if not work.program_flops:
        return {}
    passes = work.program_flops / loop_flops(work, code)
    cycles = {pipe: passes * work.warps * n for pipe, n in instruction_cycles(code.main_loop, gpu.arch).items()}
    tensor_flops = gpu.tflops * 1e12 / (gpu.sms * gpu.ghz * 1e9)
    return cycles | {"tensor": work.program_flops / tensor_flops}


def instruction_cycles(opcodes: Counter, arch: str) -> dict[str, float]:
    """Cycles of an SM that each pipe is busy with a warp's instructions."""
    per_clock = _THROUGHPUT | {"fp32": _FP32.get(arch, _THROUGHPUT["fp32"])}
    operations: Counter = Counter(issue=32 * sum(opcodes.values()))
    for opcode, count in opcodes.items():
        operations["shared"] += 32 * count * shared_bytes(opcode)
        for pipe, pattern in _PIPES.items():
            if match := pattern.match(opcode):
                operations[pipe] += 32 * count * int(match[2] or 1)
    return {pipe: n / per_clock[pipe] for pipe, n in operations.items()}


def shared_bytes(opcode: str) -> int:
    """Bytes of shared memory a thread's share of an instruction moves."""
    if not _SHARED.match(opcode):
        return 0
    if matrices := re.search(r"\.M(?:T)?88\.?(\d)?", opcode):
        return 4 * int(matrices[1] or 1)
    return 16 if ".128" in opcode else 8 if ".64" in opcode else 2 if ".U16" in opcode else 4


@dataclass(frozen=True)
class Launch:
    """The bounds of one launch, in microseconds."""

    kernel: str
    shape: str
    rows: int
    count: int
    roofline: float
    pipes: dict[str, float]  # memory among them

    @property
    def binds(self) -> str:
        return max(self.pipes, key=self.pipes.get)

    @property
    def compiled(self) -> float:
        return self.pipes[self.binds]


def launches(gpu: Gpu, rows: list, model: str) -> list[Launch]:
    """One model's forward pass; `rows` are the kernels (`gates.Row`) of the GPU's architecture."""
    found = []
    for row in rows:
        for work, count in row.calls[model].items():
            memory = work.bytes / (gpu.gbs * 1e3)
            roofline = max(memory, work.flops / (gpu.tflops * 1e6))
            programs = -(-work.tiles // gpu.sms)  # tiles on the fullest SM
            cycles = pipe_cycles(work, row.code, gpu)
            pipes = {pipe: programs * n / (gpu.ghz * 1e3) for pipe, n in cycles.items() if n}
            found.append(Launch(row.kernel, row.shape, work.rows, count, roofline, pipes | {"memory": memory}))
    return found


def totals(launches: list[Launch]) -> tuple[float, float]:
    """Microseconds of a forward pass: roofline and compiled."""
    return sum(x.count * x.roofline for x in launches), sum(x.count * x.compiled for x in launches)
