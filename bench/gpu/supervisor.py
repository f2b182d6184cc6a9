"""Drives bench/gpu/worker.py: starts it anew where a variant has taken its process down, and goes on without that variant."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from .plan import Case
from .subprocesses import ROOT, die_with_parent

SILENCE = 25.0  # seconds without an event after which a kernel hangs
STARTING = 90.0  # the same while the process starts, or makes the tensors of a case
GRACE = 8.0  # seconds beyond the deadline, for a case that was begun in time
STARTS = 8  # of the worker at most
CRASHES = 2  # of a variant, after which it is left out of all other cases


def read_events(
    lines: IO[str], until: float, silence: Callable[[], float], clock: Callable[[], float] = time.time
) -> Iterator[dict[str, Any]]:
    """The events as they come.

    Args:
        lines: of the worker.
        until: when the time is up.
        silence: seconds that may pass before the next event.
        clock: seconds.

    Raises:
        TimeoutError: none came for that long, or it is past `until`.
    """
    waiting: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            waiting.put(line)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        left = until - clock()
        if left <= 0:
            raise TimeoutError("the time was up")
        patience = silence()
        try:
            line = waiting.get(timeout=min(patience, left))
        except queue.Empty:
            late = left <= patience
            raise TimeoutError("the time was up" if late else f"it hung for {patience:.0f} s") from None
        if line is None:
            return
        yield json.loads(line)


class Supervisor:
    """The state of the measurements: what is done, what crashed, what is left."""

    def __init__(
        self,
        cases: list[Case],
        deadline: float,
        changed: Callable[[], None],
        device: str = "cuda",
        deadlines: dict[str, float] | None = None,
        worker: tuple[str, ...] = (sys.executable, "-m", "bench.gpu.worker"),
        silence: float | None = None,
    ) -> None:
        """Prepare.

        Args:
            cases: what to measure, the most important first.
            deadline: of the last case's begin, in seconds of `time.time`.
            changed: called after each result.
            device: "cuda", or "cpu" to try the bench itself.
            deadlines: kind -> an earlier one for the cases of that kind.
            worker: the command.
            silence: seconds after which a kernel hangs; None for the usual ones.
        """
        self.left: dict[int, Case] = dict(enumerate(cases))
        self.deadline = deadline
        self.changed = changed
        self.device = device
        self.worker = worker
        # Triton's interpreter, in a trial on the CPU, is slower than any kernel.
        self.silence = silence or (SILENCE if device == "cuda" else 4 * SILENCE)
        self._patience = STARTING
        self.deadlines = deadlines or {}
        self.results: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._crashed: dict[int, dict[str, str]] = {}  # case -> variant -> how
        self._crashes: dict[str, int] = {}

    def run(self) -> None:
        """Measure until nothing is left, or the time is up."""
        for _ in range(STARTS):
            if not self.left or time.time() >= self.deadline:
                break
            if not self._run_worker():
                break
        reason = self.problems[-1] if self.problems else "the worker ended without a word"
        late = time.time() >= self.deadline
        for case in self.left.values():
            self._skip(case, "the time was up" if late else reason)
        self.left.clear()
        self.changed()

    def _document(self) -> dict[str, Any]:
        tired = [variant for variant, count in self._crashes.items() if count >= CRASHES]
        cases = [(n, c.without([*tired, *self._crashed.get(n, {})]).to_json()) for n, c in self.left.items()]
        return {
            "device": self.device,
            "deadline": self.deadline,
            "deadlines": self.deadlines,
            "constants": {
                n: f
                for r in self.results
                if r["case"]["kind"] == "constants"
                for n, f in r["variants"].items()
            },
            "cases": cases,
        }

    def _run_worker(self) -> bool:
        """One worker, from start to end; whether another could do more."""
        number: int | None = None
        variant: str | None = None
        reason = ""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(
                die_with_parent(self.worker),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # torch.compile has helpers, which must end with it
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):  # it has ended already; why, its stderr says
                    process.stdin.write(json.dumps(self._document()))
                    process.stdin.close()
                self._patience = STARTING
                for event in read_events(process.stdout, self.deadline + GRACE, lambda: self._patience):
                    if event["event"] == "begin":
                        number, variant, self._patience = event["number"], None, STARTING
                    elif event["event"] == "variant":
                        variant = event["variant"]
                        self._patience = event.get("patience") or self.silence
                    elif event["event"] == "lost":
                        reason = event["reason"]
                    elif self._take(event):
                        return False
                    elif event["event"] == "case":
                        number = variant = None
            except TimeoutError as error:
                reason = str(error)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if not reason:
                errors.seek(0)
                tail = errors.read().strip().splitlines()[-3:]
                reason = f"its process ended with {process.returncode}: {' '.join(tail)[-400:]}"
        return self._blame(number, variant, reason)

    def _take(self, event: dict[str, Any]) -> bool:
        """Keep what an event brings; whether it was the last."""
        if event["event"] == "case":
            case, number = self.left.pop(event["number"]), event["number"]
            found = event["result"]["variants"]
            for variant in case.variants:
                if variant not in found and "skipped" not in event["result"]:
                    how = self._crashed.get(number, {}).get(variant, "left out after it crashed twice")
                    found[variant] = {"failed": how}
            self.results.append(event["result"] | {"seconds": event["seconds"]})
        elif event["event"] == "skipped":
            self._skip(self.left.pop(event["number"]), event["reason"])
        elif event["event"] == "done":
            return True
        self.changed()
        return False

    def _blame(self, number: int | None, variant: str | None, reason: str) -> bool:
        """Note whose fault it was that the worker ended early; whether it is worth to start another."""
        if number is None or number not in self.left:
            self.problems.append(f"the worker failed before its first case: {reason}")
            return False
        if reason == "the time was up":
            self._skip(self.left.pop(number), "the time was up while it was measured")
            return False
        if variant is None:  # all variants were timed in turn: any of them, and none can be named
            case = self.left.pop(number)
            self.problems.append(f"{case.name}: {reason}")
            self._skip(case, f"while its variants were timed: {reason}")
            return True
        self.problems.append(f"{self.left[number].name}, {variant}: {reason}")
        self._crashed.setdefault(number, {})[variant] = reason
        self._crashes[variant] = self._crashes.get(variant, 0) + 1
        return True

    def _skip(self, case: Case, reason: str) -> None:
        self.skipped.append({"case": case.to_json(), "reason": reason})
        self.changed()
