"""The JSON document and the Markdown page of `bench.gpu`: tables, and which of the stated targets are met."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .forms import Size
from .gpu_plan import COMPILED, LOSSES, MAIN, OURS, PLAIN, WIDTHS, Case

Document = dict[str, Any]
Found = dict[str, Any]  # one form of one case: what was measured, or `skipped` or `failed` and the reason
ROWS = (*PLAIN[:3], COMPILED[0], COMPILED[1], PLAIN[3], *LOSSES)
NAMES = {"linear": "`F.linear`", "cuda": "gistops, cuda", "triton": "gistops, triton"}


def save(path: Path, text: str) -> None:
    """Write a file aside and move it into place, so that a reader, or a killed run, never has half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
    os.replace(file.name, path)


def write(path: Path, document: Document) -> None:
    """Write the document as JSON, and its page beside it."""
    document["verdicts"] = [verdict._asdict() for verdict in verdicts(document)]
    save(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    save(path.with_suffix(".md"), render(document))


class Target(NamedTuple):
    """A bound on a number that is read off one case."""

    text: str
    kind: str
    of: str  # "ratio", "roofline", "memory", or the form that ours is to be faster than
    bound: float
    least: bool  # the bound is a least value, not a most


TARGETS = (
    Target("forward ≤ 1.15 × F.linear", "forward", "ratio", 1.15, False),
    Target("forward ≥ 70 % of roofline", "forward", "roofline", 0.70, True),
    Target("step ≤ 1.10 × F.linear", "step", "ratio", 1.10, False),
    Target("forward ≥ 1.3 × faster than compiled split", "forward", "split compiled", 1.3, True),
    Target("step ≥ 1.3 × faster than compiled split", "step", "split compiled", 1.3, True),
    Target("forward ≥ 15 × faster than direct", "forward", "direct", 15, True),
    Target("step ≥ 15 × faster than direct", "step", "direct", 15, True),
    Target("forward memory ≤ 1.4 × F.linear's", "forward", "memory", 1.4, False),
    Target("step memory ≤ 1.4 × F.linear's", "step", "memory", 1.4, False),
)


class Verdict(NamedTuple):
    """What became of a target, for one backend."""

    backend: str
    target: str
    verdict: str  # "met", "missed", "not measured"
    detail: str  # the number at the main size, or why there is none
    elsewhere: str  # at how many of the other sizes, bf16 and float32, it is met


def _value(target: Target, backend: str, forms: dict[str, Found]) -> float | str:
    """The number to hold against the bound, or why there is none."""

    def missing(name: str) -> str | None:
        found = forms.get(name)
        if found is None:
            return f"{name} was not measured"
        if why := found.get("failed") or found.get("skipped"):
            return f"{name}: {why}"
        return None if "ms" in found else f"{name} was not timed"

    if why := missing(backend):
        return why
    ours = forms[backend]
    if "inexact" in ours:
        return f"its results are wrong, relative error of {ours['inexact']}"
    if target.of == "roofline":
        return float(ours["roofline"]) if "roofline" in ours else "the ceilings were not measured"
    other = target.of if target.of in forms or target.of in (*PLAIN, *COMPILED) else "linear"
    if why := missing(other):
        return why
    if target.of == "ratio":
        return float(ours["ratio"]["median"]) if "ratio" in ours else "it shared no round with F.linear"
    if target.of == "memory":
        if not ours.get("memory") or not forms["linear"].get("memory"):
            return "memory was not read"
        return float(ours["memory"] / forms["linear"]["memory"])
    return float(forms[other]["ms"]["median"] / ours["ms"]["median"])


def verdicts(document: Document) -> list[Verdict]:
    """Each target for each backend: at the main size in bf16, and a count over the other sizes."""
    judged = []
    for backend in OURS:
        for target in TARGETS:
            main: float | str = "the case was not measured"
            met = measured = 0
            seen = set()
            for case, forms in _cases(document):
                key = (case["precision"], str(_size(case)))
                if case["kind"] != target.kind or case["graph"] or key[0] == "tf32" or key in seen:
                    continue
                value = _value(target, backend, forms)
                if key == ("bf16", str(MAIN)):
                    main = value
                    seen.add(key)
                elif not isinstance(value, str):  # a later visit may have what this one lacks
                    seen.add(key)
                    measured += 1
                    met += _met(target, value)
            if isinstance(main, str):
                verdict, detail = "not measured", main
            else:
                verdict = "met" if _met(target, main) else "missed"
                detail = f"{main:.0%}" if target.of == "roofline" else f"{main:.2f} ×"
            elsewhere = f"{met} of {measured}" if measured else "–"
            judged.append(Verdict(backend, target.text, verdict, detail, elsewhere))
    return judged


def _met(target: Target, value: float) -> bool:
    return value >= target.bound if target.least else value <= target.bound


def _size(case: dict[str, Any]) -> Size:
    return Size(**case["size"])


def _cases(document: Document) -> Iterator[tuple[dict[str, Any], dict[str, Found]]]:
    for result in document.get("cases", []):
        yield result["case"], result["forms"]


def render(document: Document) -> str:
    """The page."""
    lines = [summary(document), HOW, "", *_tables(document), *_graphs(document), *_left_out(document)]
    return "\n".join(lines).rstrip() + "\n"


def summary(document: Document) -> str:
    """The head of the page: the machine, what became of each part, the ceilings, the targets."""
    lines = [f"# gistops on {document['header']['gpu']}", ""]
    lines += [f"- {name}: {value}" for name, value in document["header"].items() if value]
    lines += ["", *_parts(document)]
    if ceilings := document.get("ceilings"):
        rates = ", ".join(f"{p} {ceilings[p] / 1e12:.0f} TFLOP/s" for p in WIDTHS if p in ceilings)
        lines += [
            f"Ceilings measured in this run: copy {ceilings['bandwidth'] / 1e9:.0f} GB/s (read and written), {rates} "
            f"(products of random 8192 × 8192 matrices). Two events with nothing between them measure "
            f"{1e3 * ceilings['events_ms']:.1f} µs, which is in every time.",
            "",
        ]
    lines += [f"## Targets, bf16, {MAIN}", "", "| backend | target | verdict | measured | other sizes |"]
    lines.append("|---|---|---|---|---|")
    for verdict in verdicts(document):
        lines.append(f"| {' | '.join(_cell(text) for text in verdict)} |")
    return "\n".join([*lines, ""])


def line(result: dict[str, Any]) -> str:
    """One case in a line, as the run goes on."""
    case = Case.from_json(result["case"])
    if "skipped" in result:
        return f"{case.name}: {result['skipped']}"
    ratios = [
        f"{form} {found['ratio']['median']:.2f}" + ("!" if "inexact" in found else "")
        for form, found in result["forms"].items()
        if "ratio" in found
    ]
    failed = [form for form, found in result["forms"].items() if "failed" in found]
    said = ", ".join(ratios) + (f"; failed: {', '.join(failed)}" if failed else "")
    return f"{case.name}: {said} ({result['seconds']:.1f} s)"


HOW = (
    "Medians of rounds in which every form of a size is timed once, with a cold L2, between CUDA events, and with the "
    "queue kept full, so that launches are not in the times. A cell: ratio to `F.linear` in the same rounds (ms; n "
    "rounds; share of the form's roofline; peak memory beyond the arguments). *: the GPU waited for the CPU in over a "
    "tenth of the rounds. !: the results are less exact than they should be. m = 4 displacements; a step is forward, "
    'cross-entropy and backward to all four arguments. The forms with "loss" and those named after libraries hold no '
    "logits: ours give the constellation's loss, the libraries' that of a plain linear layer, or of cosines."
)


def _parts(document: Document) -> Iterator[str]:
    for name, part in document.get("parts", {}).items():
        said = f"**{part['problem']}**" if "problem" in part else "not run" if "not run" in part else "passed"
        lines = [f"{name}: {said}" + (f" ({part['not run']})" if "not run" in part else "")]
        for run, found in part.get("runs", {}).items():
            counts = ", ".join(f"{n} {word}" for word, n in found.get("counts", {}).items())
            what = counts or found.get("summary") or found.get("problem", "")
            lines.append(f"  - {run}: {what}")
            lines += [f"    - `{_cell(failure)}`" for failure in found.get("failures", [])[:10]]
        yield "- " + "\n".join(lines)
    yield from (f"- **{problem}**" for problem in document.get("problems", []))
    yield ""


def _tables(document: Document) -> Iterator[str]:
    """One table a precision and pass, of all sizes of one K and d in its columns."""
    cells: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for case, forms in _cases(document):
        if not case["graph"]:
            table = cells.setdefault((case["precision"], case["kind"]), {})
            for form, found in forms.items():
                row = table.setdefault(form, {})
                if "ms" in found or str(_size(case)) not in row:
                    row.setdefault(str(_size(case)), cell(found))
    for (precision, kind), table in cells.items():
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
        rows = [form for form in ROWS if any(text != "–" for text in table.get(form, {}).values())]
        for start in range(0, len(columns), 6):  # a page is only so wide
            part = columns[start : start + 6]
            yield from (f"## {kind.capitalize()}, {precision}, B×K×d", "")
            yield f"| | {' | '.join(part)} |"
            yield "|---|" + "---|" * len(part)
            for form in rows:
                yield f"| {NAMES.get(form, form)} | {' | '.join(table[form].get(c, '–') for c in part)} |"
            yield ""


def cell(found: Found) -> str:
    """One form at one size: `1.08 (0.021 ms; 100; 74 %; 9.8 MiB)`."""
    if "failed" in found:
        return "failed"
    if "ms" not in found:
        return "out of memory" if "out of memory" in found.get("skipped", "").lower() else "–"
    ratio = f"{found['ratio']['median']:.2f} " if "ratio" in found else ""
    facts = [f"{found['ms']['median']:.3g} ms", str(found["n"])]
    if "roofline" in found:
        facts.append(f"{found['roofline']:.0%}")
    if found.get("memory"):
        facts.append(f"{found['memory'] / 2**20:.4g} MiB")
    marks = ("*" if found.get("behind", 0) > 0.1 else "") + ("!" if "inexact" in found else "")
    return f"{ratio}({'; '.join(facts)}){marks}"


def _graphs(document: Document) -> Iterator[str]:
    rows = [(case, form, found) for case, forms in _cases(document) for form, found in forms.items()]
    eager = {
        (str(_size(c)), c["kind"], form): f
        for c, form, f in reversed(rows)
        if (c["precision"], c["graph"]) == ("bf16", False) and "loop_ms" in f
    }
    rows = [(case, form, found) for case, form, found in rows if case["graph"]]
    if not rows:
        return
    yield from ("## Launches: milliseconds a call, bf16", "")
    yield "| B×K×d | pass | form | as the CPU launches it, in a loop | replay of a CUDA graph, in a loop | replay, cold L2 |"
    yield "|---|---|---|---|---|---|"
    for case, form, found in rows:
        key = (str(_size(case)), case["kind"], form)
        loop = f"{eager[key]['loop_ms']:.3g}" if key in eager else "–"
        replay = (
            [f"{found['loop_ms']:.3g}", f"{found['ms']['median']:.3g}"] if "loop_ms" in found else ["–", "–"]
        )
        yield f"| {key[0]} | {key[1]} | {NAMES.get(form, form)} | {loop} | {' | '.join(replay)} |"
    yield ""


def _left_out(document: Document) -> Iterator[str]:
    """What was not measured, and why: one line a reason."""
    reasons: dict[str, list[str]] = {}
    for result in document.get("cases", []):
        name = Case.from_json(result["case"]).name
        if "skipped" in result:
            reasons.setdefault(result["skipped"], []).append(name)
        for form, found in result["forms"].items():
            if why := found.get("failed") or found.get("skipped"):
                reasons.setdefault(f"{form}: {why}", []).append(name)
            elif "inexact" in found:
                reasons.setdefault(f"{form}, inexact: {found['inexact']}", []).append(name)
    for skipped in document.get("skipped", []):
        reasons.setdefault(skipped["reason"], []).append(Case.from_json(skipped["case"]).name)
    if reasons:
        yield from ("## Not measured, or measured and wrong", "")
        for reason, names in reasons.items():
            some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            yield f"- {_cell(reason)} ({some})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
