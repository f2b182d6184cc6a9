"""The optimizer, its parameter groups, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gistops._dtensor import is_dtensor, whole
from gistops.optim import IMPLEMENTATION

from ..config import Config, OptimConfig
from ..methods.method import Stage
from ..model.backbones import Timm
from ..model.model import Model

#: The head's parameters that have the displacements' learning rate and weight decay.
DISPLACEMENT_PARAMETERS = ("displacements", "axis", "mlp_in", "mlp_out")
BACKBONE = "backbone."  # prefix of the names of the backbone's parameters


def make_optimizer(
    model: Model, config: Config, without_decay: tuple[str, ...] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer that --optimizer names, over the parameter groups."""
    options: dict[str, Any] = {
        "params": parameter_groups(model, config, without_decay),
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        # The fused kernel makes one pass over memory: a seventh of the time for a head of 8,142 × 2,048 on a CPU. But when
        # GradScaler skips the first step, torch's fused CPU kernel of SGD later reads an uninitialized momentum buffer.
        "fused": config.runtime.precision != "fp16",
    }
    if config.optim.optimizer == "adamw":
        on_gpu = config.runtime.resolved_device.startswith("cuda")
        return torch.optim.AdamW(**options, capturable=config.runtime.cuda_graph and on_gpu)
    return torch.optim.SGD(**options, momentum=config.optim.momentum)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore a state. Steps are launched as this run asks for, with or without --cuda-graph, not as the saved run did."""
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    kept = [saved | {name: own[name] for name in IMPLEMENTATION if name in own} for saved, own in groups]
    optimizer.load_state_dict(state | {"param_groups": kept})


def clip_gradients(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, max_norm: float | None
) -> None:
    """Scale the gradients down to a norm over all parameters of the optimizer, if theirs is larger; None clips nothing.

    The norm of a sharded head is over the classes of all processes, which all call the function.
    """
    if max_norm is None:
        return
    scaler.unscale_(optimizer)  # the norm is that of the gradients themselves
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # torch takes no sharded and other parameters together.
    parts = [
        [p for p in parameters if is_dtensor(p) == sharded and p.grad is not None]
        for sharded in (False, True)
    ]
    norms = [
        whole(torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]))
        for part in parts
        if part
    ]
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part, max_norm, torch.linalg.vector_norm(torch.stack(norms)))


def parameter_groups(
    model: Model, config: Config, without_decay: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Return three parameter groups: weights, parameters without weight decay, and displacements.

    A backbone with learning rates of its own has groups after them. With --shard-classes the head has three of its own, as no
    optimizer takes sharded and other parameters in one group.

    Args:
        model: the model.
        config: the options.
        without_decay: names of the head's parameters without weight decay, beside the temperatures.
    """
    parameters = list(model.named_parameters())
    backbone = []
    if config.optim.backbone_lr != 1 or config.tuning.layer_decay is not None:
        backbone = _backbone_groups(model.backbone, config)
        parameters = [item for item in parameters if not item[0].startswith(BACKBONE)]
    if not config.runtime.shard_classes:
        return _groups(parameters, config, without_decay) + backbone
    head = [item for item in parameters if item[0].startswith("head.")]
    others = [item for item in parameters if not item[0].startswith("head.")]
    groups = _groups(head, config, without_decay)
    for group in groups:
        if any(map(is_dtensor, group["params"])):  # which fused SGD does not take
            group |= {"fused": False, "foreach": True}
    return _groups(others, config, without_decay) + backbone + groups


def _backbone_groups(backbone: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Return the groups of a backbone: one, or with --layer-decay those of timm, one or two per layer."""
    rate = config.optim.lr * config.optim.backbone_lr
    if config.tuning.layer_decay is None:
        parameters = list(backbone.parameters())
        return [{"params": parameters, "lr": rate}] if parameters else []
    assert isinstance(backbone, Timm)  # checks.py refuses others
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(
        backbone.network,
        weight_decay=config.optim.weight_decay,
        no_weight_decay_list=getattr(backbone.network, "no_weight_decay", tuple)(),
        layer_decay=config.tuning.layer_decay,
    )
    return [
        {"params": group["params"], "lr": rate * group["lr_scale"], "weight_decay": group["weight_decay"]}
        for group in groups
    ]


def _groups(
    parameters: Iterable[tuple[str, Tensor]], config: Config, without_decay: tuple[str, ...]
) -> list[dict[str, Any]]:
    displacements = config.displacements
    groups: dict[str, dict[str, Any]] = {
        "weights": {},
        "without decay": {"weight_decay": 0.0},  # weight decay would lower the temperatures
        "displacements": {"lr": config.optim.lr * displacements.displacement_lr},
    }
    if displacements.displacement_weight_decay is not None:
        groups["displacements"]["weight_decay"] = displacements.displacement_weight_decay
    for group in groups.values():
        group["params"] = []
    for full_name, parameter in parameters:
        name = full_name.removeprefix("head.")
        if name.endswith("tau") or (name in without_decay and name != full_name):
            groups["without decay"]["params"].append(parameter)
        elif name in DISPLACEMENT_PARAMETERS:
            groups["displacements"]["params"].append(parameter)
        else:
            groups["weights"]["params"].append(parameter)
    return list(groups.values())


def warmup_epochs(optim: OptimConfig, stage: Stage) -> float:
    """Return the epochs of warm-up of a stage: none with frozen features, as such stages are short, and a linear layer needs none."""
    return 0.0 if stage.frozen_features else optim.warmup_epochs


def lr_schedule(optim: OptimConfig, stage: Stage, steps_per_epoch: int) -> Callable[[int], float]:
    """Return a function from the step of a stage to the factor of the learning rate."""
    warmup_steps = warmup_epochs(optim, stage) * steps_per_epoch

    def factor(step: int) -> float:
        progress = step / max(1, stage.epochs * steps_per_epoch)
        if optim.schedule == "cosine":
            value = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            value = 0.1 ** sum(progress >= drop for drop in optim.lr_drops)
        return value * min(1.0, (step + 1) / warmup_steps) if warmup_steps else value

    return factor
