"""The structure that classes share: where it is found, how it follows the features, what it displaces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from train.config import Config
from train.data.dataset import Dataset
from train.methods.residual_directions import TRANSFER, displaced, residual_directions
from train.model.model import load_model, save_model
from train.training.trainer import Training

from .test_engine import FEATURES, finish

FOLLOWING: Config = FEATURES.replace(
    num_displacements=3,
    displacement_update="residuals",
    displacement_scale=0.6,
    transfer_directions=5,
    transfer_length=0.8,
)


def fitted(training: Training, num: int, start: torch.Tensor | None = None) -> torch.Tensor:
    counts = training.data.train_counts
    return residual_directions(*training._sample(), counts, num, training.config.run.seed, start)


def test_displacements_start_from_residuals(features: Dataset) -> None:
    config = FOLLOWING.replace(
        displacement_update="gradient", displacement_init="residuals", displacement_scale=0.7
    )
    training = Training("gist", config, features)
    training.begin_stage(1)
    head = training.model.head
    norm = head.centers.norm(dim=1).mean()
    torch.testing.assert_close(head.displacements.norm(dim=1), (0.7 * norm).expand(3))
    again = Training("gist", config, features)
    again.begin_stage(1)
    assert torch.equal(again.model.head.displacements, head.displacements)


def test_residual_directions_are_those_in_which_classes_spread(seed: int) -> None:
    """Classes whose samples lie off their mean in two opposite shared directions give these directions."""
    spread = F.normalize(torch.randn(32), dim=0)
    means = F.normalize(torch.randn(6, 32), dim=1)
    means = F.normalize(means - (means @ spread)[:, None] * spread, dim=1)
    counts = torch.tensor([200, 200, 200, 200, 5, 5])
    y = torch.repeat_interleave(torch.arange(6), counts)
    sign = torch.randint(2, (len(y), 1)) * 2.0 - 1
    x = 3 * (means[y] + 0.5 * sign * spread + 0.01 * torch.randn(len(y), 32))
    directions = residual_directions(x, y, counts, 2, seed=0)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2))
    cosines = directions @ spread
    assert cosines.abs().min() > 0.95
    assert cosines[0] * cosines[1] < 0
    few = residual_directions(x[-10:], torch.zeros(10, dtype=torch.int64), torch.tensor([10]), 2, 0)
    assert few.shape == (2, 32)
    with pytest.raises(ValueError, match=r"--transfer-directions: expected at most 10, .* got 11"):
        residual_directions(x[-10:], torch.zeros(10, dtype=torch.int64), torch.tensor([10]), 11, 0)


@pytest.mark.parametrize("update", ["gradient", "residuals"])
def test_displacements_follow_the_features_or_gradients(update: str, images: Dataset) -> None:
    config = FOLLOWING.replace(backbone="resnet8-half", displacement_update=update, lr=0.02)
    training = Training("gist", config, images)
    finish(training, steps=training.steps_per_epoch)  # of the first stage
    head = training.model.head
    before, directions = head.displacements.clone(), getattr(head, TRANSFER).clone()
    training.step()
    assert torch.equal(head.displacements, before) == (update == "residuals")
    assert torch.equal(getattr(head, TRANSFER), directions), "they stay as they are within an epoch"
    while training.step_of_epoch < training.steps_per_epoch:
        training.step()
    trained = head.displacements.clone()
    training.end_epoch()
    torch.testing.assert_close(getattr(head, TRANSFER), fitted(training, 5, directions))
    if update == "gradient":
        assert torch.equal(head.displacements, trained)
        return
    length = 0.6 * head.centers.detach().norm(dim=1).mean()
    expected = length * fitted(training, 3, before)
    torch.testing.assert_close(head.displacements, expected)
    cosines = F.cosine_similarity(head.displacements[:, None], before, dim=2)
    assert (cosines.argmax(1) == torch.arange(3)).all(), "each follows its own cluster"


def test_the_balanced_stream_alone_is_displaced(seed: int) -> None:
    directions = F.normalize(torch.randn(7, 33), dim=1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        features = (3 * torch.randn(50, 33)).to(dtype)
        uniforms = torch.rand(50)
        uniforms[:2] = torch.tensor([0.0, 1 - 2**-12])
        found = displaced(features, directions.to(features.dtype), 0.8, 30, uniforms)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wide = features.to(found.dtype)
        assert torch.equal(found[30:], wide[30:])
        moved = found[:30] - wide[:30] / wide[:30].norm(dim=1, keepdim=True)
        nearest = F.cosine_similarity(moved[:, None], directions, dim=2).argmax(1)
        assert torch.equal(nearest, (7 * uniforms[:30]).long())
        torch.testing.assert_close(moved, 0.8 * directions[nearest].to(moved), atol=5e-3, rtol=0)
        assert nearest[:2].tolist() == [0, 6]


def test_a_step_is_of_displaced_features_in_the_second_stage_alone(features: Dataset) -> None:
    plain = FOLLOWING.replace(transfer_directions=0)
    for stage in (0, 1):
        losses = []
        for config in (FOLLOWING, plain):
            training = Training("gist", config, features)
            training.begin_stage(stage)
            (part,) = training.batches.next()
            assert 0 <= part.transfer_uniforms.min() < 0.2 < 0.8 < part.transfer_uniforms.max() < 1
            losses.append(training.losses(part.x, part.y, part.num_balanced, part.transfer_uniforms))
        displaced_loss, loss = losses
        assert displaced_loss["loss_random"].equal(loss["loss_random"])
        assert displaced_loss["loss_balanced"].equal(loss["loss_balanced"]) == (stage == 0)
    for name in ("cos-gist", "gist-combined", "cos-cs-cb"):
        training = Training(name, FOLLOWING, features)
        training.begin_stage(1)
        assert not hasattr(training.model.head, TRANSFER)
        assert not training.model.head.displacements.requires_grad  # there are none, or they are found


@pytest.mark.parametrize("name", ["gist", "gist-rotation"])
def test_runs_that_follow_resume_exactly(name: str, images: Dataset) -> None:
    config = FOLLOWING.replace(backbone="resnet8-half")
    whole = Training(name, config, images)
    finish(whole)
    for steps in (7, 2 * whole.steps_per_epoch + 2):  # before the displacements have moved, and after
        half = Training(name, config, images)
        finish(half, steps=steps)
        rest = Training(name, config, images)
        rest.load_state_dict(half.state_dict())
        finish(rest)
        for key, value in whole.state_dict()["model"].items():
            assert torch.equal(rest.state_dict()["model"][key], value), key


def test_a_written_model_has_displacements_and_nothing_that_training_needed(
    features: Dataset, tmp_path: Path
) -> None:
    training = Training("gist", FOLLOWING, features)
    finish(training)
    save_model(tmp_path / "model", training.model, features.class_names)
    model, _ = load_model(tmp_path / "model")
    assert not any("transfer" in name for name in model.state_dict())
    assert model.head.num_displacements == 3
    x = features.x_test[:9]
    training.model.eval()
    torch.testing.assert_close(model(x), training.model(x), rtol=0, atol=0)
