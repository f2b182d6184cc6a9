"""The results of `python -m bench.sharded` as a page; `python -m bench.sharded.report result.json` prints it again."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .calibration import Model, calibrate, calibrates, case, found
from .model import sent

LEGEND = (
    "float32, one thread per process, gloo over the loopback device, a `ConstellationClassifier` with m = 4 displacements. B counts "
    "the rows of the joint batch, which the processes divide. A *step* is the forward and backward of `head.loss`: the time of the "
    "slowest process, the median over n steps, with quartiles. *Work* is the CPU time of the slowest process in these steps: it leaves "
    "out the time in which a process waits for collectives or for a core. *Per class* is the work over the classes of a process. "
    "*Waiting* and *transfer* are from as many further steps, in which all processes wait for each other before each collective: "
    "the time until the last one comes, and the time from then on; means over the processes, medians over steps. *SGD* is the CPU time "
    "of the optimizer's step, with momentum. *Peak* is the growth of resident memory over that of a process that has taken a small "
    "step: with the first loss alone, and with momentum. *Sent* counts the bytes of the TCP connections of a process in a step, in "
    "parentheses those of the model."
)


#: The fields of `Found` that the model predicts, in the order of the table.
PREDICTED = {
    "work": "work",
    "communication": "transfer",
    "seconds": "step",
    "optimizer": "SGD",
    "peak": "peak",
}


def render(document: dict[str, Any]) -> str:
    """Format the page."""
    lines = ["# A head sharded over processes", ""]
    lines += [f"- {name}: {value}" for name, value in document["header"].items()]
    results = sorted(
        document["cases"], key=lambda r: (r["size"]["d"], r["size"]["B"], r["size"]["K"], r["ranks"])
    )
    lines += [*_load(results), "", LEGEND, "", *_measured(results), "", *_flatness(results), ""]
    model = calibrate(results, document["cores"])
    lines += ["## The model", "", *(_no_model() if model is None else _checked(results, model))]
    return "\n".join(lines).rstrip() + "\n"


def _load(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    others = [share for result in results for share in result["others"]]
    if others:
        yield (
            f"- other programs: {statistics.median(others):.2f} cores in the median of the {len(others)} runs, "
            f"{max(others):.2f} at most"
        )


def _measured(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        "| B×K×d | processes | step, ms (quartiles; n) | work, ms | per class, ns | waiting, ms | transfer, ms | SGD, ms | "
        "peak, MiB: loss; with momentum | sent, KiB (model) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for result in results:
        point, values = case(result), found(result)
        times = sorted(result["seconds"])
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        parts = [
            f"{1e3 * x:,.1f}" if point.ranks > 1 else "–" for x in (values.waiting, values.communication)
        ]
        cells = [
            str(point.size),
            str(point.ranks),
            f"{1e3 * values.seconds:,.1f} ({1e3 * low:,.1f}–{1e3 * high:,.1f}; {len(times)})",
            f"{1e3 * values.work:,.1f}",
            f"{1e9 * values.work / point.classes:,.0f}",
            *parts,
            f"{1e3 * values.optimizer:,.1f}",
            f"{result['peak of loss'] / 2**20:,.0f}; {values.peak / 2**20:,.0f}",
            f"{values.sent / 1024:,.0f} ({sent(point) / 1024:,.0f})",
        ]
        yield f"| {' | '.join(cells)} |"


def _flatness(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the spread of the cost per class over sizes that differ in K alone, from 8,142 to a million."""
    groups: dict[tuple[int, int, int], dict[int, tuple[float, float]]] = {}
    for result in results:
        point, values = case(result), found(result)
        if 8_142 <= point.size.K <= 1_000_000:
            costs = values.work / point.classes, values.seconds / point.classes
            groups.setdefault((point.size.B, point.size.d, point.ranks), {})[point.size.K] = costs
    for (rows, dims, ranks), by_size in groups.items():
        if len(by_size) < 3:
            continue
        work, seconds = (max(costs) / min(costs) - 1 for costs in zip(*by_size.values(), strict=True))
        yield (
            f"- B = {rows}, d = {dims}, {_processes(ranks)}, {min(by_size):,} to {max(by_size):,} classes: the largest work per class is "
            f"{work:.1%} above the smallest, the largest time of a step per class {seconds:.1%}"
        )


def _processes(ranks: int) -> str:
    return "1 process" if ranks == 1 else f"{ranks} processes"


def _no_model() -> Iterator[str]:
    yield "Not calibrated: the sizes of `CALIBRATING` in `bench/sharded/calibration.py` have not been measured on 1 and 2 processes."


def _checked(results: Sequence[dict[str, Any]], model: Model) -> Iterator[str]:
    """Yield the rates of the model, and its predictions beside the measured values."""
    rates, link = model.rates, model.link
    rate = f"{1e-9 / rates.flops:,.0f} GFLOP/s" if rates.flops else "free"
    bandwidth = f"{1e-9 / rates.bytes:,.1f} GB/s" if rates.bytes else "unlimited"
    yield (
        f"`bench/sharded/model.py`. Calibrated on the points marked *: one process gives the rates ({1e3 * rates.calls:.1f} ms per step, {rate} of products, "
        f"{1e9 * rates.pairs:.2f} ns per pair of row and class, {bandwidth} for centers), two processes give the link "
        f"({1e6 * link.latency:,.0f} µs per message, {1e-9 * link.bandwidth:,.2f} GB/s), one process gives {1e-9 * model.optimizer:,.1f} GB/s of "
        f"the optimizer. A step is predicted as work and transfer, where processes take turns beyond the {model.cores} cores, less those "
        "that other programs kept busy in its runs. Cells: predicted / measured (error)."
    )
    yield from (
        "",
        "| B×K×d | processes | work, ms | transfer, ms | step, ms | SGD, ms | peak with momentum, MiB |",
        "|---|---|---|---|---|---|---|",
    )
    errors: dict[str, list[float]] = {}
    for result in results:
        point, values = case(result), found(result)
        predicted = model.predict(point, statistics.median(result["others"]))
        cells = []
        for name in PREDICTED:
            unit = 2**-20 if name == "peak" else 1e3
            measured = getattr(values, name)
            if not measured:
                cells.append("–")
                continue
            error = predicted[name] / measured - 1
            cells.append(f"{unit * predicted[name]:,.1f} / {unit * measured:,.1f} ({error:+.0%})")
            if not calibrates(point):
                errors.setdefault(name, []).append(abs(error))
        star = "*" if calibrates(point) else ""
        yield f"| {point.size}{star} | {point.ranks} | {' | '.join(cells)} |"
    yield ""
    yield (
        "Errors of the points that did not calibrate: "
        + "; ".join(
            f"{PREDICTED[name]} {statistics.median(found):.0%} in the median, {max(found):.0%} at most"
            for name, found in errors.items()
        )
        + "."
    )


if __name__ == "__main__":
    print(render(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
