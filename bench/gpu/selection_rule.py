"""The rule that selects the best variants. It was written before any measurement.

A variant is excluded if it fails its smoke check, gives different bits when run again, or has a sanitizer error. For
forward, step, loss and topk in each precision, the variant with the lowest geometric mean of time / F.linear over the sizes
wins. Among the variants within 3 % the simplest wins: cuBLAS before Triton before CUDA, then the earlier row of the table
(the default). Another variant is selected for a single size only if it is more than 10 % faster there. A hand-written TMA
kernel is considered only if the selected forward takes more than 1.2 times F.linear at K = 8192, cuBLAS's best case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..problem import MAIN, Size
from .plan import SIZES, Case, shrink_for_cpu
from .variants import CANDIDATES, KINDS, PRECISIONS, SIMPLICITY, TABLE

TIE = 1.03
WORTH_AN_EXCEPTION = 1.10
WORTH_HAND_WRITING = 1.2
Ratios = dict[str, dict[str, float]]  # variant -> size -> time / F.linear


def ratios(document: dict[str, Any], precision: str, kind: str) -> Ratios:
    """Return the measurements at the four sizes whose results are accurate."""
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
    """Return variant -> the reason why it is excluded."""
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


def choose(document: dict[str, Any], precision: str, kind: str, backend: str | None = None) -> dict[str, Any]:
    """Return the winner with its figures, or `none` with the reason; of one backend if it is given."""
    found = ratios(document, precision, kind)
    excluded = excluded_variants(document, precision, kind)
    sizes = list(found.get("linear", {}))
    candidates = [v.name for v in CANDIDATES if backend in (None, v.backend)]
    ours = {name: found[name] for name in candidates if name in found and name not in excluded}
    whole = {name: all_ for name, all_ in ours.items() if set(sizes) <= set(all_)}
    if not sizes or not whole:
        return {"none": "nothing was measured" if not ours else "none was measured at every size"}
    means = {
        name: math.exp(sum(math.log(all_[s]) for s in sizes) / len(sizes)) for name, all_ in whole.items()
    }
    least = min(means.values())
    close = [name for name, mean in means.items() if mean <= TIE * least]
    order = list(TABLE)
    winner = min(close, key=lambda name: (SIMPLICITY[TABLE[name].family], order.index(name)))
    picked: dict[str, Any] = {"winner": winner, "mean": means[winner], "at": whole[winner], "means": means}
    if len(sizes) < len(SIZES):
        picked["of sizes"] = f"{len(sizes)} of {len(SIZES)}"
    for size in sizes:
        best = min((name for name in ours if size in ours[name]), key=lambda name: ours[name][size])
        if whole[winner][size] > WORTH_AN_EXCEPTION * ours[best][size]:
            picked.setdefault("but", {})[size] = {"variant": best, "ratio": ours[best][size]}
    if excluded:
        picked["out"] = excluded
    if not _smoked(document, winner, precision):
        picked["unchecked"] = "its smoke checks did not run"
    return picked


def _smoked(document: dict[str, Any], name: str, precision: str) -> bool:
    results = document.get("smoke", [])
    return any(name in r["variants"] and r["case"]["precision"] == precision for r in results)


def worth_hand_written(document: dict[str, Any]) -> dict[str, Any]:
    """Compare the selected forward with the threshold for a hand-written kernel."""
    winner = choose(document, "bf16", "forward").get("winner")
    aligned = document.get("constants", {}).get("linear forward K=8192", {}).get("ms")
    main = _sizes(document)[SIZES.index(MAIN)]
    for result in document.get("cases", []):
        case = Case.from_json(result["case"])
        if (case.precision, case.kind, case.size, case.graph) == ("bf16", "forward", main, False):
            ms = result["variants"].get(winner, {}).get("ms", {}).get("median")
            if ms and aligned:
                ratio = ms / aligned
                return {"ratio to F.linear at K = 8192": ratio, "above threshold": ratio > WORTH_HAND_WRITING}
    return {"not known": "the chosen forward or F.linear at K = 8192 was not measured"}


def choose_all(document: dict[str, Any]) -> dict[str, Any]:
    """Return all selections, `<precision> <kind>` -> winner, and the comparison for a hand-written kernel."""
    chosen: dict[str, Any] = {f"{p} {kind}": choose(document, p, kind) for p in PRECISIONS for kind in KINDS}
    return chosen | {"by hand": worth_hand_written(document)}


def summary(chosen: dict[str, Any]) -> Iterator[str]:
    """Yield a line per selection."""
    for selection, pick in chosen.items():
        if "winner" in pick:
            but = "; ".join(
                f"at {size} {b['variant']} ({b['ratio']:.2f})" for size, b in pick.get("but", {}).items()
            )
            coverage = f" over {pick['of sizes']} sizes" if "of sizes" in pick else ""
            yield f"- {selection}: **{pick['winner']}** ({pick['mean']:.2f} × F.linear{coverage})" + (
                f"; but {but}" if but else ""
            )
        elif "none" in pick:
            yield f"- {selection}: none; {pick['none']}"
        else:
            yield f"- {selection}: " + ", ".join(f"{key}: {value}" for key, value in pick.items())
