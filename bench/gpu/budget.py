"""The time budget of a session, shared by its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

#: Part -> weight: about its seconds in a session of eight minutes. Later parts get the time that a part leaves. The
#: last three parts run concurrently.
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
SUMMARY = 3.0  # seconds at the end for writing the files


class Budget:
    """The time limit of each part, so that all parts end within the total."""

    def __init__(self, minutes: float, parts: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        """Start the clock.

        Args:
            minutes: limit of all parts together.
            parts: the parts that will run.
            clock: returns seconds.
        """
        self.clock = clock
        self.begin = clock()
        self.end = self.begin + 60 * minutes - SUMMARY
        self.parts = [part for part in PARTS if part in parts]

    def left(self) -> float:
        """Return the seconds until the end."""
        return max(0.0, self.end - self.clock())

    def seconds(self, part: str) -> float:
        """Return the seconds that `part` may take if it begins now and the earlier parts have ended."""
        return self.share(part, part)

    def share(self, part: str, first: str) -> float:
        """Return the share of `part` in the time from now on, if `first` begins now."""
        later = self.parts[self.parts.index(first) :]
        alone = [p for p in later if p not in CONCURRENT or p == next(b for b in CONCURRENT if b in later)]
        return self.left() * PARTS[part] / sum(PARTS[p] for p in alone)
