"""Smoke checks and warm-ups in several concurrent workers, which share Triton's cache on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from .plan import Case
from .smoke_checks import objection
from .supervisor import Supervisor
from .variants import TABLE

Result = dict[str, Any]


def split_variants(variants: Sequence[str], processes: int) -> list[list[str]]:
    """Distribute the variants round-robin, so that each process gets some of the slow ones."""
    shares = [list(variants[n::processes]) for n in range(processes)]
    return [share for share in shares if share]


class WorkerPool:
    """Runs the same cases in several workers, each with a share of the variants."""

    def __init__(
        self,
        cases: Sequence[Case],
        variants: Sequence[str],
        processes: int,
        deadline: float,
        device: str,
        changed: Callable[[], None],
    ) -> None:
        """Prepare.

        Args:
            cases: cases of kind "smoke" or "warm".
            variants: names of the variants.
            processes: maximal number of workers.
            deadline: end of the time, in seconds of `time.time`.
            device: "cuda" or "cpu".
            changed: called after each result.
        """
        self.supervisors = []
        for share in split_variants(variants, max(1, processes)):
            mine = [
                case.without([variant for variant in case.variants if variant not in share]) for case in cases
            ]
            mine = [case for case in mine if case.variants]
            self.supervisors.append(Supervisor(mine, deadline, changed, device))

    def start(self) -> list[threading.Thread]:
        """Start the workers. The returned threads end when all cases are done or the time is up."""
        threads = [threading.Thread(target=bench.run, daemon=True) for bench in self.supervisors]
        for thread in threads:
            thread.start()
        return threads

    @property
    def results(self) -> list[Result]:
        """The results so far."""
        return [result for bench in self.supervisors for result in bench.results]

    @property
    def problems(self) -> list[str]:
        """The crashes and hangs so far."""
        return [problem for bench in self.supervisors for problem in bench.problems]


def wrong_variants(results: Sequence[Result]) -> dict[str, dict[str, str]]:
    """Return `<precision> <kind>` -> variant -> the first objection."""
    found: dict[str, dict[str, str]] = {}
    for result in results:
        case = Case.from_json(result["case"])
        if case.kind != "smoke":
            continue
        for name, kinds in result["variants"].items():
            if "skipped" in kinds and "out of memory" not in kinds["skipped"].lower():
                continue  # not available
            whole = kinds.get("failed") or kinds.get("skipped")
            for kind in TABLE[name].kinds:
                if why := whole or objection(kinds.get(kind, {})):
                    found.setdefault(f"{case.precision} {kind}", {}).setdefault(name, f"{case.size}: {why}")
    return found


def absent_variants(results: Sequence[Result]) -> dict[str, str]:
    """Return variant -> the reason why it is not available."""
    found = {}
    for result in results:
        for name, kinds in result["variants"].items():
            if "skipped" in kinds and "out of memory" not in kinds["skipped"].lower():
                found[name] = kinds["skipped"]
    return found
