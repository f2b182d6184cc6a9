"""What is shown while a run goes on: a progress bar on a terminal, a line an epoch anywhere else."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

WINDOW = 30.0  # seconds


class Display:
    """Shows loss, rate and time left of a whole run, counted in images."""

    def __init__(self, console: Console, total_images: int, done_images: int) -> None:
        self.console = console
        self.total, self.done = total_images, done_images
        self._recent = deque([(time.perf_counter(), done_images)])  # (time, images done)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total_images, completed=done_images, status="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @property
    def shows_steps(self) -> bool:
        """True if anyone sees a step's loss."""
        return not self._progress.disable

    @property
    def rate(self) -> float:
        """Images a second of late, evaluations included: what the time left depends on."""
        (begin, before), now = self._recent[0], time.perf_counter()
        return (self.done - before) / max(now - begin, 1e-9)

    @property
    def left(self) -> str:
        seconds = round((self.total - self.done) / self.rate) if self.rate > 0 else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def step(self, where: str, images: int, loss: float | None) -> None:
        """Count a step of `images` images; `loss` if it is at hand."""
        self.done += images
        now = time.perf_counter()
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and self._recent[1][0] < now - WINDOW:
            self._recent.popleft()
        if self._progress.disable:
            return
        self._progress.update(self._task, completed=self.done, description=where)
        if loss is not None:
            status = f"loss {loss:.3f}  {self.rate:,.0f} images/s  {self.left} left"
            self._progress.update(self._task, status=status)

    def skip(self, images: int) -> None:
        """So many need not be gone through."""
        self.total -= images
        self._progress.update(self._task, total=self.total)

    def epoch(self, where: str, record: dict[str, Any]) -> None:
        """A line for an epoch's record: on a terminal only where it was evaluated."""
        accuracy = record.get("accuracy")
        if accuracy is None and not self._progress.disable:
            return
        parts = [f"{where:<28}", f"loss {record['loss']:.3f}", f"lr {record['lr']:.4f}"]
        waited = 1 - record["images_per_second"] / max(record["model_images_per_second"], 1e-9)
        parts += [f"{record['images_per_second']:,.0f} images/s ({waited:.0%} waiting for input)"]
        parts += [f"{self.left} left"]
        if accuracy is not None:
            parts.append(f"{record['split']} accuracy {100 * accuracy['overall']:.1f}")
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)
