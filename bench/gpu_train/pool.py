"""A pool of training processes."""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

from .environment import has_compiled_code
from .jobs import Job, finished_models, read_records, train_command

REPOSITORY = Path(__file__).resolve().parents[2]


class Pool:
    """Training processes, started in the order of the jobs, with at most `args.at_once` running.

    With `--compile` and an empty compile cache only the first process runs until it has completed an epoch. The
    other processes then find its compiled code in the cache.
    """

    def __init__(
        self, jobs: list[Job], data: Path | None, args: argparse.Namespace, env: dict[str, str]
    ) -> None:
        self.args, self.data, self.env = args, data, env
        self.waiting = [job for job in jobs if len(finished_models(args.folder, job)) < len(job.methods)]
        self.running: dict[Job, subprocess.Popen[bytes]] = {}
        self.codes: dict[Job, int] = {}
        cold = args.compile and self.waiting and not has_compiled_code()
        #: Records of the first job at the start, while the pool waits for it to compile; otherwise None.
        self.records_at_start = len(read_records(args.folder, self.waiting[0])) if cold else None

    def _max_running(self) -> int:
        if self.records_at_start is not None:
            first = next(iter(self.running), None)
            compiling = first is None or len(read_records(self.args.folder, first)) == self.records_at_start
            if not self.codes and compiling:
                return 1
            self.records_at_start = None
        return self.args.at_once or len(self.running) + len(self.waiting)

    def poll(self) -> None:
        """Record the exit codes of the processes that ended, and start as many others as may run."""
        for job, process in list(self.running.items()):
            if (code := process.poll()) is not None:
                self.codes[job] = code
                del self.running[job]
        while self.waiting and len(self.running) < self._max_running():
            job = self.waiting.pop(0)
            with open(self.args.folder / f"{job.name}.log", "ab") as log:
                self.running[job] = subprocess.Popen(
                    train_command(job, self.data, self.args),
                    cwd=REPOSITORY,
                    env=self.env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def stop(self, deadline: float) -> None:
        """Ask all processes to save a checkpoint and exit. Kill those that still run at `deadline` (monotonic time)."""
        self.waiting = []
        for process in self.running.values():
            process.terminate()
        while self.running and time.monotonic() < deadline:
            time.sleep(0.05)
            self.poll()
        for process in self.running.values():
            process.kill()
            process.wait()
        self.poll()
