"""Which parameters learn at which rate, and how it falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..config import Config
from ..model.model import Model

#: What moves displacements, by the names of the head's parameters.
DISPLACEMENTS = ("displacements", "axis", "mlp_in", "mlp_out")


def parameter_groups(model: Model, config: Config) -> list[dict[str, Any]]:
    """Temperatures without weight decay, which would pull them down; displacements, and what moves them, apart."""
    groups: dict[str, dict[str, Any]] = {
        "weights": {},
        "temperatures": {"weight_decay": 0.0},
        "displacements": {"lr": config.optim.lr * config.displacements.displacement_lr},
    }
    if config.displacements.displacement_weight_decay is not None:
        groups["displacements"]["weight_decay"] = config.displacements.displacement_weight_decay
    for group in groups.values():
        group["params"] = []
    for name, parameter in model.named_parameters():
        own = name.removeprefix("head.")
        kind = (
            "temperatures" if own.endswith("tau") else "displacements" if own in DISPLACEMENTS else "weights"
        )
        groups[kind]["params"].append(parameter)
    return list(groups.values())


def lr_schedule(config: Config, epochs: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step of a stage."""

    def factor(step: int) -> float:
        done = step / max(1, epochs * steps_per_epoch)
        if config.optim.schedule == "cosine":
            value = 0.5 * (1 + math.cos(math.pi * done))
        else:
            value = 0.1 ** sum(done >= drop for drop in config.optim.lr_drops)
        warmup_steps = config.optim.warmup_epochs * steps_per_epoch
        return value * min(1.0, (step + 1) / warmup_steps) if warmup_steps else value

    return factor
