"""Optimizers: AdamW, a learning rate of the backbone's own, and gradients that are clipped."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

from train import footprint
from train.config import Config, ConfigError
from train.data.dataset import Dataset
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, check_resuming, equal

ADAMW = {"optimizer": "adamw", "lr": 1e-3, "backbone_lr": 0.1, "clip_gradient_norm": 1.0}


@pytest.mark.parametrize("method", ["gist", "crt"])
def test_adamw_goes_on_to_the_same_bits(method: str, images: Dataset, seed: int) -> None:
    config = IMAGES.replace(**ADAMW, crt_epochs=1, schedule="cosine")
    check_resuming(method, config, images, random.Random(seed).randrange(1, 15))


def test_a_state_is_loaded_into_steps_that_are_launched_otherwise(features: Dataset) -> None:
    """A run may be resumed without --cuda-graph, which asks for capturable steps, or with another number of processes."""
    config = FEATURES.replace(**ADAMW)
    whole, resumed = Trainer("gist", config, features), Trainer("gist", config, features)
    whole.step()
    state = copy.deepcopy(whole.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group |= {"capturable": True, "fused": False, "foreach": True}
    resumed.load_state_dict(state)
    for group in resumed.optimizer.param_groups:
        assert (group["capturable"], group["fused"], group["foreach"]) == (False, True, None)
    whole.step()
    resumed.step()
    assert equal(whole.model.state_dict(), resumed.model.state_dict())


def test_a_whole_head_has_fused_steps(features: Dataset) -> None:
    """Others read the learning rate on the host, where a graph has it in a tensor on the GPU."""
    trainer = Trainer("gist", FEATURES.replace(shard_classes=True), features)
    assert all(group["fused"] for group in trainer.optimizer.param_groups)


def test_adamw_decays_weights_apart_from_their_gradients(features: Dataset) -> None:
    """At zero gradients AdamW multiplies weights by 1 - lr × decay; Adam and SGD with L2 would not."""
    trainer = Trainer("plain", FEATURES.replace(optimizer="adamw", lr=0.5, weight_decay=0.1), features)
    (group, *_) = trainer.optimizer.param_groups
    before = [parameter.detach().clone() for parameter in group["params"]]
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    for parameter, value in zip(group["params"], before, strict=True):
        torch.testing.assert_close(parameter.detach(), value * 0.95)


def test_the_backbone_has_a_rate_of_its_own(images: Dataset) -> None:
    trainer = Trainer("gist", IMAGES.replace(backbone_lr=0.25), images)
    *head, backbone = trainer.optimizer.param_groups
    assert [id(p) for p in backbone["params"]] == [id(p) for p in trainer.model.backbone.parameters()]
    assert (backbone["lr"], head[0]["lr"]) == (IMAGES.optim.lr / 4, IMAGES.optim.lr)
    assert sum(len(group["params"]) for group in head) == len(list(trainer.model.head.parameters()))
    trainer.scheduler.base_lrs = [1.0] * 4
    trainer.step()
    assert trainer.lr == IMAGES.optim.lr  # records have the head's


def steps_taken(config: Config, data: Dataset) -> tuple[Trainer, list[Tensor]]:
    trainer = Trainer("gist", config, data)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.step()
    after = [parameter.detach() for parameter in trainer.model.parameters()]
    return trainer, [b - a for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_gradients_are_clipped_to_the_norm(precision: str, features: Dataset) -> None:
    """Plain gradient descent with rate 1 moves by the gradients: by their norm, or less. A scaled gradient is unscaled first."""
    config = FEATURES.replace(lr=1.0, momentum=0.0, weight_decay=0.0, precision=precision)
    _, whole = steps_taken(config, features)
    norm = torch.cat([step.flatten() for step in whole]).norm()
    _, clipped = steps_taken(config.replace(clip_gradient_norm=float(norm) / 3), features)
    for step, expected in zip(clipped, whole, strict=True):
        torch.testing.assert_close(step, expected / 3, rtol=1e-3, atol=1e-6)
    _, unclipped = steps_taken(config.replace(clip_gradient_norm=float(norm) * 3), features)
    for step, expected in zip(unclipped, whole, strict=True):
        torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["clip_gradient_norm", "backbone_lr"])
def test_values_that_are_not_above_zero_are_refused(name: str) -> None:
    option = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{option}: expected a number above 0, got 0"):
        Config().replace(**{name: 0})


def test_the_estimates_count_both_moments(images: Dataset) -> None:
    trial = footprint.try_network(IMAGES, images, 2)
    adamw = IMAGES.replace(**ADAMW, methods=("focal",))
    sgd = IMAGES.replace(methods=("focal",))
    trainer = Trainer("focal", adamw, images)
    trainer.step()
    state = trainer.optimizer.state.values()
    moments = sum(values[name].nbytes for values in state for name in ("exp_avg", "exp_avg_sq"))
    memory, disk = (
        [estimate(config) for config in (sgd, adamw)]
        for estimate in (
            lambda config: footprint.fixed_memory("focal", config, images, trial),
            lambda config: footprint.disk_needed(config, images, trial),
        )
    )
    assert memory[1] - memory[0] == moments // 2
    assert disk[1] - disk[0] == moments
