"""What a compiled Triton kernel's machine code says: registers, spills, loops, and what runs in them. Needs no GPU.

NVIDIA cubins are disassembled by the nvdisasm that Triton ships and parsed by cuxray; AMD assembly is LLVM's text,
which already says which block belongs to which loop.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cuxray
import triton
from cuxray.analyze.spillmap import spill_map
from cuxray.parse import cfgdot, resusage, sass

# Tensor-core instructions: Ampere and Ada, Hopper, Blackwell, CDNA, RDNA.
TENSOR = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA|v_mfma_|v_wmma_|v_smfmac_)")
_GLOBAL_LOAD = re.compile(r"^(LDG|LDGSTS|UTMALDG|(global|buffer)_load)(?=[._])")
_ASYNC_COPY = re.compile(r"^(LDGSTS|UTMALDG)|\.lds$")  # the last: AMD's loads straight to LDS
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1} | {
    "dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "ushort": 2, "sshort": 2,
    "short": 2, "u16": 2, "i16": 2, "b16": 2, "ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1,
}  # fmt: skip
# LDS bytes a workgroup may use; NVIDIA's limits are cuxray's.
_AMD_SHARED = {"gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10}
_AMD_WAVES = {"gfx942": 8, "gfx950": 8, "gfx1100": 16}  # that a SIMD can hold


@dataclass(frozen=True)
class MachineCode:
    registers: int
    spills: int  # bytes a thread stores to and loads from local memory or scratch
    shared: int
    shared_limit: int
    occupancy: float  # %, of the warps that an SM or SIMD can hold
    everything: Counter  # opcodes
    main_loop: Counter  # opcodes of each pass; of the whole kernel where the compiler unrolled the loop completely
    unrolled: bool
    loops: tuple[Counter, ...]
    sometimes: Counter  # opcodes in the main loop that a pass may leave out
    outside: Counter  # opcodes around the main loop, or around the products where it is unrolled
    waiting: int  # of Hopper's products in the main loop, those behind which it waits for all before (gsb0)

    @property
    def products(self) -> int:
        """Hopper's, in the main loop."""
        return sum(n for opcode, n in self.main_loop.items() if opcode.startswith("HGMMA"))

    @property
    def serialized(self) -> bool:
        """Whether many of Hopper's products wait for all before them; of attention's two groups the last ones have to."""
        return 3 * self.waiting >= self.products > 0

    def tensor(self) -> Counter:
        return Counter({op: n for op, n in self.main_loop.items() if TENSOR.match(op)})

    def copies(self) -> Counter:
        """Global loads of the main loop by (bytes a thread, asynchronous)."""
        copies: Counter = Counter()
        for opcode, count in self.main_loop.items():
            if _GLOBAL_LOAD.match(opcode):
                copies[load_bytes(opcode), bool(_ASYNC_COPY.search(opcode))] += count
        if self.unrolled:  # the synchronous loads are then the epilogue's
            copies = Counter({key: n for key, n in copies.items() if key[1]})
        return copies

    def copies_text(self) -> str:
        widest_first = sorted(self.copies().items(), reverse=True)
        return ", ".join(f"{n} × {width} B{'' if a else ' sync'}" for (width, a), n in widest_first)

    def narrowest_load_in_loops(self) -> int:
        return min((load_bytes(op) for loop in self.loops for op in loop if _GLOBAL_LOAD.match(op)), default=16)


