"""Groups of classes by training samples: many-, medium- and few-shot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

GROUPS = ("many", "medium", "few")

SplitRule = Literal["standard", "paper_text", "paper_code"]

#: The conditions on the training samples n of many-shot and few-shot classes. All others are medium-shot. Published
#: tables use different rules.
SPLIT_RULES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "standard": (lambda n: n > 100, lambda n: n < 20),
    "paper_text": (lambda n: n > 100, lambda n: n <= 20),
    "paper_code": (lambda n: n >= 100, lambda n: n <= 20),
}


def split_classes(train_counts: Tensor, rule: str) -> dict[str, Tensor]:
    """Return a mask over the classes, [K] bool, for each group."""
    many, few = (predicate(train_counts) for predicate in SPLIT_RULES[rule])
    return {"many": many, "medium": ~(many | few), "few": few}
