"""The gates that a compiled kernel has to pass to be shipped for an architecture, and their exemptions."""

import re
from collections import Counter
from dataclasses import dataclass, field, replace

from bound import Work
from machine_code import MachineCode

# What the architecture multiplies matrices with.
TENSOR = {
    "sm_80": "HMMA", "sm_86": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA",
    "gfx942": "v_mfma", "gfx950": "v_mfma", "gfx1100": "v_wmma",
}  # fmt: skip
# The kernels whose main loop has to be fed by 16-byte copies, asynchronous ones where the architecture has them.
ATTENTION = {"attention", "attention_segments"}
GEMMS = {"patch_embed", "patch_rows", "layernorm_linear", "linear_residual"}
COPIES = GEMMS | ATTENTION
ASYNC = re.compile("sm_")
NO_DOT = {"layernorm", "residual_epilogue"}


@dataclass(frozen=True)
class Exemption:
    """Where a gate's letter makes no sense: which kernels, what they have to have instead, and why."""

    kernel: str
    shape: str
    arch: str
    copy_bytes: int = 16
    tensor: str | None = None  # the instruction; "" for none
    reason: str = ""

    def covers(self, row: "Row") -> bool:
        matches = re.search(self.shape, row.shape) and re.match(self.arch, row.arch)
        return self.kernel == row.kernel and bool(matches)


EXEMPTIONS = [
    Exemption("patch_embed", r"PATCH=14\b", "", 4, reason="a patch row is 14 pixels, a weight row 1176 bytes"),
    Exemption("patch_rows", r"K=588\b", "", 4, reason="a row is 1176 bytes"),
    *(
        Exemption(kernel, r"HEAD_DIM=(72|80|96)\b", "", 4, reason="the second slice is too narrow for all threads")
        for kernel in sorted(ATTENTION)
    ),
    Exemption("pool", "", "sm_", tensor="HMMA", reason="M = 16 heads"),
    Exemption("value", "", "sm_", tensor="HMMA", reason="M = 16 images"),
    Exemption("pool", "", "gfx11", tensor="", reason="the fp32 scores: RDNA has no fp32 matrix instruction"),
]


@dataclass
class Row:
    """One specialization of one kernel on one architecture."""

    arch: str
    dtype: str
    kernel: str
    shape: str
    config: dict[str, int]
    code: MachineCode | None
    error: str | None = None  # why there is no code
    calls: dict[str, Counter[Work]] = field(default_factory=dict)  # model: launches of a forward pass


def requirements(row: Row) -> Exemption:
    strict = Exemption(row.kernel, "", "", tensor="" if row.kernel in NO_DOT else TENSOR[row.arch])
    if (
        row.kernel in COPIES and row.config["BLOCK_M"] < 64 and TENSOR[row.arch] in ("HGMMA", "UTCHMMA")
    ):  # which multiply 64 rows or more
        strict = replace(strict, tensor=strict.tensor and "HMMA")
    found = next((e for e in EXEMPTIONS if e.covers(row)), strict)
    return found if found.tensor is not None else replace(found, tensor=strict.tensor)


def failures(row: Row) -> list[str]:
    """The gates that a row fails; in fp32 only whether it fits and does not spill."""
    if row.error:
        return [row.error]
    code, failed = row.code, []
    if code.shared > code.shared_limit:
        failed.append(f"shared memory {code.shared} > {code.shared_limit}")
    if code.spills:
        failed.append(f"spills {code.spills} bytes")
    if row.dtype == "fp32":
        return failed
    required = requirements(row)
    if required.tensor and not any(op.startswith(required.tensor) for op in code.tensor()):
        failed.append(f"no {required.tensor}")
    if row.kernel in COPIES:
        least = required.copy_bytes
        copies = code.copies()
        if not copies:
            failed.append("no copies that feed the main loop")
        elif min(width for width, _ in copies) < least:
            failed.append(f"copies narrower than {least} bytes: {code.copies_text()}")
        if ASYNC.match(row.arch) and not all(asynchronous for _, asynchronous in copies):
            failed.append(f"synchronous loads in the main loop: {code.copies_text()}")
    if code.serialized:
        failed.append(f"a serialized main loop: {code.waiting} of {code.products} HGMMA wait (gsb0)")
    # Triton waits for a product of Blackwell's in its own pass only where it made the barrier for it there.
    if row.arch == "sm_100" and (own := sum(n for op, n in code.main_loop.items() if op.startswith("SYNCS.EXCH"))):
        failed.append(f"a serialized main loop: {own} of {code.main_loop['UTCBAR']} products are waited for at once")
    if code.narrowest_load_in_loops() <= 2:
        failed.append("2-byte global loads in a loop")
    return failed
