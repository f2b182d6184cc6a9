"""The rule that picks the winner, written before any measurement.

A variant that fails its smoke run, gives other bits when run again, or has a sanitizer's error is out. For each of
forward, step and loss, and each precision, the one with the least geometric mean of time / F.linear over the sizes;
within 3 % of it the simpler one: cuBLAS before Triton before CUDA, and then the earlier row of the table, which is the
default. Another one for a single size only if it gains more than 10 % there. A kernel written by hand with TMA is worth
filing only if the chosen forward takes more than 1.2 times F.linear at K = 8192, where cuBLAS has its best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..problem import MAIN, Size
from .plan import SIZES, Case, shrink_for_cpu
from .variants import CANDIDATES, KINDS, PRECISIONS, SIMPLICITY, TABLE

CLOSE = 1.03
WORTH = 1.10
BY_HAND = 1.2
Ratios = dict[str, dict[str, float]]  # variant -> size -> time / F.linear


def ratios(document: dict[str, Any], precision: str, kind: str) -> Ratios:
    """The right measurements, of the four sizes."""
    wanted = [str(size) for size in _sizes(document)]
    found: Ratios = {}
    for result in document.get("cases", []):
        case = Case.from_json(result["case"])
        if case.graph or (case.precision, case.kind) != (precision, kind) or str(case.size) not in wanted:
            continue
        for name, entry in result["variants"].items():
            if "ratio" in entry and "inexact" not in entry:
                found.setdefault(name, {})[str(case.size)] = entry["ratio"]["median"]
    return found


def _sizes(document: dict[str, Any]) -> list[Size]:
    if document.get("options", {}).get("device") == "cpu":
        return [shrink_for_cpu(Case("bf16", size, "forward", ())).size for size in SIZES]
    return list(SIZES)


def excluded_variants(document: dict[str, Any], precision: str, kind: str) -> dict[str, str]:
    """Variant -> why it is no candidate."""
    found: dict[str, str] = dict(document.get("out", {}).get(f"{precision} {kind}", {}))
    for run, report in document.get("parts", {}).get("sanitize", {}).get("runs", {}).items():
        backend, tool = run.split()
        if "problem" in report and not report["problem"].startswith("stopped"):
            for variant in CANDIDATES:
                if variant.backend == backend:
                    found.setdefault(variant.name, f"{tool}: {report['problem']}")
    for result in document.get("cases", []):
        case = result["case"]
        if (case["precision"], case["kind"]) == (precision, kind):
            for name, entry in result["variants"].items():
                if why := entry.get("failed") or entry.get("inexact"):
                    found.setdefault(name, f"{Case.from_json(case).name}: {why}")
    return found


def choose(document: dict[str, Any], precision: str, kind: str) -> dict[str, Any]:
    """The winner and why, or `none` and why."""
    found = ratios(document, precision, kind)
    excluded = excluded_variants(document, precision, kind)
    sizes = list(found.get("linear", {}))
    ours = {v.name: found[v.name] for v in CANDIDATES if v.name in found and v.name not in excluded}
    whole = {name: all_ for name, all_ in ours.items() if set(sizes) <= set(all_)}
    if not sizes or not whole:
        return {"none": "nothing was measured" if not ours else "none was measured at every size"}
    means = {
        name: math.exp(sum(math.log(all_[s]) for s in sizes) / len(sizes)) for name, all_ in whole.items()
    }
    least = min(means.values())
    close = [name for name, mean in means.items() if mean <= CLOSE * least]
    order = list(TABLE)
    winner = min(close, key=lambda name: (SIMPLICITY[TABLE[name].family], order.index(name)))
    picked: dict[str, Any] = {"winner": winner, "mean": means[winner], "at": whole[winner], "means": means}
    if len(sizes) < len(SIZES):
        picked["of sizes"] = f"{len(sizes)} of {len(SIZES)}"
    for size in sizes:
        best = min((name for name in ours if size in ours[name]), key=lambda name: ours[name][size])
        if whole[winner][size] > WORTH * ours[best][size]:
            picked.setdefault("but", {})[size] = {"variant": best, "ratio": ours[best][size]}
    if excluded:
        picked["out"] = excluded
    if not _smoked(document, winner, precision):
        picked["unchecked"] = "its smoke runs were not made"
    return picked


def _smoked(document: dict[str, Any], name: str, precision: str) -> bool:
    results = document.get("smoke", [])
    return any(name in r["variants"] and r["case"]["precision"] == precision for r in results)


def worth_hand_written(document: dict[str, Any]) -> dict[str, Any]:
    """True if a forward written by hand is worth filing."""
    winner = choose(document, "bf16", "forward").get("winner")
    aligned = document.get("constants", {}).get("linear forward K=8192", {}).get("ms")
    main = _sizes(document)[SIZES.index(MAIN)]
    for result in document.get("cases", []):
        case = Case.from_json(result["case"])
        if (case.precision, case.kind, case.size, case.graph) == ("bf16", "forward", main, False):
            ms = result["variants"].get(winner, {}).get("ms", {}).get("median")
            if ms and aligned:
                ratio = ms / aligned
                return {"ratio to F.linear at K = 8192": ratio, "worth filing": ratio > BY_HAND}
    return {"not known": "the chosen forward or F.linear at K = 8192 was not measured"}


def choose_all(document: dict[str, Any]) -> dict[str, Any]:
    """All choices: `<precision> <kind>` -> the winner; and whether a kernel by hand is worth filing."""
    chosen: dict[str, Any] = {f"{p} {kind}": choose(document, p, kind) for p in PRECISIONS for kind in KINDS}
    return chosen | {"by hand": worth_hand_written(document)}


def summary(chosen: dict[str, Any]) -> Iterator[str]:
    """The choices in words."""
    for what, pick in chosen.items():
        if "winner" in pick:
            but = "; ".join(
                f"at {size} {b['variant']} ({b['ratio']:.2f})" for size, b in pick.get("but", {}).items()
            )
            some = f" over {pick['of sizes']} sizes" if "of sizes" in pick else ""
            yield f"- {what}: **{pick['winner']}** ({pick['mean']:.2f} × F.linear{some})" + (
                f"; but {but}" if but else ""
            )
        elif "none" in pick:
            yield f"- {what}: none; {pick['none']}"
        else:
            yield f"- {what}: " + ", ".join(f"{key}: {value}" for key, value in pick.items())
