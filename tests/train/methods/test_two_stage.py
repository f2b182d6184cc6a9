"""`TwoStageMethod`: displacements and transfer directions that start at or follow residual directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from train.config import Config
from train.data.dataset import Dataset
from train.methods.residual_directions import residual_directions
from train.model.model import load_model, save_model
from train.training.trainer import Trainer

from ..short_runs import FEATURES, finish

FOLLOWING: Config = FEATURES.replace(
    num_displacements=3,
    displacement_update="residuals",
    displacement_scale=0.6,
    transfer_directions=5,
    transfer_length=0.8,
)


def fitted(trainer: Trainer, num: int, start: torch.Tensor | None = None) -> torch.Tensor:
    counts = trainer.data.train_counts
    return residual_directions(*trainer.training_features(), counts, num, trainer.config.run.seed, start)


def test_displacements_start_from_residuals(features: Dataset) -> None:
    config = FOLLOWING.replace(
        displacement_update="gradient", displacement_init="residuals", displacement_scale=0.7
    )
    trainer = Trainer("gist", config, features)
    trainer.begin_stage(1)
    head = trainer.model.head
    norm = head.centers.norm(dim=1).mean()
    torch.testing.assert_close(head.displacements.norm(dim=1), (0.7 * norm).expand(3))
    again = Trainer("gist", config, features)
    again.begin_stage(1)
    assert torch.equal(again.model.head.displacements, head.displacements)


@pytest.mark.parametrize("update", ["gradient", "residuals"])
def test_displacements_follow_the_features_or_gradients(update: str, images: Dataset) -> None:
    config = FOLLOWING.replace(backbone="resnet8-half", displacement_update=update, lr=0.02)
    trainer = Trainer("gist", config, images)
    finish(trainer, steps=trainer.steps_per_epoch)  # of the first stage
    head = trainer.model.head
    before, directions = head.displacements.clone(), trainer.model.feature_transfer.directions.clone()
    trainer.step()
    assert torch.equal(head.displacements, before) == (update == "residuals")
    assert torch.equal(trainer.model.feature_transfer.directions, directions), (
        "they stay as they are within an epoch"
    )
    while trainer.step_of_epoch < trainer.steps_per_epoch:
        trainer.step()
    trained = head.displacements.clone()
    trainer.end_epoch()
    torch.testing.assert_close(trainer.model.feature_transfer.directions, fitted(trainer, 5, directions))
    if update == "gradient":
        assert torch.equal(head.displacements, trained)
        return
    length = 0.6 * head.centers.detach().norm(dim=1).mean()
    expected = length * fitted(trainer, 3, before)
    torch.testing.assert_close(head.displacements, expected)
    cosines = F.cosine_similarity(head.displacements[:, None], before, dim=2)
    assert (cosines.argmax(1) == torch.arange(3)).all(), "each follows its own cluster"


def test_a_step_is_of_displaced_features_in_the_second_stage_alone(features: Dataset) -> None:
    plain = FOLLOWING.replace(transfer_directions=0)
    for stage in (0, 1):
        losses = []
        for config in (FOLLOWING, plain):
            trainer = Trainer("gist", config, features)
            trainer.begin_stage(stage)
            (part,) = trainer.batches.next()
            assert 0 <= part.transfer_uniforms.min() < 0.2 < 0.8 < part.transfer_uniforms.max() < 1
            losses.append(trainer.training_model(part.x, part.y, part.num_balanced, part.transfer_uniforms))
        displaced_loss, loss = losses
        assert displaced_loss["loss_random"].equal(loss["loss_random"])
        assert displaced_loss["loss_balanced"].equal(loss["loss_balanced"]) == (stage == 0)
    for name in ("cos-gist", "gist-combined", "cos-cs-cb"):
        trainer = Trainer(name, FOLLOWING, features)
        trainer.begin_stage(1)
        assert trainer.model.feature_transfer is None
        assert not trainer.model.head.displacements.requires_grad  # there are none, or they are found


@pytest.mark.parametrize("name", ["gist", "gist-rotation"])
def test_runs_that_follow_resume_exactly(name: str, images: Dataset) -> None:
    config = FOLLOWING.replace(backbone="resnet8-half")
    whole = Trainer(name, config, images)
    finish(whole)
    for steps in (7, 2 * whole.steps_per_epoch + 2):  # before the displacements have moved, and after
        half = Trainer(name, config, images)
        finish(half, steps=steps)
        rest = Trainer(name, config, images)
        rest.load_state_dict(half.state_dict())
        finish(rest)
        for key, value in whole.state_dict()["model"].items():
            assert torch.equal(rest.state_dict()["model"][key], value), key


def test_a_written_model_has_displacements_and_nothing_that_training_needed(
    features: Dataset, tmp_path: Path
) -> None:
    trainer = Trainer("gist", FOLLOWING, features)
    finish(trainer)
    save_model(tmp_path / "model", trainer.model, features.class_names)
    model, _ = load_model(tmp_path / "model")
    assert not any("transfer" in name for name in model.state_dict())
    assert model.head.num_displacements == 3
    x = features.x_test[:9]
    trainer.model.eval()
    torch.testing.assert_close(model(x), trainer.model(x), rtol=0, atol=0)
