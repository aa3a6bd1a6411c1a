"""How many cores this process may use: what the machine has, less what an affinity or a container's quota takes away."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores() -> int:
    """At least 1; a quota of one and a half counts as two."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [quota for quota in _quotas(Path("/")) if quota > 0]
    return math.ceil(min([cores, *quotas]))


def _quotas(root: Path) -> Iterator[float]:
    """The cores that each control group around this process may use; `root` is where /proc and /sys are."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:  # such as 0::/a/b, of version 2, or 4:cpu,cpuacct:/a/b, of version 1
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inside = Path(path.lstrip("/"))
        # In a container the path may be the host's: what is not there is passed over.
        for group in (inside, *inside.parents):
            try:
                if controllers:
                    quota, period = ((base / group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (base / group / "cpu.max").read_text().split()
            except OSError:
                continue
            if quota.strip() != "max":
                yield int(quota) / int(period)
