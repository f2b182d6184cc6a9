"""Time for the tests of the GPU bench: what waits and measures is told how long it takes."""

from __future__ import annotations

from collections.abc import Callable

from bench.gpu.timing import Sample


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], Sample]:
        def measure() -> Sample:
            self.now += seconds
            return Sample(1e3 * seconds, False)

        return measure
