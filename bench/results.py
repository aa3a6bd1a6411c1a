"""Results of the benchmarks as report.py, tables.py and plots.py see them."""

import json
from pathlib import Path


def load(paths: list[Path]) -> tuple[list[dict], list[str]]:
    """The results in files of one a line, of those of one case the last; and what is wrong with the files."""
    results, wrong = {}, []
    for path in paths:
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        if not lines:
            wrong.append(f"{path.name}: no results")
        for number, line in enumerate(lines, start=1):
            try:
                result = json.loads(line)
                results[tuple(result.get(key) for key in ("kind", "operation", "model", "batch_size", "dtype"))] = (
                    result
                )
            except ValueError:  # a copy that was cut off
                wrong.append(f"{path.name}: line {number} is not whole")
    return list(results.values()), wrong


def fastest_of_ours(result: dict) -> str:
    ours = [name for name in result["candidates"] if name.startswith("siglip_fast")]
    return min(ours, key=lambda name: result["candidates"][name]["milliseconds"])


def ratio(result: dict, name: str) -> float:
    """How many times faster the fastest of ours is."""
    times = {name: figures["milliseconds"] for name, figures in result["candidates"].items()}
    return times[name] / times[fastest_of_ours(result)]


def rows(results: list[dict]) -> list[dict]:
    """Flat, one a candidate, everything that is known about it in each."""
    flat = []
    for result in results:
        about, clocks = result["about"], result["clocks"]
        case = {"kind": result["kind"], "operation": result.get("operation")}
        case |= {key: result[key] for key in ("model", "batch_size", "dtype")}
        where = {key: about[key] for key in ("device", "threads", "driver", "revision", "measured")}
        where |= {"tuned": " ".join(about["tuned"]), "matmul_peak_tflops": result["matmul_peak_tflops"]}
        where |= {f"{k}_{when}": v for when, read in clocks.items() for k, v in (read or {}).items()}
        where |= {f"{name}_version": version for name, version in about["versions"].items()}
        for name, figures in result["candidates"].items():
            compared = {"candidate": name, **figures, "ours_is_times_faster": round(ratio(result, name), 3)}
            flat.append(case | compared | where)
        flat += [case | {"candidate": name, "missing": why} | where for name, why in result["missing"].items()]
    return flat


def grouped(results: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    return groups


def union(dictionaries) -> list[str]:
    return list(dict.fromkeys(name for d in dictionaries for name in d))


def entered(results: list[dict]) -> list[str]:
    """The candidates that were measured in any of them, in the order in which they entered."""
    names = union(r["entered"] for r in results)
    return [name for name in names if any(name in r["candidates"] for r in results)]
