"""`Trainer`: streams, stages, schedules, determinism, and resuming from any step."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.__main__ import main
from train.config import OptimConfig
from train.data.dataset import Dataset
from train.methods.method import Stage
from train.training.divergence import Diverged
from train.training.input import epoch_step_sizes
from train.training.optim import lr_schedule
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, equal, finish


@pytest.mark.parametrize("method", ["gist", "plain"])
def test_learns_and_counts_its_images(method: str, images: Dataset) -> None:
    trainer = Trainer(method, IMAGES.replace(stage1_epochs=4, stage2_epochs=4), images)
    records = finish(trainer)
    per_epoch = 232 + 5 * 12  # one pass of the random stream, and a balanced batch in each of its 5 steps
    assert [record["images"] for record in records] == [per_epoch * epoch for epoch in range(1, 9)]
    assert records[-1]["loss"] < records[0]["loss"]
    assert trainer.evaluate()["accuracy"]["overall"] > 0.5  # by chance 0.2


def test_gist_sees_each_random_image_once_an_epoch_and_balanced_classes(images: Dataset) -> None:
    seen: list[Tensor] = []
    trainer = Trainer("gist", IMAGES, images)
    original = trainer.method.losses

    def losses(head: Any, features: Tensor, labels: Tensor, num_balanced: int) -> dict[str, Tensor]:
        assert torch.bincount(labels[:num_balanced]).unique().tolist() in ([0, 4], [4])
        seen.append(labels[num_balanced:])
        return original(head, features, labels, num_balanced)

    trainer.method.losses = losses  # type: ignore[method-assign]
    while trainer.step_of_epoch < trainer.steps_per_epoch:
        trainer.step()
    assert torch.equal(torch.bincount(torch.cat(seen)), images.train_counts)


def test_stage_two_keeps_weights_and_starts_the_rest_afresh(images: Dataset) -> None:
    trainer = Trainer("gist", IMAGES, images)
    while trainer.step_of_epoch < trainer.steps_per_epoch:
        trainer.step()
    trainer.end_epoch()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert before["head.displacements"].shape == (0, 128)
    assert trainer.optimizer.state
    trainer.begin_stage(1)
    after = trainer.model.state_dict()
    assert after["head.displacements"].shape == (4, 128)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "head.displacements")
    assert not trainer.optimizer.state
    assert trainer.optimizer.param_groups[0]["lr"] == IMAGES.optim.lr
    displacements = trainer.model.head.displacements.detach().clone()
    trainer.step()
    assert not torch.equal(displacements, trainer.model.head.displacements)  # the new optimizer has them


def test_temperatures_have_no_decay(features: Dataset) -> None:
    trainer = Trainer("gist", FEATURES, features)
    weights, temperatures, displacements = trainer.optimizer.param_groups
    head = trainer.model.head
    assert {id(p) for p in temperatures["params"]} == {id(head.raw_tau), id(head.raw_random_tau)}
    assert (temperatures["lr"], temperatures["weight_decay"]) == (FEATURES.optim.lr, 0.0)
    assert (weights["lr"], weights["weight_decay"]) == (FEATURES.optim.lr, FEATURES.optim.weight_decay)
    assert [id(p) for p in displacements["params"]] == [id(head.displacements)]
    assert len(weights["params"]) + 3 == len(list(trainer.model.parameters()))


def test_displacements_have_a_rate_and_a_decay_of_their_own(features: Dataset) -> None:
    config = FEATURES.replace(displacement_lr=0.5, displacement_weight_decay=0.0)
    for method, number in (("gist", 1), ("gist-rotation", 2), ("gist-mlp", 3)):
        trainer = Trainer(method, config, features)
        trainer.begin_stage(1)
        group = trainer.optimizer.param_groups[2]
        assert (group["lr"], group["weight_decay"], len(group["params"])) == (
            config.optim.lr / 2,
            0.0,
            number,
        )
    still = Trainer("gist", config.replace(displacement_lr=0.0), features)
    still.begin_stage(1)
    before = still.model.head.displacements.detach().clone()
    still.step()
    assert torch.equal(still.model.head.displacements, before)


@pytest.mark.parametrize("method", ["gist", "plain"])
def test_same_seed_same_bits_other_seed_others(method: str, images: Dataset) -> None:
    states = []
    for seed in (3, 3, 4):
        torch.rand(5)  # what was drawn before must not matter
        trainer = Trainer(method, IMAGES.replace(seed=seed), images)
        finish(trainer, steps=7)
        states.append(trainer.state_dict()["model"])
    assert equal(states[0], states[1])
    assert not equal(states[0], states[2])


@pytest.mark.parametrize("method", ["gist", "plain"])
def test_goes_on_from_any_step_to_the_same_bits(method: str, images: Dataset, seed: int) -> None:
    whole = Trainer(method, IMAGES, images)
    expected = finish(whole)
    total = 3 * whole.steps_per_epoch
    for steps in {0, 5, *random.Random(seed).sample(range(total), 3)}:  # 5: between the stages
        first = Trainer(method, IMAGES, images)
        records = finish(first, steps)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = Trainer(method, IMAGES, images)
        second.load_state_dict(torch.load(file, weights_only=True))
        torch.rand(3)  # nothing but the saved state may count …
        torch.set_rng_state(torch.load(io.BytesIO(file.getvalue()), weights_only=True)["torch_rng"][0])
        assert records + finish(second) == expected, f"after {steps} steps"
        assert equal(second.state_dict(), whole.state_dict()), f"after {steps} steps"


def test_steps_of_an_epoch(images: Dataset) -> None:
    assert epoch_step_sizes(IMAGES, images) == [(12, 50)] * 4 + [(12, 32)]
    assert epoch_step_sizes(IMAGES.replace(batch_size=116), images) == [(12, 116)] * 2
    assert epoch_step_sizes(IMAGES.replace(max_steps_per_epoch=3), images) == [(12, 50)] * 3
    uneven = IMAGES.replace(batch_size=115)  # leaves two
    assert epoch_step_sizes(uneven, images) == [(12, 115), (12, 115), (12, 2)]
    assert epoch_step_sizes(uneven.replace(accumulate=3), images) == [(12, 115), (12, 117)]


def test_schedules() -> None:
    step = lr_schedule(
        OptimConfig(schedule="step", lr_drops=(0.25, 0.5, 0.75)), Stage("", 60, "both"), steps_per_epoch=10
    )
    for epoch, power in ((0, 0), (14, 0), (15, 1), (29, 1), (30, 2), (45, 3), (59, 3)):
        assert step(epoch * 10) == pytest.approx(0.1**power)
    optim = OptimConfig(schedule="cosine", warmup_epochs=2)
    cosine = lr_schedule(optim, Stage("", 20, "random"), steps_per_epoch=5)
    assert [cosine(i) for i in range(3)] == pytest.approx([0.1, 0.2, 0.3], rel=0.01)
    assert cosine(50) == pytest.approx(0.5)
    assert cosine(100) == pytest.approx(0.0)
    frozen = lr_schedule(optim, Stage("", 4, "balanced", frozen_features=True), steps_per_epoch=5)
    assert [frozen(i) for i in (0, 10)] == pytest.approx([1, 0.5])


def test_a_loss_that_is_no_number_stops_the_run(features: Dataset) -> None:
    trainer = Trainer("plain", FEATURES.replace(lr=1e30), features)
    with pytest.raises(Diverged, match=r"the loss is (nan|inf); a lower --lr"):
        finish(trainer)


def test_a_last_step_that_leaves_no_finite_weights_stops_the_run(features: Dataset) -> None:
    """No later loss would show it, and the model would be evaluated and saved."""
    once = FEATURES.replace(stage1_epochs=1, stage2_epochs=0, max_steps_per_epoch=1, warmup_epochs=0.0)
    trainer = Trainer("plain", once.replace(lr=1e39), features)  # above the largest float32
    with pytest.raises(Diverged, match="a weight of the model is not finite; a lower --lr"):
        finish(trainer)


def test_displacements_stay_in_use_on_centered_features(features: Dataset) -> None:
    trainer = Trainer("gist", FEATURES.replace(stage1_epochs=3, stage2_epochs=3), features)
    records = finish(trainer)
    assert records[-1]["displacement_norms"] != records[3]["displacement_norms"]
    usage = trainer.evaluate()["slot_usage"]
    assert len(usage) == 5
    assert sum(usage) == pytest.approx(1, abs=1e-5)
    assert usage[0] < 0.99


@pytest.mark.parametrize("method", ["gist", "plain"])
def test_usage_is_logged_every_epoch(method: str, feature_file: Path, tmp_path: Path) -> None:
    """The slot usage is recorded from the second stage on, also for epochs without an evaluation."""
    args = (
        f"--recipe features --data {feature_file} --runs {tmp_path} --name r --methods {method} --device cpu"
    )
    options = "--classes-per-batch 3 --stage1-epochs 2 --stage2-epochs 3 --evaluate-every 3"
    assert main([*args.split(), *options.split()]) == 0
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["event"] == "epoch"]
    found = [len(line.get("slot_usage", [])) for line in epochs]
    if method == "gist":
        assert found == [0, 1, 5, 5, 5]
        assert ["accuracy" in line for line in epochs] == [False, True, False, False, True]
        assert all(sum(line["slot_usage"]) == pytest.approx(1) for line in epochs[1:])
    else:
        assert found == [0] * 5


def test_usage_on_a_thousand_samples(features: Dataset) -> None:
    many = dataclasses.replace(
        features, x_test=features.x_test.repeat(25, 1), y_test=features.y_test.repeat(25)
    )
    trainer = Trainer("gist", FEATURES.replace(num_displacements=2), many)
    finish(trainer)
    sample = dataclasses.replace(many, x_test=many.x_test[::2], y_test=many.y_test[::2])
    found = trainer.slot_usage()
    trainer.data = sample
    assert found["slot_usage"] == trainer.evaluate()["slot_usage"]