class _Loop(NamedTuple):
    """A natural loop's opcodes, and those that every pass goes through: a persistent program's epilogue is not."""

    whole: Counter
    every_pass: Counter
    waiting: int = 0  # of Hopper's products, see MachineCode

    @classmethod
    def of(
        cls,
        header: str,
        loop: set[str],
        edges: list[tuple[str, str]],
        opcodes: dict[str, Counter],
        waiting: dict[str, int],
    ) -> "_Loop":
        after: dict[str, list[str]] = {block: [] for block in loop}
        for source, target in edges:
            if source in loop and target in loop:
                after[source].append(target)

        def comes_round_without(block: str) -> bool:
            reached, todo = {header, block}, [header]
            while todo:
                following = after[todo.pop()]
                if header in following:
                    return True
                new = set(following) - reached
                reached |= new
                todo += new
            return False

        # Blackwell's products stand in a branch, which one thread of all takes in every pass.
        multiplies = {block for block in loop if any(TENSOR.match(opcode) for opcode in opcodes[block])}
        optional = [block for block in loop - multiplies - {header} if comes_round_without(block)]
        total = lambda chosen: sum((opcodes[block] for block in chosen), Counter())  # noqa: E731
        every_pass = loop.difference(optional)
        return cls(total(loop), total(every_pass), sum(waiting[block] for block in every_pass))


def inspect(kernel) -> MachineCode:
    """Of a `triton.compiler.CompiledKernel`."""
    target = kernel.metadata.target
    if target.backend == "hip":
        resources, whole, loops = _amd(kernel.asm["amdgcn"])
        waves = resources.pop("waves")  # by registers; shared memory allows a CU's four SIMDs so many:
        if kernel.metadata.shared:
            workgroups = _AMD_SHARED[target.arch] // kernel.metadata.shared
            waves = min(waves, workgroups * kernel.metadata.num_warps / 4)
        occupancy = round(100 * waves / _AMD_WAVES[target.arch], 1)
        resources |= {"shared_limit": _AMD_SHARED[target.arch], "occupancy": occupancy}
    else:
        resources, whole, loops = _nvidia(kernel, cuxray.lookup(f"sm_{target.arch}"))
    # Where there are matrix products, a loop that adds something else up is not the main one.
    density = functools.partial(_density, fma=not any(map(TENSOR.match, whole)))
    loop = max(loops, key=lambda loop: density(loop.every_pass), default=_Loop(Counter(), Counter()))
    main, unrolled = loop.every_pass, density(loop.every_pass) == 0
    around = resources.pop("around", Counter())
    waiting = resources.pop("waiting", 0)
    return MachineCode(
        **resources,
        shared=kernel.metadata.shared,
        everything=whole,
        main_loop=whole if unrolled else main,
        sometimes=Counter() if unrolled else loop.whole - main,
        outside=around if unrolled else whole - loop.whole,
        unrolled=unrolled,
        loops=tuple(loop.whole for loop in loops),
        waiting=waiting if unrolled else loop.waiting,
    )


def load_bytes(opcode: str) -> int:
    """Bytes a thread loads; a TMA copy is a bulk copy of at least 16."""
    if opcode.startswith("UTMALDG"):
        return 16
    return next((_WIDTHS[part] for part in re.split(r"[._]", opcode) if part in _WIDTHS), 4)


def _density(loop: Counter, fma: bool) -> float:
    """Share of multiplications, with `fma` those of numbers: what tells the main loop from a loop around it and from one
    that waits."""
    found = sum(n for op, n in loop.items() if TENSOR.match(op))
    if fma:
        found = sum(n for op, n in loop.items() if re.match(r"FFMA|v_(pk_)?(fma|fmac)_f32|v_dual_fmac", op))
    return (found if not fma or found >= 32 else 0) / max(sum(loop.values()), 1)


