"""table.md: the results of a session as a page."""

from __future__ import annotations

from collections.abc import Iterator

from ..problem import MAIN
from . import device_constants, selection_rule, table_entries, targets
from .plan import Case
from .targets import Document, Found, cases, merged
from .variants import KINDS, TABLE

NAMES = {"linear": "`F.linear`", "cuda": "gistops, cuda", "triton": "gistops, triton"}
LEGEND = (
    "Medians over rounds. A round times every variant of a size once, between CUDA events, with a cold L2 and a full queue, "
    "so that the times exclude launches; the time of the events is included. A cell: ratio to `F.linear` (and "
    "`F.cross_entropy`) in the same rounds (ms; n rounds; share of the variant's roofline; peak memory beyond the "
    "arguments; launch time of the CPU). *: the GPU waited for the CPU in more than a tenth of the rounds. !: the results "
    "exceed the tolerance. m = 4 displacements. forward: logits without gradients. topk: the 10 best classes, `F.linear` with "
    "`torch.topk`. step: logits, F.cross_entropy and "
    "backward to all arguments. loss: the variant's loss without materialized logits, and backward; the losses of other "
    "libraries are those of a linear layer or of a cosine classifier."
)


def render(document: Document) -> str:
    """Format the page."""
    lines = [
        summary(document),
        LEGEND,
        "",
        *_tables(document),
        *_graphs(document),
        *_kernels(document),
        *_left_out(document),
    ]
    return "\n".join(lines).rstrip() + "\n"


def summary(document: Document) -> str:
    """Format the head of the page: machine, parts, constants, selected variants, targets."""
    lines = [f"# gistops on {document['header']['gpu']}", ""]
    lines += [f"- {name}: {value}" for name, value in document["header"].items() if value]
    lines += ["", *_parts(document)]
    if found := document.get("constants"):
        lines += ["## Constants", "", *device_constants.summary(found), ""]
    if chosen := document.get("rule"):
        lines += ["## Selected variants", "", *selection_rule.summary(chosen), ""]
        if entries := list(table_entries.lines(document)):
            lines += [
                "## Entries for gistops/backends/triton/tile_tables.py",
                "",
                "```python",
                *entries,
                "```",
                "",
            ]
    lines += [f"## Targets, bf16, {MAIN}", "", "| variant | target | verdict | measured | other sizes |"]
    lines.append("|---|---|---|---|---|")
    for verdict in targets.verdicts(document):
        lines.append(f"| {' | '.join(_cell(text) for text in verdict)} |")
    return "\n".join([*lines, ""])


def line(result: dict[str, Found]) -> str:
    """Format one case as a line, for the output during the session."""
    case = Case.from_json(result["case"])
    if "skipped" in result:
        return f"{case.name}: {result['skipped']}"
    entries = []
    for variant, found in result["variants"].items():
        if "ratio" in found:
            entries.append(f"{variant} {found['ratio']['median']:.2f}" + ("!" if "inexact" in found else ""))
        elif "value" in found:
            entries.append(f"{variant} {found['value']:.4g}")
    failed = [variant for variant, found in result["variants"].items() if "failed" in found]
    text = ", ".join(entries) + (f"; failed: {', '.join(failed)}" if failed else "")
    return f"{case.name}: {text} ({result['seconds']:.1f} s)"


def _parts(document: Document) -> Iterator[str]:
    for name, part in document.get("parts", {}).items():
        status = (
            f"**{_cell(part['problem'])}**"
            if "problem" in part
            else "not run"
            if "not run" in part
            else "passed"
        )
        counted = ", ".join(
            f"{part[k]} {k}" for k in ("cases", "warmed", "late", "done", "skipped") if part.get(k)
        )
        more = _cell(part["not run"]) if "not run" in part else counted
        lines = [f"{name}: {status}" + (f" ({more})" if more else "")]
        for run, found in part.get("runs", {}).items():
            counts = ", ".join(f"{n} {word}" for word, n in found.get("counts", {}).items())
            outcome = counts or found.get("summary") or found.get("problem") or found.get("not run", "done")
            lines.append(f"  - {run}: {_cell(outcome)}")
            lines += [f"    - `{_cell(failure)}`" for failure in found.get("failures", [])[:10]]
            lines += [f"    - `{_cell(str(model))}`" for model in found.get("models", [])]
        yield "- " + "\n".join(lines)
    yield from (f"- **{_cell(problem)}**" for problem in document.get("problems", []))
    yield ""


