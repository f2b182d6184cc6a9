"""Predict the time and memory of a sharded head on GPUs: `python -m bench.sharded.gpus`.

The rates are those of measured steps on one H200 (bench/results); no sharded step has run on GPUs yet. The page has the fit beside
the measured times, then the predictions, then a table of memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..problem import Size, parse_sizes
from .cli import numbers
from .model import (
    Case,
    Collective,
    Link,
    Rates,
    Scores,
    Work,
    collectives,
    fit,
    gpu_work,
    memory,
    optimizer_bytes,
    scores_on_gpu,
    sent,
)

RESULTS = Path(__file__).resolve().parent.parent / "results"
COPY = 4.289e12  # bytes per second of a copy on the H200, in nvidia-h200-2026-11-27.json
#: File, size, variant and place of the scores of measured steps of the loss in bfloat16. The fit takes the first four, the steps that
#: gistops chooses today; the others check it.
MEASURED: tuple[tuple[str, Size, str, Scores | None], ...] = (
    ("nvidia-h200-2026-11-27.json", Size(256, 8_142, 2048), "cuda", None),
    ("nvidia-h200-2026-11-27-100000-classes.json", Size(256, 100_000, 512), "cuda", None),
    ("nvidia-h200-2026-11-27-second.json", Size(1024, 8_142, 2048), "cuda dW tiled", None),
    ("nvidia-h200-2026-11-27-second.json", Size(128, 1_000, 512), "cuda loss kept", None),
    ("nvidia-h200-2026-11-27.json", Size(256, 8_142, 2048), "cuda loss recomputed", "recomputed"),
    ("nvidia-h200-2026-11-27-second.json", Size(256, 100_000, 512), "cuda loss kept", "kept"),
)
FITTED = 4
SIZES = tuple(Size(rows, K, 512) for K in (1_000_000, 10_000_000) for rows in (256, 1024, 4096))


class NamedLink(NamedTuple):
    """A link between GPUs, in one direction per GPU."""

    name: str
    link: Link

    @classmethod
    def parse(cls, text: str) -> NamedLink:
        """Parse `NVLink:450:2`: a name, GB/s, and microseconds per message."""
        try:
            name, bandwidth, latency = text.split(":")
            return cls(
                f"{name}, {bandwidth} GB/s, {latency} µs", Link(float(latency) * 1e-6, float(bandwidth) * 1e9)
            )
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected NAME:GB/s:µs, such as NVLink:450:2, got {text!r}"
            ) from None


#: The bandwidths are the makers' figures. The latencies are assumptions.
LINKS = [NamedLink.parse(text) for text in ("NVLink:450:2", "InfiniBand:50:5", "Ethernet:12.5:30")]


def seconds(file: str, size: Size, variant: str) -> float:
    """Return the median time of a measured step of the loss in bfloat16."""
    document: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    for found in document["cases"]:
        case = found["case"]
        if (case["precision"], case["kind"], Size(**case["size"])) == ("bf16", "loss", size):
            return float(found["variants"][variant]["ms"]["median"]) / 1e3
    raise ValueError(f"{file}: expected a step of the loss in bf16 at {size}, found none")


def points() -> list[tuple[Work, float]]:
    """Return the work and the seconds of the measured steps."""
    return [
        (gpu_work(Case(size, 1, on_gpu=True), scores), seconds(file, size, variant))
        for file, size, variant, scores in MEASURED
    ]


def conversion(case: Case) -> Work:
    """Return the work of autocast: the centers to half precision, and their gradient back."""
    return Work(0, 0, 0, 2 * (4 + 2) * case.classes * case.size.d)


def render(sizes: Sequence[Size], gpus: Sequence[int], links: Sequence[NamedLink]) -> str:
    """Format the page."""
    rates = fit(points()[:FITTED], ["calls", "flops", "bytes"])
    cases = [Case(size, ranks, on_gpu=True) for ranks in gpus for size in sizes]
    lines = [
        "# A sharded head on GPUs: predictions",
        "",
        *_fit(rates),
        "",
        *_predictions(rates, cases, links),
        "",
    ]
    return "\n".join([*lines, *_memory(gpus)]) + "\n"


def _fit(rates: Rates) -> Iterator[str]:
    yield (
        f"Rates of one H200 in bfloat16, fitted to the first {FITTED} measured steps: {1e6 * rates.calls:.0f} µs per step, "
        f"{1e-12 / rates.flops:,.0f} TFLOP/s of products, {1e-12 / rates.bytes:.2f} TB/s."
    )
    yield from ("", "| B×K×d | variant | measured, µs | model, µs | error |", "|---|---|---|---|---|")
    for (_, size, variant, _), (work, actual) in zip(MEASURED, points(), strict=True):
        fitted = rates.seconds(work)
        yield f"| {size} | {variant} | {1e6 * actual:,.0f} | {1e6 * fitted:,.0f} | {fitted / actual - 1:+.0%} |"


def _predictions(rates: Rates, cases: Sequence[Case], links: Sequence[NamedLink]) -> Iterator[str]:
    yield (
        "Predicted milliseconds of a step in bfloat16 with float32 parameters, m = 4. B counts the rows of all GPUs. *Work* is that of "
        "one GPU, *autocast* the conversion of the centers and of their gradient, *SGD* the optimizer with momentum at the bandwidth of a "
        "copy. The last columns are the collectives by the ring algorithm over a link, in one direction per GPU. The exchange of sizes "
        "between the hosts is left out: it overlaps with the GPUs' work of the step before. *DDP* counts what a process would send to "
        "all-reduce the gradient of a head that every GPU holds whole."
    )
    yield ""
    names = " | ".join(x.name for x in links)
    yield f"| K | d | GPUs | B | scores | work | autocast | SGD | sent, MiB | DDP, MiB | {names} |"
    yield "|---|" + "---|" * (9 + len(links))
    for case in cases:
        size, on_gpus = case.size, collectives(case)[1:]
        parts = (rates.seconds(gpu_work(case)), conversion(case).bytes / COPY, optimizer_bytes(case) / COPY)
        times = [
            f"{1e3 * part:.2f}" for part in (*parts, *(x.link.seconds(on_gpus, case.ranks) for x in links))
        ]
        whole = Collective("all_reduce", size.K * size.d * 4, 2).sent(case.ranks)
        amounts = (f"{sent(case) / 2**20:.1f}", f"{whole / 2**20:,.0f}")
        cells = (f"{size.K:,}", size.d, case.ranks, size.B, scores_on_gpu(case), *times[:3], *amounts)
        yield "| " + " | ".join(map(str, (*cells, *times[3:]))) + " |"


def _memory(gpus: Sequence[int]) -> Iterator[str]:
    ranks = list(dict.fromkeys((1, 2, *gpus)))
    yield (
        "GB (10⁹ bytes) per GPU of one set of centers in float32, its gradient and the optimizer's state: SGD with momentum / AdamW. "
        "Parameters, gradient, momentum and each of AdamW's two states take as much as the first figure over the number of GPUs. "
        "Autocast adds as much again: copies of the centers and of their gradient in half precision. `GistClassifier` has two sets of "
        "centers while it trains. A GPU also holds up to 2 GiB of scores, and the joint batch of features twice."
    )
    yield ""
    yield "| K | d | centers | " + " | ".join("1 GPU" if n == 1 else f"{n} GPUs" for n in ranks) + " |"
    yield "|---|---|---|" + "---|" * len(ranks)
    for classes in (100_000, 1_000_000, 10_000_000, 100_000_000):
        for dims in (512, 2048):
            cells = []
            for n in ranks:
                case = Case(Size(0, classes, dims), n)
                cells.append(f"{_gb(memory(case).total)} / {_gb(memory(case, states=2).total)}")
            whole = memory(Case(Size(0, classes, dims), 1)).parameters
            yield f"| {classes:,} | {dims} | {_gb(whole)} | {' | '.join(cells)} |"


def _gb(count: float) -> str:
    """Format bytes as GB with three digits, or fewer below 0.1."""
    value = count / 1e9
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharded.gpus", description=__doc__)
    add = parser.add_argument
    add(
        "--sizes",
        type=parse_sizes,
        default=SIZES,
        help="BxKxd, separated by commas; B counts the rows of all GPUs",
    )
    add("--gpus", type=numbers, default=(8,), help="numbers of GPUs, separated by commas; default: 8")
    add("--links", type=NamedLink.parse, nargs="+", default=LINKS, help="NAME:GB/s:µs, such as NVLink:450:2")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    print(render(options.sizes, options.gpus, options.links), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
