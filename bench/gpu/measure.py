"""Measures one case: variants checked, warmed up, and then timed in turn with one another."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..problem import Tensors
from . import accuracy, calls, timing
from .plan import Case
from .roofline import WIDTHS, floor_ms, work
from .timing import LONGEST_SPIN, NoCollection, Run, Sample, Timer
from .variants import TABLE

Found = dict[str, Any]
SLOW = 0.05  # seconds of a call


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """tf32 is allowed in the `with` where that is the precision."""
    before = torch.backends.cuda.matmul.fp32_precision
    if name == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def give_up(result: Found, reason: str) -> None:
    """Leave in a result only why there is none."""
    kept = {key: result[key] for key in ("compile_s",) if key in result}
    result.clear()
    result |= kept | {"skipped" if "out of memory" in reason.lower() else "failed": reason}


class Measure:
    """The state of one case."""

    def __init__(
        self,
        case: Case,
        arguments: Tensors,
        timer: Timer,
        ceilings: dict[str, float],
        says: Callable[[str | None], None],
        blame: Callable[[Exception], str],
    ) -> None:
        """Prepare.

        Args:
            case: what to measure.
            arguments: its tensors.
            timer: of the device.
            ceilings: of constants.ceilings; empty where they are not known.
            says: told which variant is about to run.
            blame: an error in a line.
        """
        self.case, self.arguments, self.timer = case, arguments, timer
        self.ceilings, self.says, self.blame = ceilings, says, blame
        self.results: dict[str, Found] = {}
        self.calls: dict[str, Run] = {}
        self.spins: dict[str, float] = {}

    def run(self) -> dict[str, Found]:
        """variant -> what was measured, or `failed` or `skipped` and the reason."""
        if self.case.compiles:
            torch._dynamo.reset()  # a loop over sizes would reach the limit of recompilations
        wanted = accuracy.reference_gradients(self.arguments) if self.case.kind != "forward" else None
        for name in self.case.variants:
            self.says(name)
            self.results[name] = {}
            try:
                self._warm_up(name, wanted)
                self.timer.synchronize()
            except Exception as error:
                self.calls.pop(name, None)
                give_up(self.results[name], self.blame(error))
            self._clear()
        del wanted
        samples = self._rounds()
        for name, rounds in samples.items():
            self.results[name] |= self._summary(name, rounds, samples.get("linear", {}))
            ms = max(self.results[name]["ms"]["median"], self.results[name].get("host_ms", 0.0))
            if ms < 1e3 * SLOW:
                self.results[name]["loop_ms"] = timing.loop_ms(self.timer, self.calls[name], ms)
        self._clear()
        return self.results

    def _clear(self) -> None:
        for argument in self.arguments:
            argument.grad = None

    def _warm_up(self, name: str, wanted: Any) -> None:
        """Compile, check what is computed, read the peak of memory and the CPU's time."""
        case, result = self.case, self.results[name]
        run: Run = calls.make_call(name, case.kind, self.arguments, case.precision)
        begin = time.perf_counter()
        made: Any = run()
        self.timer.synchronize()
        if TABLE[name].compiled:
            result["compile_s"] = time.perf_counter() - begin
        result |= accuracy.check_call(name, case.kind, case.precision, made, self.arguments, wanted)
        del made
        self._clear()
        begin = time.perf_counter()
        result["memory"] = self.timer.peak(run)
        # A call this long needs no measuring to know that the CPU will be ahead.
        slow = time.perf_counter() - begin > SLOW
        self.calls[name] = run = timing.captured(run) if case.graph else run
        if slow:
            self.spins[name] = LONGEST_SPIN
        else:
            result["host_ms"] = self.timer.host_ms(run)
            self.spins[name] = timing.spin_for(result["host_ms"])

    def _rounds(self) -> dict[str, dict[int, Sample]]:
        def failed(name: str, error: Exception) -> None:
            self.says(name)  # whom to blame if the device is lost
            give_up(self.results[name], self.blame(error))

        self.says(None)
        measures: dict[str, Callable[[], Sample]] = {
            name: functools.partial(self.timer.measure, run, self.spins[name])
            for name, run in self.calls.items()
        }
        # A round that does not count: reading one variant's peak gave back the memory that torch kept for the others.
        for name, measure in list(measures.items()):
            try:
                measure()
            except Exception as error:
                failed(name, error)
                del measures[name]
        with NoCollection():
            return timing.interleave(measures, self.case.seconds, failed, limit="linear")

    def _summary(self, name: str, rounds: dict[int, Sample], limit: dict[int, Sample]) -> Found:
        case = self.case
        low, middle, high = timing.quartiles([sample.ms for sample in rounds.values()])
        summary: Found = {"ms": {"q1": low, "median": middle, "q3": high}, "n": len(rounds)}
        summary["behind"] = statistics.fmean(sample.behind for sample in rounds.values())
        if pairs := [sample.ms / limit[n].ms for n, sample in rounds.items() if n in limit]:
            low, ratio, high = timing.quartiles(pairs)
            summary["ratio"] = {"q1": low, "median": ratio, "q3": high, "n": len(pairs)}
        phases = work(name, case.size, case.kind, WIDTHS[case.precision])
        if phases and {"bandwidth", case.precision} <= set(self.ceilings):
            floor = floor_ms(phases, self.ceilings[case.precision], self.ceilings["bandwidth"])
            summary |= {"floor_ms": floor, "roofline": floor / middle}
        return summary
