"""Measures cases in a process of its own: a kernel that goes wrong takes the CUDA context with it, and nothing else.

Reads one JSON document from stdin, {"device", "deadline", "compile_seconds", "ceilings", "cases"}, and writes events to
stdout, one JSON document a line: what it is about to do, so that the reader knows whom to blame, and each result.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import gpu_forms, gpu_timing
from .forms import Tensors, tensors
from .gpu_plan import COMPILED, OURS, WIDTHS, Case, floor_ms, work
from .gpu_timing import LONGEST_SPIN, CudaTimer, HostTimer, NoCollection, Run, Sample, Timer

Emit = Callable[[dict[str, Any]], None]
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
SEED = 20211011
SLOW = 0.05  # seconds of a call


class Lost(Exception):
    """The device answers no more in this process."""


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


class Worker:
    """What is kept from case to case."""

    def __init__(self, device: str, emit: Emit, ceilings: dict[str, float], compile_seconds: float) -> None:
        self.device = device
        self.emit = emit
        self.ceilings = ceilings
        self.compile_seconds = compile_seconds  # the longest torch.compile so far
        self.timer: Timer = CudaTimer() if device == "cuda" else HostTimer()
        self._arguments: tuple[object, Tensors] | None = None
        self._reasons: dict[str, str | None] = {}

    def arguments(self, case: Case) -> Tensors:
        """The case's tensors, kept for the next case if that has the same ones."""
        key = (case.precision, case.size)
        if self._arguments is None or self._arguments[0] != key:
            self._arguments = None  # first let go
            self._arguments = key, tensors(case.size, DTYPES[case.precision], self.device, SEED)
        return self._arguments[1]

    def able(self, case: Case) -> tuple[Case, dict[str, str]]:
        """The case with the forms that can be measured here, and why not the others."""
        reasons = {}
        for form in case.forms:
            if form not in self._reasons:
                self._reasons[form] = gpu_forms.why_not(form, self.device)
            if reason := self._reasons[form]:
                reasons[form] = reason
        return case.without(list(reasons)), reasons

    def blame(self, error: Exception) -> str:
        """The error in a line.

        Raises:
            Lost: the device has failed, and all that follows here would too.
        """
        try:
            self.timer.synchronize()
        except Exception as lost:
            raise Lost(_short(error)) from lost
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return _short(error)

    def run(self, case: Case) -> dict[str, Any]:
        """Measure one case: form -> what was measured, or `failed` or `skipped` and the reason."""
        results: dict[str, dict[str, Any]] = {}
        runs: dict[str, Run] = {}
        spins: dict[str, float] = {}
        if any(name in COMPILED for name in case.forms):
            torch._dynamo.reset()  # a loop over sizes would reach the limit of recompilations
        with _precision(case.precision):
            arguments = self.arguments(case)
            wanted = gpu_forms.reference_gradients(arguments) if case.kind == "step" else None
            for name in case.forms:
                self.emit({"event": "form", "form": name})
                result = results[name] = {}
                try:
                    runs[name] = self._warm_up(name, case, arguments, wanted, result)
                    # A call this long needs no measuring to know that the CPU will be ahead.
                    slow = result.pop("call_s") > SLOW
                    spins[name] = LONGEST_SPIN if slow else self.timer.spin_for(runs[name])
                    self.timer.synchronize()
                except Exception as error:
                    runs.pop(name, None)
                    _give_up(result, self.blame(error))
                for argument in arguments:
                    argument.grad = None
            del wanted
            samples = self._rounds(case, runs, spins, results)
            for name, rounds in samples.items():
                results[name] |= self._summary(name, case, rounds, samples.get("linear", {}))
                if (ms := results[name]["ms"]["median"]) < 1e3 * SLOW:
                    results[name]["loop_ms"] = gpu_timing.loop_ms(self.timer, runs[name], ms)
            for argument in arguments:
                argument.grad = None
        return {"case": case.to_json(), "forms": results}

    def _warm_up(self, name: str, case: Case, arguments: Tensors, wanted: Any, result: dict[str, Any]) -> Run:
        """Compile, check what is computed, read the peak of memory; the call to time."""
        run, head = gpu_forms.runner(name, case.kind, arguments)
        begin = time.perf_counter()
        run()
        self.timer.synchronize()
        if name in COMPILED:
            result["compile_s"] = time.perf_counter() - begin
            self.compile_seconds = max(self.compile_seconds, result["compile_s"])
        if head is not None:
            checks = zip(("logits", "gradients"), gpu_forms.TOLERANCE[case.precision], strict=True)
            errors = {}
            if case.kind == "forward":
                errors["logits"] = gpu_forms.logits_error(head, arguments)
            elif wanted is not None:
                errors["gradients"] = gpu_forms.gradients_error(arguments, wanted)
            result["error"] = {k: v if math.isfinite(v) else str(v) for k, v in errors.items()}
            # `not <=`, so that NaN is wrong too.
            wrong = [f"{k}: {errors[k]:.1e}" for k, most in checks if k in errors and not errors[k] <= most]
            if wrong:
                result["inexact"] = ", ".join(wrong)
        for argument in arguments:
            argument.grad = None
        begin = time.perf_counter()
        result["memory"] = self.timer.peak(run)
        result["call_s"] = time.perf_counter() - begin
        return gpu_timing.captured(run) if case.graph else run

    def _rounds(
        self, case: Case, runs: dict[str, Run], spins: dict[str, float], results: dict[str, dict[str, Any]]
    ) -> dict[str, dict[int, Sample]]:
        def failed(name: str, error: Exception) -> None:
            self.emit({"event": "form", "form": name})  # whom to blame if the device is lost
            _give_up(results[name], self.blame(error))

        self.emit({"event": "form", "form": None})
        measures: dict[str, Callable[[], Sample]] = {
            name: functools.partial(self.timer.measure, run, spins[name]) for name, run in runs.items()
        }
        # A round that does not count: reading one form's peak gave back the memory that torch kept for the others.
        for name, measure in list(measures.items()):
            try:
                measure()
            except Exception as error:
                failed(name, error)
                del measures[name]
        with NoCollection():
            return gpu_timing.interleave(measures, case.seconds, failed, limit="linear")

    def _summary(
        self, name: str, case: Case, rounds: dict[int, Sample], limit: dict[int, Sample]
    ) -> dict[str, Any]:
        low, middle, high = gpu_timing.quartiles([sample.ms for sample in rounds.values()])
        summary: dict[str, Any] = {"ms": {"q1": low, "median": middle, "q3": high}, "n": len(rounds)}
        summary["behind"] = statistics.fmean(sample.behind for sample in rounds.values())
        if pairs := [sample.ms / limit[n].ms for n, sample in rounds.items() if n in limit]:
            low, ratio, high = gpu_timing.quartiles(pairs)
            summary["ratio"] = {"q1": low, "median": ratio, "q3": high, "n": len(pairs)}
        phases = work(name, case.size, case.kind, WIDTHS[case.precision])
        if phases and self.ceilings:
            floor = floor_ms(phases, self.ceilings[case.precision], self.ceilings["bandwidth"])
            summary |= {"floor_ms": floor, "roofline": floor / middle}
            summary |= {"flops": sum(p.flops for p in phases), "bytes": sum(p.bytes for p in phases)}
        return summary


