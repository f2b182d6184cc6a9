"""A fake clock for the tests of `bench.gpu`."""

from __future__ import annotations

from collections.abc import Callable

from bench.gpu.timing import Sample


class Clock:
    """A clock that advances only when a test advances it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> Callable[[], Sample]:
        """Return a measurement that takes this many seconds."""

        def measure() -> Sample:
            self.now += seconds
            return Sample(1e3 * seconds, False)

        return measure
