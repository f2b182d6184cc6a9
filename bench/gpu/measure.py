"""The measurement of one case: its variants are checked, warmed up and then timed in alternating rounds."""

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
SLOW = 0.05  # seconds per call


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Allow tf32 in the `with` if it is the precision."""
    before = torch.backends.cuda.matmul.fp32_precision
    if name == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def give_up(result: Found, reason: str) -> None:
    """Replace a result by the reason why there is none."""
    kept = {key: result[key] for key in ("compile_s",) if key in result}
    result.clear()
    result |= kept | {"skipped" if "out of memory" in reason.lower() else "failed": reason}


class Measure:
    """The measurement of one case."""

    def __init__(
        self,
        case: Case,
        arguments: Tensors,
        timer: Timer,
        ceilings: dict[str, float],
        announce: Callable[[str | None], None],
        blame: Callable[[Exception], str],
    ) -> None:
        """Prepare.

        Args:
            case: the case.
            arguments: its tensors.
            timer: timer of the device.
            ceilings: result of device_constants.roofline_ceilings; empty if not measured.
            announce: called with the name of the variant that is about to run.
            blame: formats an error.
        """
        self.case, self.arguments, self.timer = case, arguments, timer
        self.ceilings, self.announce, self.blame = ceilings, announce, blame
        self.results: dict[str, Found] = {}
        self.calls: dict[str, Run] = {}
        self.spins: dict[str, float] = {}

    def run(self) -> dict[str, Found]:
        """Return the measurements per variant, or `failed` or `skipped` with the reason."""
        if self.case.compiles:
            torch._dynamo.reset()  # avoids the limit of recompilations
        wanted = accuracy.reference_gradients(self.arguments) if self.case.kind in ("step", "loss") else None
        for name in self.case.variants:
            self.announce(name)
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
        """Compile, check the result, measure the peak memory and the CPU's launch time."""
        case, result = self.case, self.results[name]
        run: Run = calls.make_call(name, case.kind, self.arguments, case.precision)
        begin = time.perf_counter()
        output: Any = run()
        self.timer.synchronize()
        if TABLE[name].compiled:
            result["compile_s"] = time.perf_counter() - begin
        result |= accuracy.check_call(name, case.kind, case.precision, output, self.arguments, wanted)
        del output
        self._clear()
        begin = time.perf_counter()
        result["memory"] = self.timer.peak(run)
        # In a call this long the CPU stays ahead of the GPU.
        slow = time.perf_counter() - begin > SLOW
        self.calls[name] = run = timing.captured(run) if case.graph else run
        if slow:
            self.spins[name] = LONGEST_SPIN
        else:
            result["host_ms"] = self.timer.host_ms(run)
            self.spins[name] = timing.spin_for(result["host_ms"])

    def _rounds(self) -> dict[str, dict[int, Sample]]:
        def failed(name: str, error: Exception) -> None:
            self.announce(name)  # names the variant if the device is lost
            give_up(self.results[name], self.blame(error))

        self.announce(None)
        measures: dict[str, Callable[[], Sample]] = {
            name: functools.partial(self.timer.measure, run, self.spins[name])
            for name, run in self.calls.items()
        }
        # An unmeasured round: measuring a variant's peak emptied the allocator's cache of the other variants.
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