def _give_up(result: dict[str, Any], reason: str) -> None:
    kept = {key: result[key] for key in ("compile_s",) if key in result}
    result.clear()
    result |= kept | {"skipped" if "out of memory" in reason.lower() else "failed": reason}


@contextlib.contextmanager
def _precision(name: str) -> Any:
    before = torch.backends.cuda.matmul.fp32_precision
    if name == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def fitted(case: Case, left: float, compile_seconds: float) -> tuple[Case | None, str]:
    """The case as it fits the seconds left: whole, or without the compiled forms, or not at all (None); and why."""
    needed = case.estimate(compile_seconds)
    if needed <= left:
        return case, ""
    why = f"takes about {needed:.0f} s, and {max(left, 0):.0f} s of the budget were left"
    lean = case.without(COMPILED)
    if lean != case and any(form in OURS for form in lean.forms) and "direct" in lean.forms:
        needed = lean.estimate(compile_seconds)
        if needed <= left:
            return lean, f"with what torch.compile takes, the case {why}"
    return None, f"it {why}"


def work_through(
    worker: Worker, cases: list[tuple[int, Case]], deadline: float, clock: Callable[[], float] = time.time
) -> None:
    """Measure the cases in order, as far as the time goes."""
    for number, case in cases:
        able, reasons = worker.able(case)
        chosen, why = fitted(able, deadline - clock(), worker.compile_seconds)
        if chosen is None:
            worker.emit({"event": "skipped", "number": number, "case": case.to_json(), "reason": why})
            continue
        worker.emit({"event": "begin", "number": number})
        begin = clock()
        try:
            result = worker.run(chosen)
        except Lost:
            raise
        except Exception as error:  # as where the arguments themselves do not fit the memory
            result = {"case": case.to_json(), "forms": {}, "skipped": worker.blame(error)}
        for form in case.forms:
            if form not in chosen.forms:
                result["forms"][form] = {"skipped": reasons.get(form, why)}
        worker.emit({"event": "case", "number": number, "seconds": clock() - begin, "result": result})


def main() -> int:
    """Read the document, measure, and say so."""
    # What others print must not come between the events.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def emit(event: dict[str, Any]) -> None:
            print(json.dumps(event), file=out, flush=True)

        asked = json.load(sys.stdin)
        warnings.simplefilter("ignore")
        device = asked["device"]
        worker = Worker(device, emit, asked["ceilings"] or {}, asked["compile_seconds"])
        if not worker.ceilings:
            small = {} if device == "cuda" else {"side": 256, "copied": 1 << 22}
            worker.ceilings = gpu_timing.ceilings(worker.timer, device, **small)
            emit({"event": "ceilings", "ceilings": worker.ceilings})
        cases = [(number, Case.from_json(case)) for number, case in asked["cases"]]
        try:
            work_through(worker, cases, asked["deadline"])
        except Lost as lost:
            emit({"event": "lost", "reason": str(lost)})
            return 1
        emit({"event": "done", "compile_seconds": worker.compile_seconds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
