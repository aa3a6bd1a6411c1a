"""The time of one launch on an H200, as a model of its compiled machine code. No GPU is involved.

    time = LAUNCH + max(pipes, chain, L2, memory)

- **pipes**: for the fullest SM, its tiles times the cycles that each pipe is busy with a tile: tensor cores (FLOPs of
  the tile, padding included), special functions, FP32, ALU, shared memory, issue slots (instructions of the loop times
  its passes, and those of prologue and epilogue; bench/bound.py has the rates), and the SM's port to L2.
- **chain**: what a program does one after the other, times the rounds of programs that the SM takes (CTAs an SM, from
  registers and shared memory, run side by side): FILL, the main loop, the busiest pipe of the epilogue, DRAIN. In the
  main loop of a GEMM loads and products overlap: it takes the longest of tensor time, other pipes, L2 port, and passes
  × LATENCY / (stages − 1). Where each product waits for the one before (attention, pooling, and a GEMM in which a third
  of the products wait, gsb0) tensor time and the busiest other pipe add up. A persistent program fills once.
- **L2**: bytes that all main loops read, over L2's bandwidth. **memory**: bytes of all arguments, each moved once.

Constants: 132 SMs at 1.98 GHz (data sheet). Tensor cores: 786 TFLOP/s, what cuBLAS is reported to reach on an H200, not the
nominal 989. L2: 7.5 TB/s, the least that the 640 TFLOP/s of Gluon's tutorial with tiles of 128×256 need; 64 bytes a clock
and SM. Memory: 90 % of 4.8 TB/s. FILL 0.8 and DRAIN 0.7 µs: what Gluon's one-tile programs lose against pipelined ones
at K = 512, and roughly what those lose besides. LATENCY 650 cycles; LAUNCH 55 µs / 67, a graph replay's floor. They are
what is public; none was fitted to a measurement of ours, because there is none. CTAs that share an SM are taken to overlap
perfectly, ours and the peers'.
"""

import math
from collections import Counter
from dataclasses import dataclass

from bound import Work, instruction_cycles, loop_flops
from machine_code import MachineCode

SMS, HZ, WARPS = 132, 1.98e9, 64  # warps that an SM can hold
TENSOR = 786e12  # FLOP/s
L2, L2_PORT, MEMORY = 7.5e12, 64 * HZ, 0.9 * 4.8e12  # bytes/s; the port's of an SM
FILL, DRAIN, LATENCY, LAUNCH = 0.8e-6, 0.7e-6, 650 / HZ, 55e-6 / 67  # seconds
DEPENDENT = ("attention", "pool", "value")


@dataclass(frozen=True)
class Time:
    microseconds: float
    binds: str
    resident: int  # CTAs an SM
    waves: float
    bounds: dict[str, float]  # microseconds, without LAUNCH


def time_of(kernel: str, work: Work, code: MachineCode) -> Time:
    """Of one launch."""
    resident = max(1, int(code.occupancy / 100 * WARPS / work.warps))
    loop, each, once = _pipes(work, code)
    tensor, port = work.program_flops / (TENSOR / SMS), work.l2_bytes / L2_PORT
    others = max(loop.values(), default=0)
    dependent = kernel in DEPENDENT or code.serialized
    products = tensor + others if dependent else max(tensor, others)
    main_loop = max(products, port, work.trips * LATENCY / max(1, work.stages - 1))
    tile = main_loop + max(each.values(), default=0) + DRAIN
    start = FILL + max(once.values(), default=0)
    tiles = math.ceil(work.tiles / SMS)  # of the fullest SM
    bounds = {pipe: tiles * (loop.get(pipe, 0) + each.get(pipe, 0)) + once.get(pipe, 0) for pipe in loop | each | once}
    bounds |= {"tensor": tiles * tensor, "L2 port": tiles * port}
    if work.persistent:
        bounds["chain"] = start + math.ceil(work.tiles / work.programs) * tile
    else:
        bounds["chain"] = math.ceil(tiles / resident) * (start + tile)
    bounds |= {"L2": work.tiles * work.l2_bytes / L2, "memory": work.bytes / MEMORY}
    binds = max(bounds, key=bounds.get)
    microseconds = {name: 1e6 * seconds for name, seconds in bounds.items()}
    waves = work.tiles / (SMS * resident)
    return Time(1e6 * LAUNCH + microseconds[binds], binds, resident, waves, microseconds)


def _pipes(work: Work, code: MachineCode) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Seconds that each pipe is busy with a tile's main loop, with the rest of a tile, with the rest of a program."""

    def seconds(opcodes: Counter, passes: float = 1) -> dict[str, float]:
        cycles = instruction_cycles(opcodes, "sm_90")
        return {pipe: passes * work.warps * n / HZ for pipe, n in cycles.items()}

    if not work.program_flops:
        return {}, seconds(code.everything), {}
    if code.unrolled:
        return seconds(code.main_loop - code.outside), seconds(code.outside), {}
    loop = seconds(code.main_loop, work.program_flops / loop_flops(work, code))
    if work.persistent:
        return loop, seconds(code.sometimes), seconds(code.outside)
    return loop, seconds(code.sometimes + code.outside), {}
