"""The tables of all classes, as plain values that the page's script sorts, searches and shows."""

from __future__ import annotations

from typing import Any

from ..console import printable
from ..shot_groups import GROUPS
from .trained import TrainedMethod

MAX_ROWS = 20_000  # of a table; about 25 bytes each


def class_tables(methods: list[TrainedMethod]) -> list[dict[str, Any]]:
    """Return one table for the methods of each set of classes; none for methods of early versions.

    A table has columns: the names, the group's position in `GROUPS`, training samples, test samples, and the number of
    correct test samples of each method. With more than `MAX_ROWS` classes it has those with the fewest training samples.
    """
    same: list[list[TrainedMethod]] = []
    for method in methods:
        if method.classes is None:
            continue
        for table in same:
            if table[0].classes == method.classes and table[0].group_of_classes == method.group_of_classes:
                table.append(method)
                break
        else:
            same.append([method])
    return [_table(table) for table in same]


def _table(methods: list[TrainedMethod]) -> dict[str, Any]:
    classes, groups = methods[0].classes, methods[0].group_of_classes
    assert classes is not None
    assert groups is not None
    names, train, test = classes
    rows = sorted(range(len(names)), key=train.__getitem__)[:MAX_ROWS]
    rows.sort()
    correct = [
        [round((method.result["accuracy_per_class"][k] or 0) * test[k]) for k in rows] for method in methods
    ]
    return {
        "methods": [method.name for method in methods],
        "num_classes": len(names),
        "columns": {
            "groups": list(GROUPS),
            "name": [printable(names[k]) for k in rows],
            "group": [GROUPS.index(groups[k]) for k in rows],
            "train": [train[k] for k in rows],
            "test": [test[k] for k in rows],
            "correct": correct,
        },
    }
