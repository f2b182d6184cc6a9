"""The check of the model: some measured points set its rates and its link, and the model predicts the others."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..problem import Size
from .model import Case, Link, Rates, collectives, cpu_work, fit, fit_link, memory, optimizer_bytes

#: The sizes that calibrate, on one process the rates and on two the link. The smallest one gives the time per call.
CALIBRATING = (Size(256, 1_000, 128), Size(64, 65_536, 128), Size(1024, 65_536, 128), Size(256, 65_536, 512))


class Found(NamedTuple):
    """The measured values of a case: medians over steps, in seconds and bytes."""

    seconds: float
    work: float  # CPU time of the slowest process
    waiting: float  # for other processes
    communication: float
    optimizer: float
    peak: int
    sent: int


def found(result: dict[str, Any]) -> Found:
    """Return the medians of one case of the document."""
    names = ("seconds", "work", "waiting", "transfer", "optimizer")
    return Found(
        *(statistics.median(result[name] or [0.0]) for name in names), result["peak"], result["sent"]
    )


def case(result: dict[str, Any]) -> Case:
    """Return the case of a result of the document."""
    return Case(Size(**result["size"]), result["ranks"])


class Model(NamedTuple):
    """The model of the measured machine."""

    rates: Rates
    link: Link
    optimizer: float  # bytes per second
    cores: int

    def predict(self, case: Case, others: float = 0.0) -> dict[str, float]:
        """Return the predicted values of `Found`. Processes that share a core take turns.

        Args:
            case: the problem.
            others: cores that other programs keep busy.
        """
        work, optimizer = self.rates.seconds(cpu_work(case)), optimizer_bytes(case) / self.optimizer
        communication = self.link.seconds(collectives(case), case.ranks)
        return {
            "seconds": work * max(1.0, case.ranks / (self.cores - others)) + communication,
            "work": work,
            "communication": communication,
            "optimizer": optimizer,
            "peak": memory(case).total,
        }


def calibrate(results: Iterable[dict[str, Any]], cores: int) -> Model | None:
    """Return the model, or None if a calibrating size has not been measured on one and on two processes."""
    measured = {case(result): found(result) for result in results}
    needed = [Case(size, ranks) for ranks in (1, 2) for size in CALIBRATING]
    if not all(point in measured for point in needed):
        return None
    alone, together = needed[: len(CALIBRATING)], needed[len(CALIBRATING) :]
    rates = fit([(cpu_work(c), measured[c].work) for c in alone], ["calls", "flops", "pairs", "bytes"])
    link = fit_link([(c, measured[c].communication) for c in together])
    optimizer = statistics.median(optimizer_bytes(c) / measured[c].optimizer for c in alone[1:])
    return Model(rates, link, optimizer, cores)


def calibrates(case: Case) -> bool:
    return case.size in CALIBRATING and case.ranks <= 2
