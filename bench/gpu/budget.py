"""The seconds that each part of a day may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

#: Part -> its weight in the time: about the seconds of a day of eight minutes. What a part does not use is there for
#: the later ones. The last three run side by side.
PARTS = {
    "build": 50.0,
    "smoke": 50.0,
    "constants": 12.0,
    "measure": 125.0,
    "profile": 20.0,
    "ncu": 15.0,
    "test": 210.0,
    "sanitize": 210.0,
    "train": 210.0,
}
CONCURRENT = ("test", "sanitize", "train")
SUMMARY = 3.0  # seconds at the end, to write


class Budget:
    """The seconds that each part may take, so that all end in time."""

    def __init__(self, minutes: float, parts: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        """Start the time.

        Args:
            minutes: for all parts.
            parts: those that will run.
            clock: seconds.
        """
        self.clock = clock
        self.begin = clock()
        self.end = self.begin + 60 * minutes - SUMMARY
        self.parts = [part for part in PARTS if part in parts]

    def left(self) -> float:
        """Seconds until the end."""
        return max(0.0, self.end - self.clock())

    def seconds(self, part: str) -> float:
        """The seconds that `part` may take, if it begins now and the parts before it have ended."""
        return self.share(part, part)

    def share(self, part: str, first: str) -> float:
        """The seconds that `part` may take of the time from now on, where `first` is about to begin."""
        later = self.parts[self.parts.index(first) :]
        alone = [p for p in later if p not in CONCURRENT or p == next(b for b in CONCURRENT if b in later)]
        return self.left() * PARTS[part] / sum(PARTS[p] for p in alone)
