"""Smoke runs and the compiling of Triton's kernels in several processes at once: Triton's cache on disk is common to all."""

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
    """The variants dealt out: one after another, so that each gets some of the slow ones."""
    dealt = [list(variants[n::processes]) for n in range(processes)]
    return [share for share in dealt if share]


class WorkerPool:
    """Runs the same cases over all variants, each process with its share of the variants."""

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
            cases: of kind "smoke" or "warm".
            variants: that this pool runs.
            processes: at most.
            deadline: in seconds of time.time.
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
        """Begin; the threads end when all is done or the time is up."""
        threads = [threading.Thread(target=bench.run, daemon=True) for bench in self.supervisors]
        for thread in threads:
            thread.start()
        return threads

    @property
    def results(self) -> list[Result]:
        """The findings so far."""
        return [result for bench in self.supervisors for result in bench.results]

    @property
    def problems(self) -> list[str]:
        """The faults so far: crashes, hangs."""
        return [problem for bench in self.supervisors for problem in bench.problems]


def wrong_variants(results: Sequence[Result]) -> dict[str, dict[str, str]]:
    """`<precision> <kind>` -> variant -> what is wrong with it, first found."""
    found: dict[str, dict[str, str]] = {}
    for result in results:
        case = Case.from_json(result["case"])
        if case.kind != "smoke":
            continue
        for name, kinds in result["variants"].items():
            if "skipped" in kinds and "out of memory" not in kinds["skipped"].lower():
                continue  # it is not there
            whole = kinds.get("failed") or kinds.get("skipped")
            for kind in TABLE[name].kinds:
                if why := whole or objection(kinds.get(kind, {})):
                    found.setdefault(f"{case.precision} {kind}", {}).setdefault(name, f"{case.size}: {why}")
    return found


def absent_variants(results: Sequence[Result]) -> dict[str, str]:
    """Variant -> why it is not there."""
    found = {}
    for result in results:
        for name, kinds in result["variants"].items():
            if "skipped" in kinds and "out of memory" not in kinds["skipped"].lower():
                found[name] = kinds["skipped"]
    return found
