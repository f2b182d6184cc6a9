"""The trained models that a page shows, from the records of its runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..methods import TITLES
from ..shot_groups import GROUPS, split_classes

Record = dict[str, Any]


@dataclass(frozen=True)
class TrainedMethod:
    """One method of one run: its name on the page, its result and epochs, and the run's record of the data."""

    name: str
    run: str
    result: Record
    epochs: list[Record]
    data: Record  # see data_record.py; empty for runs of early versions

    @property
    def classes(self) -> tuple[list[str], list[int], list[int]] | None:
        """The names of the classes and their numbers of training and test samples; None in early versions."""
        if not self.data or "test_counts" not in self.result:
            return None
        return self.data["class_names"], self.result["train_counts"], self.result["test_counts"]

    @property
    def group_of_classes(self) -> list[str] | None:
        """The group of each class: many, medium or few; None in early versions."""
        if "train_counts" not in self.result:
            return None
        counts = torch.tensor(self.result["train_counts"])
        masks = split_classes(counts, self.data.get("split_rule", "standard"))
        position = torch.stack([masks[group] for group in GROUPS]).int().argmax(0)
        return [GROUPS[i] for i in position.tolist()]


def trained_methods(runs: dict[str, list[Record]]) -> list[TrainedMethod]:
    """Return the methods of all runs that have a result, in the order of the records."""
    found = []
    for run, records in runs.items():
        data: Record = next((record for record in records if record["event"] == "data"), {})
        for result in (record for record in records if record["event"] == "result"):
            title = result.get("title", TITLES[result["method"]])
            name = title if len(runs) == 1 else f"{run}: {title}"
            epochs = [r for r in records if r["event"] == "epoch" and r["method"] == result["method"]]
            found.append(TrainedMethod(name, run, result, epochs, data))
    return found
