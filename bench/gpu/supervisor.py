"""The supervisor of bench/gpu/worker.py: it restarts the worker after a crash and continues without the variant at fault."""

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

SILENCE = 25.0  # seconds without an event after which a kernel counts as hung
STARTING = 90.0  # the same while the process starts, or creates the tensors of a case
GRACE = 8.0  # seconds beyond the deadline, for a case that began in time
MAX_STARTS = 8  # the number of times that the worker is started, at most
MAX_CRASHES = 2  # a variant with this many crashes is excluded from all other cases


def read_events(lines: IO[str], until: float, silence: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yield the events of a worker.

    Args:
        lines: output of the worker.
        until: end of the time, as `time.time` gives it.
        silence: returns the seconds that may pass before the next event.

    Raises:
        TimeoutError: no event came for too long, or `until` has passed.
    """
    waiting: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in lines:
            waiting.put(line)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        left = until - time.time()
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
    """Runs cases in workers, and keeps the results, the crashes and the remaining cases."""

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
            cases: the cases, the most important first.
            deadline: latest start of a case, in seconds of `time.time`.
            changed: called after each result.
            device: "cuda", or "cpu" for a trial of the bench.
            deadlines: kind -> an earlier deadline for the cases of this kind.
            worker: command of the worker.
            silence: seconds without an event after which a kernel counts as hung; None for the default.
        """
        self.left: dict[int, Case] = dict(enumerate(cases))
        self.deadline = deadline
        self.changed = changed
        self.device = device
        self.worker = worker
        # In a trial on the CPU, Triton's interpreter is slower than any kernel.
        self.silence = silence or (SILENCE if device == "cuda" else 4 * SILENCE)
        self._patience = STARTING
        self.deadlines = deadlines or {}
        self.results: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._crashed: dict[int, dict[str, str]] = {}  # case -> variant -> reason
        self._crashes: dict[str, int] = {}

    def run(self) -> None:
        """Run the cases until none is left or the time is up."""
        for _ in range(MAX_STARTS):
            if not self.left or time.time() >= self.deadline:
                break
            if not self._run_worker():
                break
        reason = self.problems[-1] if self.problems else "the worker ended without a message"
        late = time.time() >= self.deadline
        for case in self.left.values():
            self._skip(case, "the time was up" if late else reason)
        self.left.clear()
        self.changed()

    def _document(self) -> dict[str, Any]:
        excluded = [variant for variant, count in self._crashes.items() if count >= MAX_CRASHES]
        cases = [
            (n, c.without([*excluded, *self._crashed.get(n, {})]).to_json()) for n, c in self.left.items()
        ]
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
        """Run one worker to its end. Returns True if another worker could do more."""
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
                start_new_session=True,  # so that the helper processes of torch.compile end with it
            )
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with contextlib.suppress(
                    BrokenPipeError
                ):  # the worker has ended already; its stderr has the reason
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
        """Keep the result of an event. Returns True if the event is the last."""
        if event["event"] == "case":
            case, number = self.left.pop(event["number"]), event["number"]
            found = event["result"]["variants"]
            for variant in case.variants:
                if variant not in found and "skipped" not in event["result"]:
                    how = self._crashed.get(number, {}).get(variant, "excluded after it crashed twice")
                    found[variant] = {"failed": how}
            self.results.append(event["result"] | {"seconds": event["seconds"]})
        elif event["event"] == "skipped":
            self._skip(self.left.pop(event["number"]), event["reason"])
        elif event["event"] == "done":
            return True
        self.changed()
        return False

    def _blame(self, number: int | None, variant: str | None, reason: str) -> bool:
        """Attribute an early end of the worker. Returns True if another worker could do more."""
        if number is None or number not in self.left:
            self.problems.append(f"the worker failed before its first case: {reason}")
            return False
        if reason == "the time was up":
            self._skip(self.left.pop(number), "the time was up while it was measured")
            return False
        if variant is None:  # during the timed rounds the variant at fault is unknown
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
