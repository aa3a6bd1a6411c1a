"""`siglip-fast tune`: measures how each operation of a model runs fastest on this GPU, and prints what won."""

from argparse import Namespace

import torch

from ..backends.choice import Choice
from ..backends.select import backend_for
from ..errors import UserError, first_line
from ..feed.loading import pick_device
from ..models.variants import load_config
from ..tuning.cache import LAUNCHES, is_measured
from ..tuning.tune import STALL, Report, tune


def run(args: Namespace) -> int:
    """The subcommand: 0 if all is measured, 1 if there was no time for some of it or nothing right was found."""
    device = pick_device(args.device)
    if device.type == "cpu" and not _can_interpret():
        raise UserError("tune finds what runs each operation fastest on a GPU; a CPU leaves no choice: run it on a GPU")
    config = load_config(args)
    try:
        report = tune(
            config,
            getattr(torch, args.dtype),
            args.batch_sizes,
            device,
            budget=args.budget,
            force=args.force,
            stall=min(STALL, max(20.0, args.budget / 2)),
        )
    except RuntimeError as error:
        raise UserError(first_line(error)) from error
    print(describe(report))
    return 1 if report.left or not all(map(is_measured, report.entries.values())) else 0


def describe(report: Report) -> str:
    """A table of what won against what, what was dropped and why, and what is left."""
    lines = [f"{'operation':<44}{'rows':>8}{'launched':>10}{'µs':>10}{'vs vendor':>11}  fastest"]
    dropped: list[str] = []
    for case, entry in report.entries.items():
        for launch in LAUNCHES:
            found = entry[launch]
            times = found["microseconds"]
            vendor = min((t for name, t in times.items() if not name.startswith("triton")), default=None)
            name = str(Choice(found["route"], found["config"])) if found["route"] else None
            time = f"{times[name]:.1f}" if name else "–"
            ratio = f"{vendor / times[name]:.2f}" if name and vendor else "–"
            figures = f"{case.operation!s:<44}{case.rows:>8}{launch:>10}{time:>10}{ratio:>11}"
            lines.append(f"{figures}  {name or 'the default, unmeasured'}")
        dropped += [f"  {case}: {name}: {reason}" for name, reason in entry["dropped"].items()]
    if dropped:
        lines += ["", f"dropped ({len(dropped)}):", *dropped]
    if report.left:
        lines += ["", f"no time for {len(report.left)} of them (--budget): {', '.join(map(str, report.left))}"]
    return "\n".join([*lines, "", f"written: {report.path}"])


def _can_interpret() -> bool:
    try:
        return backend_for("triton", torch.device("cpu"))[0] is not None
    except RuntimeError:
        return False
