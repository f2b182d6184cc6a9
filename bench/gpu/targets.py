"""The stated targets, and whether the default variants and the selected variants meet them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..problem import MAIN
from .plan import Case
from .variants import TABLE

Document = dict[str, Any]
Found = dict[str, Any]  # one variant of one case: its measurements, or `skipped` or `failed` with the reason


class Target(NamedTuple):
    """A bound on a figure of one case."""

    text: str
    kind: str
    figure: str  # "ratio", "roofline", "memory", or the variant for a speedup over it
    bound: float
    is_minimum: bool


TARGETS = (
    Target("forward ≤ 1.15 × F.linear", "forward", "ratio", 1.15, False),
    Target("forward ≥ 70 % of roofline", "forward", "roofline", 0.70, True),
    Target("step ≤ 1.10 × F.linear", "step", "ratio", 1.10, False),
    Target("loss step ≤ 1.00 × F.linear with F.cross_entropy", "loss", "ratio", 1.00, False),
    Target("forward ≥ 1.3 × faster than compiled split", "forward", "split compiled", 1.3, True),
    Target("step ≥ 1.3 × faster than compiled split", "step", "split compiled", 1.3, True),
    Target("forward ≥ 15 × faster than direct", "forward", "direct", 15, True),
    Target("step ≥ 15 × faster than direct", "step", "direct", 15, True),
    Target("forward memory ≤ 1.4 × F.linear's", "forward", "memory", 1.4, False),
    Target("step memory ≤ 1.4 × F.linear's", "step", "memory", 1.4, False),
    Target("loss step memory ≤ 1.0 × F.linear's", "loss", "memory", 1.0, False),
)


class Verdict(NamedTuple):
    """The verdict on a target for one variant."""

    variant: str
    target: str
    verdict: str  # "met", "missed", "not measured"
    detail: str  # the figure at the main size, or the reason why there is none
    elsewhere: str  # number of the other sizes, in bf16 and float32, that meet it


def _value(target: Target, backend: str, variants: dict[str, Found]) -> float | str:
    """Return the figure, or the reason why there is none."""

    def missing(name: str) -> str | None:
        found = variants.get(name)
        if found is None:
            return f"{name} was not measured"
        if why := found.get("failed") or found.get("skipped"):
            return f"{name}: {why}"
        return None if "ms" in found else f"{name} was not timed"

    if why := missing(backend):
        return why
    ours = variants[backend]
    if "inexact" in ours:
        return f"its results are wrong, relative error of {ours['inexact']}"
    if target.figure == "roofline":
        return float(ours["roofline"]) if "roofline" in ours else "the ceilings were not measured"
    other = target.figure if target.figure in TABLE else "linear"
    if why := missing(other):
        return why
    if target.figure == "ratio":
        return float(ours["ratio"]["median"]) if "ratio" in ours else "it shared no round with F.linear"
    if target.figure == "memory":
        if not ours.get("memory") or not variants["linear"].get("memory"):
            return "memory was not read"
        return float(ours["memory"] / variants["linear"]["memory"])
    if "ratio" not in ours or "ratio" not in variants[other]:
        return "it shared no round with F.linear"
    return float(
        variants[other]["ratio"]["median"] / ours["ratio"]["median"]
    )  # the two may come from different cases


def judged_variants(document: Document) -> list[str]:
    """Return the default variants and the selected variants."""
    picks = document.get("rule", {})
    winners = [picks.get(f"bf16 {kind}", {}).get("winner") for kind in ("forward", "step")]
    return list(dict.fromkeys(["cuda", "triton", *(name for name in winners if name)]))


def verdicts(document: Document) -> list[Verdict]:
    """Judge each target at the main size in bf16, and count the other sizes that meet it."""
    judged = []
    for backend in judged_variants(document):
        for target in TARGETS:
            main: float | str = "the case was not measured"
            met = measured = 0
            for (precision, size, kind), variants in merged(document).items():
                if kind != target.kind or precision == "tf32":
                    continue
                value = _value(target, backend, variants)
                if (precision, size) == ("bf16", str(MAIN)):
                    main = value
                elif not isinstance(value, str):
                    measured += 1
                    met += _met(target, value)
            if isinstance(main, str):
                verdict, detail = "not measured", main
            else:
                verdict = "met" if _met(target, main) else "missed"
                detail = f"{main:.0%}" if target.figure == "roofline" else f"{main:.2f} ×"
            elsewhere = f"{met} of {measured}" if measured else "–"
            judged.append(Verdict(backend, target.text, verdict, detail, elsewhere))
    return judged


def _met(target: Target, value: float) -> bool:
    return value >= target.bound if target.is_minimum else value <= target.bound


def cases(document: Document) -> Iterator[tuple[Case, dict[str, Found]]]:
    """Yield the cases with the results per variant."""
    for result in document.get("cases", []):
        yield Case.from_json(result["case"]), result["variants"]


def merged(document: Document) -> dict[tuple[str, str, str], dict[str, Found]]:
    """Merge the results per (precision, size, kind) and variant, over all cases of a size."""
    found: dict[tuple[str, str, str], dict[str, Found]] = {}
    for case, variants in cases(document):
        if not case.graph:
            row = found.setdefault((case.precision, str(case.size), case.kind), {})
            for name, entry in variants.items():
                if "ms" in entry or name not in row:
                    row.setdefault(name, entry)
                    if "ms" not in row[name]:
                        row[name] = entry
    return found
