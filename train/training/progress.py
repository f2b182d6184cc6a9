"""The progress of a run: a progress bar on a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

WINDOW = 30.0  # seconds over which the rate is averaged


class Display:
    """Shows the loss, the rate and the remaining time of a run.

    Args:
        console: where to print.
        total_images: image passes of the whole run.
        done_images: image passes before the checkpoint that the run resumes from.
    """

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
        """Return True if the loss of each step is shown."""
        return not self._progress.disable

    @property
    def rate(self) -> float:
        """The recent number of images per second, evaluations included."""
        (begin, before), now = self._recent[0], time.perf_counter()
        return (self.done - before) / max(now - begin, 1e-9)

    @property
    def remaining(self) -> str:
        """The remaining time, as h:mm:ss."""
        seconds = round((self.total - self.done) / self.rate) if self.rate > 0 else 0
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def step(self, title: str, images: int, loss: float | None) -> None:
        """Count a step of `images` images and show its loss, if given."""
        self.done += images
        now = time.perf_counter()
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and self._recent[1][0] < now - WINDOW:
            self._recent.popleft()
        if self._progress.disable:
            return
        self._progress.update(self._task, completed=self.done, description=title)
        if loss is not None:
            status = f"loss {loss:.3f}  {self.rate:,.0f} images/s  {self.remaining} left"
            self._progress.update(self._task, status=status)

    def skip(self, images: int) -> None:
        """Reduce the total by `images`, which another method or run has trained on."""
        self.total -= images
        self._progress.update(self._task, total=self.total)

    def epoch(self, title: str, record: dict[str, Any]) -> None:
        """Print a line for the record of an epoch; on a terminal only if the epoch was evaluated."""
        accuracy = record.get("accuracy")
        if accuracy is None and not self._progress.disable:
            return
        parts = [f"{title:<28}", f"loss {record['loss']:.3f}", f"lr {record['lr']:.4f}"]
        waited = 1 - record["images_per_second"] / max(record["model_images_per_second"], 1e-9)
        parts += [f"{record['images_per_second']:,.0f} images/s ({waited:.0%} waiting for input)"]
        parts += [f"{self.remaining} left"]
        if accuracy is not None:
            parts.append(f"{record['split']} accuracy {100 * accuracy['overall']:.1f}")
        self.console.print("  ".join(parts), highlight=False, soft_wrap=True)


def throughput(images: int, seconds: float, input_seconds: float) -> dict[str, float]:
    """Return the images per second, and those of the model alone: without the time spent waiting for input."""
    model_seconds = max(seconds - input_seconds, 1e-9)
    rates = {"images_per_second": images / seconds, "model_images_per_second": images / model_seconds}
    return {"seconds": round(seconds, 3)} | {name: round(rate, 1) for name, rate in rates.items()}