def _nvidia(kernel, spec) -> tuple[dict, Counter, list[_Loop]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = next(iter(resusage.parse(_tool("cuobjdump", "--dump-resource-usage", cubin)).values()))
        function = next(iter(sass.parse_gi(_tool("nvdisasm", "-c", cubin)).functions.values()))
    opcodes = [i.opcode for i in function.instructions]
    products = [at for at, opcode in enumerate(opcodes) if TENSOR.match(opcode)] or [len(opcodes)]
    threads = kernel.metadata.num_warps * spec.warp_size
    occupancy = cuxray.compute(spec, usage.reg, threads, smem_dynamic=kernel.metadata.shared)
    spills = spill_map(function)
    resources = {
        "registers": usage.reg,
        "spills": spills["store_bytes"] + spills["load_bytes"],
        "waiting": sum(map(_waits, function.instructions)),
        "around": Counter(opcodes[: products[0]] + opcodes[products[-1] + 1 :]),
        "shared_limit": spec.smem_per_block_max,
        "occupancy": occupancy.occupancy_pct,
    }
    return resources, Counter(opcodes), _nvidia_loops(function)


def _nvidia_loops(function: sass.Function) -> list[_Loop]:
    """Natural loops, by cuxray from a control-flow graph drawn here: nvdisasm draws none of CUDA 12's cubins."""
    blocks, label = {function.name: []}, {}
    last, current = None, function.name
    for instruction in function.instructions:
        if last is not None and (_is_jump(last) or last.block != instruction.block):
            current = f"{instruction.addr:#x}"
            blocks[current] = []
        label.setdefault(instruction.block, current)
        blocks[current].append(instruction)
        last = instruction
    names = list(blocks)
    edges = []
    for name, following in zip(names, [*names[1:], None], strict=True):
        last = blocks[name][-1]
        if target := re.search(r"`\(([^)]+)\)", last.operands) if last.opcode.startswith("BRA") else None:
            edges.append((name, label.get(target[1], name)))
        conditional = last.predicate or re.match(r"!?U?P\d", last.operands)
        if following and (conditional or not _is_jump(last)):
            edges.append((name, following))
    dot = [f'subgraph "cluster_{function.name}"', *(f'"{a}" -> "{b}"' for a, b in edges)]
    graph = cfgdot.parse("\n".join(dot))[function.name]
    opcodes = {name: Counter(i.opcode for i in block) for name, block in blocks.items()}
    waiting = {name: sum(map(_waits, block)) for name, block in blocks.items()}
    return [_Loop.of(header, set(loop), edges, opcodes, waiting) for header, loop in graph.loops.items()]


def _waits(instruction: sass.Instruction) -> bool:
    return instruction.opcode.startswith("HGMMA") and "gsb0" in instruction.operands


def _is_jump(instruction: sass.Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("BRA", "EXIT", "RET", "BRX")


def _amd(assembly: str) -> tuple[dict, Counter, list[_Loop]]:
    def field(pattern: str) -> int:
        return int(re.search(pattern + r"\s*(\d+)", assembly)[1])

    loops: dict[str, Counter] = {}
    around: dict[str, list[str]] = {}  # loop header: the loops that it is in
    everything: Counter = Counter()
    block, inside = "", []
    for line in assembly.splitlines():
        if start := re.match(r"(?:\.L|; %)(BB\d+_\d+|bb\.\d+):", line):
            block, inside = start[1], []
        # LLVM's comments where a block begins: the loops around it, and whether it heads one itself
        inside += re.findall(r"Parent Loop (BB\d+_\d+)", line)
        if "Loop Header" in line:
            around[block] = list(inside)
            inside.append(block)
        for header in re.findall(r"in Loop: Header=(BB\d+_\d+)", line):
            inside += [*around.get(header, []), header]
        if instruction := re.match(r"\t([a-z]\w+)", line):
            opcode = instruction[1] + ".lds" * line.endswith(" lds")
            everything[opcode] += 1
            for loop in inside:
                loops.setdefault(loop, Counter())[opcode] += 1
    resources = {
        "registers": field(r"\.vgpr_count:"),
        "spills": field(r"\.private_segment_fixed_size:"),
        "waves": field(r"; Occupancy:"),
    }
    return resources, everything, [_Loop(loop, loop) for loop in loops.values()]


@functools.cache
def _tools() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _tool(name: str, *arguments) -> str:
    command = [_tools() / name, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