def _tables(document: Document) -> Iterator[str]:
    """Yield a table per precision and kind, with a row per variant and a column per size."""
    found = merged(document)
    for precision, kind in dict.fromkeys((p, k) for p, _, k in found):
        columns = [size for p, size, k in found if (p, k) == (precision, kind)]
        table = {
            size: {n: cell(entry) for n, entry in found[precision, size, kind].items()} for size in columns
        }
        rows = [name for name in TABLE if any(table[c].get(name, "–") != "–" for c in columns)]
        for start in range(0, len(columns), 6):  # limits the width
            part = columns[start : start + 6]
            yield from (f"## {kind.capitalize()}, {precision}, B×K×d", "")
            yield f"| | {' | '.join(part)} |"
            yield "|---|" + "---|" * len(part)
            for name in rows:
                yield f"| {NAMES.get(name, name)} | {' | '.join(table[c].get(name, '–') for c in part)} |"
            yield ""


def cell(found: Found) -> str:
    """Format one variant at one size: `1.08 (0.021 ms; 100; 74 %; 9.8 MiB)`."""
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
    if "host_ms" in found:
        facts.append(f"host {1e3 * found['host_ms']:.0f} µs")
    marks = ("*" if found.get("behind", 0) > 0.1 else "") + ("!" if "inexact" in found else "")
    return f"{ratio}({'; '.join(facts)}){marks}"


def _graphs(document: Document) -> Iterator[str]:
    """Yield the cost of launches: launch time of the CPU, calls in a loop, replays of a CUDA graph."""
    found = merged(document)
    rows = [
        (case, variant, entry)
        for case, variants in cases(document)
        if case.graph
        for variant, entry in variants.items()
        if "loop_ms" in entry
    ]
    if not rows:
        return
    yield from ("## Launches: milliseconds per call, bf16", "")
    yield "| B×K×d | kind | variant | launch time of the CPU | calls in a loop | replays in a loop | replay, cold L2 |"
    yield "|---|---|---|---|---|---|---|"
    for case, variant, replay in rows:
        eager = found.get((case.precision, str(case.size), case.kind), {}).get(variant, {})
        numbers = (eager.get("host_ms"), eager.get("loop_ms"), replay["loop_ms"], replay["ms"]["median"])
        cells = " | ".join("–" if n is None else f"{n:.3g}" for n in numbers)
        yield f"| {case.size} | {case.kind} | {NAMES.get(variant, variant)} | {cells} |"
    yield ""


def _kernels(document: Document) -> Iterator[str]:
    """Yield launches, GPU time and the longest kernels of each profiled variant. kernels.csv lists all kernels."""
    rows = []
    for result in document.get("profiles", []):
        case = Case.from_json(result["case"])
        for variant, found in result["variants"].items():
            for kind in KINDS:
                if kernels := found.get("kernels", {}).get(kind):
                    total, count = (sum(k[key] for k in kernels) for key in ("us", "launches"))
                    first = ", ".join(f"{_cell(k['kernel'])[:48]} {k['us']:.1f}" for k in kernels[:4])
                    rows.append(f"| {case.size} | {kind} | {variant} | {count:.0f} | {total:.0f} | {first} |")
    if rows:
        yield from ("## Kernels (torch.profiler), µs per call", "")
        yield from (
            "| B×K×d | kind | variant | launches | all | longest |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        )


def _left_out(document: Document) -> Iterator[str]:
    """Yield a line per reason for which cases were not measured."""
    reasons: dict[str, list[str]] = {}
    for name, reason in document.get("absent", {}).items():
        reasons.setdefault(f"absent: {reason}", []).append(name)
    for kind, wrong in document.get("out", {}).items():
        for variant, reason in wrong.items():
            reasons.setdefault(f"{variant}, excluded by its smoke check: {reason}", []).append(kind)
    for result in (*document.get("cases", []), *document.get("profiles", [])):
        name = Case.from_json(result["case"]).name
        if "skipped" in result:
            reasons.setdefault(result["skipped"], []).append(name)
        for variant, found in result["variants"].items():
            if why := found.get("failed") or found.get("skipped"):
                reasons.setdefault(f"{variant}: {why}", []).append(name)
            elif "inexact" in found:
                reasons.setdefault(f"{variant}, inexact: {found['inexact']}", []).append(name)
    for skipped in document.get("skipped", []):
        reasons.setdefault(skipped["reason"], []).append(Case.from_json(skipped["case"]).name)
    if reasons:
        yield from ("## Not measured, or inaccurate", "")
        for reason, names in reasons.items():
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            yield f"- {_cell(reason)} ({shown})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
