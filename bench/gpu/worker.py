"""The process that runs cases: a kernel that crashes takes down the CUDA context of this process alone.

It reads one JSON document from stdin, {"device", "deadline", "deadlines", "constants", "cases"}. It writes one JSON event per
line to stdout: each variant that it is about to run, so that the supervisor can attribute a crash, and each result.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..problem import Tensors, make_tensors
from . import calls, device_constants, smoke_checks, torch_profiler, variants
from .measure import Measure, give_up, precision
from .plan import Case, supports
from .timing import CudaTimer, HostTimer, Timer
from .variants import KINDS, TABLE

Emit = Callable[[dict[str, Any]], None]
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}

COMPILE_PATIENCE = 90.0  # seconds; the longest torch.compile takes less
FIRST_CALL_PATIENCE = 40.0  # seconds of a first call, for which Triton compiles kernels


class DeviceLost(Exception):
    """The device does not respond to this process any more."""


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


class Worker:
    """Runs cases, and keeps the timer, the tensors and the constants between them."""

    def __init__(self, device: str, emit: Emit, known: dict[str, Any]) -> None:
        self.device = device
        self.emit = emit
        self.constants = known
        self._timer: Timer | None = None
        self._arguments: tuple[object, Tensors] | None = None
        self._reasons: dict[str, str | None] = {}

    @property
    def timer(self) -> Timer:
        """The timer, created on first use because it allocates memory."""
        if self._timer is None:
            self._timer = CudaTimer() if self.device == "cuda" else HostTimer()
        return self._timer

    def arguments(self, case: Case) -> Tensors:
        """Return the tensors of a case. They are kept for the next case of the same size and precision."""
        key = (case.precision, case.size)
        if self._arguments is None or self._arguments[0] != key:
            self._arguments = None  # frees their memory first
            arguments = make_tensors(case.size, DTYPES[case.precision], self.device, smoke_checks.SEED)
            self._arguments = key, arguments
        return self._arguments[1]

    def available(self, case: Case) -> tuple[Case, dict[str, str]]:
        """Return the case with the variants that can run here, and the reasons for the other variants."""
        reasons = {}
        for variant in case.variants if case.kind != "constants" else ():
            if variant not in self._reasons:
                self._reasons[variant] = variants.why_not(variant, self.device)
            if reason := self._reasons[variant]:
                reasons[variant] = reason
        return case.without(list(reasons)), reasons

    def blame(self, error: Exception) -> str:
        """Format an error.

        Raises:
            DeviceLost: the device has failed, so that every later call in this process would fail.
        """
        if self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as lost:
                raise DeviceLost(_short(error)) from lost
            torch.cuda.empty_cache()
        return _short(error)

    def announce(self, variant: str | None, patience: float | None = None) -> None:
        """Announce the variant that runs next, and how long it may be silent if that is longer than usual."""
        self.emit({"event": "variant", "variant": variant, "patience": patience})

    def run(self, case: Case) -> dict[str, Any]:
        """Run a case and return the results per variant, or `failed` or `skipped` with the reason."""
        with precision(case.precision):
            if case.kind in KINDS:
                timed = Measure(
                    case,
                    self.arguments(case),
                    self.timer,
                    device_constants.roofline_ceilings(self.constants),
                    lambda variant: self.announce(
                        variant, COMPILE_PATIENCE if variant and TABLE[variant].compiled else None
                    ),
                    self.blame,
                )
                found = timed.run()
            else:
                found = self._each(case)
        return {"case": case.to_json(), "variants": found}

    def _each(self, case: Case) -> dict[str, Any]:
        """Run the variants one after another, for the kinds that are not timed in rounds."""
        results: dict[str, dict[str, Any]] = {}
        do = {
            "smoke": self._smoke,
            "warm": self._warm,
            "profile": self._profile,
            "constants": self._constant,
        }[case.kind]
        for name in case.variants:
            self._before(name, case)
            results[name] = {}
            try:
                results[name] |= do(name, case)
                if self.device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                give_up(results[name], self.blame(error))
        return results

    def _smoke(self, name: str, case: Case) -> dict[str, Any]:
        arguments = self.arguments(case)
        oracle = smoke_checks.Oracle(arguments, TABLE[name].cosine, TABLE[name].vectors)
        before = functools.partial(self._before, name, case)
        return smoke_checks.run_smoke_check(name, case.precision, arguments, oracle, self.device, before)

    def _before(self, name: str, case: Case) -> None:
        first = case.kind in ("smoke", "warm") and TABLE[name].backend == "triton"
        self.announce(name, FIRST_CALL_PATIENCE if first else None)

    def _warm(self, name: str, case: Case) -> dict[str, Any]:
        begin = time.perf_counter()
        for kind in TABLE[name].kinds:
            if supports(TABLE[name], case.precision, kind):
                self._before(name, case)
                calls.make_call(name, kind, self.arguments(case), case.precision)()
        return {"seconds": time.perf_counter() - begin}

    def _profile(self, name: str, case: Case) -> dict[str, Any]:
        return {
            "kernels": torch_profiler.profile_kernels(name, case.precision, self.arguments(case), self.device)
        }

    def _constant(self, name: str, case: Case) -> dict[str, Any]:
        found = self.constants[name] = device_constants.DeviceConstants(self.timer, self.device).measure(name)
        return dict(found)


def work_through(
    worker: Worker,
    cases: list[tuple[int, Case]],
    deadline: Callable[[Case], float],
    clock: Callable[[], float] = time.time,
) -> None:
    """Run the cases in order until the time is up."""
    for number, case in cases:
        worker.emit({"event": "begin", "number": number})
        chosen, reasons = worker.available(case)
        left = deadline(chosen) - clock()
        if (needed := chosen.estimate()) > left:
            why = f"it takes about {needed:.0f} s; {max(left, 0):.0f} s of the budget were left"
            worker.emit({"event": "skipped", "number": number, "case": case.to_json(), "reason": why})
            continue
        begin = clock()
        try:
            result = worker.run(chosen)
        except DeviceLost:
            raise
        except Exception as error:  # for example, the arguments do not fit the memory
            result = {"case": case.to_json(), "variants": {}, "skipped": worker.blame(error)}
        for variant, reason in reasons.items():
            result["variants"][variant] = {"skipped": reason}
        worker.emit({"event": "case", "number": number, "seconds": clock() - begin, "result": result})


def main() -> int:
    """Read the document, run its cases and write the events."""
    # stdout carries events alone: other output goes to stderr.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def emit(event: dict[str, Any]) -> None:
            print(json.dumps(event), file=out, flush=True)

        asked = json.load(sys.stdin)
        warnings.simplefilter("ignore")
        worker = Worker(asked["device"], emit, asked["constants"])
        cases = [(number, Case.from_json(case)) for number, case in asked["cases"]]
        try:
            work_through(worker, cases, lambda case: asked["deadlines"].get(case.kind, asked["deadline"]))
        except DeviceLost as lost:
            emit({"event": "lost", "reason": str(lost)})
            return 1
        emit({"event": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
