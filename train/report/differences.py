"""The difference of two methods' accuracies, and its standard error over the test samples."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """The difference of two accuracies, and its standard error."""

    value: float
    error: float

    @property
    def is_clear(self) -> bool:
        """True if the difference exceeds its standard error. A smaller one counts as none."""
        return abs(self.value) > self.error


def standard_error(result: Record) -> float | None:
    """Return the standard error of the overall accuracy; None if the number of test samples is unknown.

    It is √(p·(1 − p)/n) with two correct and two wrong samples added (Agresti, Coull, The American Statistician 1998), because
    it would be 0 for accuracies of 0 and 1, of few samples too.
    """
    if "test_counts" not in result:
        return None
    samples = sum(result["test_counts"])
    p = (float(result["accuracy"]["overall"]) * samples + 2) / (samples + 4)
    return math.sqrt(p * (1 - p) / (samples + 4))


def difference(first: Record, second: Record, same_samples: bool) -> Difference | None:
    """Return by how much the overall accuracy of the first result exceeds that of the second.

    The standard error is that of the paired differences of the samples if both results have them. It is usually smaller
    than that of independent test sets, because methods fail on the same samples.

    Args:
        first, second: the results.
        same_samples: whether both were tested on the same samples.

    Returns:
        The difference; None if the number of test samples is unknown.
    """
    value = first["accuracy"]["overall"] - second["accuracy"]["overall"]
    a, b = _correct(first), _correct(second)
    if same_samples and a is not None and b is not None:
        return Difference(value, float((a - b).var() / len(a)) ** 0.5)
    errors = standard_error(first), standard_error(second)
    if errors[0] is None or errors[1] is None:
        return None
    return Difference(value, (errors[0] ** 2 + errors[1] ** 2) ** 0.5)


def difference_of_group(first: Record, second: Record, members: list[bool]) -> Difference | None:
    """Return by how much the mean of the accuracies of some classes differs.

    The standard error is the spread of the differences of single classes over √(number of classes), so that it holds for
    classes with a single test sample too.

    Args:
        first, second: the results.
        members: True for classes of the group, [K].

    Returns:
        The difference; None if fewer than two classes of the group have test samples.
    """
    columns = zip(first["accuracy_per_class"], second["accuracy_per_class"], members, strict=True)
    found = [a - b for a, b, member in columns if member and a is not None and b is not None]
    if len(found) < 2:
        return None
    values = np.array(found)
    return Difference(float(values.mean()), float(values.std(ddof=1) / len(found) ** 0.5))


def _correct(result: Record) -> np.ndarray | None:
    """Return 1 for each test sample, ordered by class, that was classified correctly, else 0; None in early records."""
    packed = result.get("analysis", {}).get("correct")
    if packed is None or "test_counts" not in result:
        return None
    bits = np.frombuffer(base64.b64decode(packed), dtype=np.uint8)
    return np.unpackbits(bits, count=sum(result["test_counts"])).astype(np.float64)
