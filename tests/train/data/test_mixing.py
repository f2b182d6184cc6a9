"""Mixup and CutMix: the samples, their labels, the pairs, and the losses."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.checks import problems_of
from train.config import Config, ConfigError
from train.data.dataset import Dataset
from train.data.stream.mixing import Mixing, partners_of
from train.methods import METHODS
from train.training.cuda_graph import GraphedSteps
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, check_resuming, equal, finish

MIXED = [name for name, make in METHODS.items() if make(FEATURES, torch.tensor([9, 5, 3, 2, 1])).mixes_labels]


def numbers(share: float, cut: bool, x: float = 0.0, y: float = 0.0) -> Tensor:
    return torch.tensor([share, cut, x, y], dtype=torch.float64)


def test_mixup_adds_two_images_and_cutmix_takes_each_pixel_from_one(seed: int) -> None:
    images, y = torch.randint(0, 256, (6, 3, 8, 10), dtype=torch.uint8), torch.arange(6)
    partners, both = torch.randperm(6), Mixing(0.4, 1.0)
    for mixing in (Mixing(0.4), both):
        x, labels = mixing(images, y, partners, numbers(0.3, False))
        torch.testing.assert_close(x, 0.3 * images.float() + 0.7 * images[partners].float())
        assert torch.equal(labels.labels, partners)
        assert float(labels.share) == 0.3
    for mixing in (Mixing(0, 1.0), both):
        x, labels = mixing(images, y, partners, numbers(0.75, True, 0.5, 0.5))
        cut = images.clone()
        cut[:, :, 2:6, 3:7] = images[partners][
            :, :, 2:6, 3:7
        ]  # half the side, 4 × 5 pixels, rounded to 4 × 4
        assert torch.equal(x, cut.float())
        assert float(labels.share) == 1 - 16 / 80
        x, labels = mixing(images, y, partners, numbers(0.75, True, 0.0, 0.99))
        cut = images.clone()
        cut[:, :, 5:, :2] = images[partners][:, :, 5:, :2]  # a box that the corner cuts
        assert torch.equal(x, cut.float())
        assert float(labels.share) == 1 - 6 / 80
        for share in (0.0, 1.0):  # a box of all pixels at most, or of none
            x, labels = mixing(images, y, partners, numbers(share, True, 0.5, 0.5))
            assert float(labels.share) == share
            assert torch.equal(x, (images if share else images[partners]).float())


@pytest.mark.parametrize("options", [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_the_drawn_numbers(options: tuple[float, float], seed: int) -> None:
    mixing = Mixing(*options)
    drawn = torch.stack([mixing.draw(torch.Generator().manual_seed(seed + i)) for i in range(2000)])
    again = mixing.draw(torch.Generator().manual_seed(seed))
    assert torch.equal(drawn[0], again)
    share, cut = drawn[:, 0], drawn[:, 1]
    assert share.mean() == pytest.approx(0.5, abs=0.05)
    assert share.var() == pytest.approx(1 / 8, abs=0.012)  # 1 / (4 (2α + 1))
    expected = {(0.5, 0.0): 0.0, (0.0, 0.5): 1.0, (0.5, 0.5): 0.5}[options]
    assert cut.mean() == pytest.approx(expected, abs=0.06)
    assert drawn[:, 2:].mean() == pytest.approx(0.5, abs=0.05)
    for alpha in (1e-300, 1e-3, 1e300):
        value = Mixing(alpha).draw(torch.Generator().manual_seed(seed))[0]
        assert 0 <= value <= 1


def test_the_transforms_of_torchvision_are_the_same(seed: int) -> None:
    """torchvision is told the same numbers by its own generator; its partners are the samples before."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, y, k = torch.rand(5, 3, 12, 9), torch.tensor([0, 3, 1, 1, 2]), 4
    partners = torch.arange(5).roll(1)
    for i in range(20):
        for cut, transform in ((False, v2.MixUp(alpha=0.7, num_classes=k)), (True, v2.CutMix(num_classes=k))):
            torch.manual_seed(seed + i)
            share = float(transform._dist.sample(()))
            x, row = int(torch.randint(9, (1,))), int(torch.randint(12, (1,)))
            ours, labels = Mixing(0.7, 1.0)(
                images, y, partners, numbers(share, cut, (x + 0.5) / 9, (row + 0.5) / 12)
            )
            torch.manual_seed(seed + i)
            theirs, targets = transform(images, y)
            torch.testing.assert_close(ours, theirs)
            soft = labels.share * F.one_hot(y, k) + (1 - labels.share) * F.one_hot(labels.labels, k)
            torch.testing.assert_close(soft.float(), targets)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_pairs_stay_in_their_stream_and_labels_are_those_of_the_samples(
    accumulate: int, features: Dataset
) -> None:
    """A sample is its class as a one-hot vector, so that a mixed sample is the soft label that it should have."""
    classes = F.one_hot(features.y_train, features.num_classes).float()
    data = dataclasses.replace(features, x_train=classes)
    trainer = Trainer("gist", FEATURES.replace(mixup=1.0, accumulate=accumulate), data)
    moved = 0
    for _ in range(4):
        for batch in trainer.batches.next():
            assert batch.mixed is not None
            other = F.one_hot(batch.mixed.labels, features.num_classes)
            own = F.one_hot(batch.y, features.num_classes)
            soft = (batch.mixed.share * own + (1 - batch.mixed.share) * other).float()
            torch.testing.assert_close(batch.x, soft)
            for mine, theirs in zip(
                batch.y.tensor_split([batch.num_balanced]),
                batch.mixed.labels.tensor_split([batch.num_balanced]),
                strict=True,
            ):
                assert len(mine) > 1
                assert torch.equal(mine.sort().values, theirs.sort().values)
            moved += int((batch.y != batch.mixed.labels).sum())
    assert moved > 50
    assert sorted(partners_of(torch.rand(9), 4)[:4].tolist()) == [0, 1, 2, 3]
    assert partners_of(torch.rand(1), 0).tolist() == [0]


@pytest.mark.parametrize("name", MIXED)
def test_each_loss_is_the_mean_over_both_labels(name: str, features: Dataset) -> None:
    """A loss is linear in the shares, 1 and 0 of which are the losses of the labels alone."""
    balancing = "prior" if name == "gist-mlp" else "sampling"  # shared streams too
    trainer = Trainer(name, FEATURES.replace(mixup=1.0, crt_epochs=1, balancing=balancing), features)
    (batch,) = trainer.batches.next()
    assert batch.mixed is not None
    given = batch.num_balanced, batch.transfer_uniforms
    trainer.model.eval()  # the statistics of the features do not move
    with torch.no_grad():
        own = trainer.training_model(batch.x, batch.y, *given)
        other = trainer.training_model(batch.x, batch.mixed.labels, *given)
        mixed = trainer.training_model(batch.x, batch.y, *given, batch.mixed)
    assert own.keys() == mixed.keys()
    for stream, loss in mixed.items():
        share = float(batch.mixed.share)
        torch.testing.assert_close(loss, share * own[stream] + (1 - share) * other[stream])
        assert loss != own[stream]


def test_the_loss_of_plain_is_that_of_soft_labels(images: Dataset) -> None:
    trainer = Trainer("plain", IMAGES.replace(cutmix=1.0), images)
    (batch,) = trainer.batches.next()
    assert batch.mixed is not None
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(batch.x)
        loss = trainer.training_model(batch.x, batch.y, 0, batch.transfer_uniforms, batch.mixed)
    share, k = batch.mixed.share, images.num_classes
    soft = share * F.one_hot(batch.y, k) + (1 - share) * F.one_hot(batch.mixed.labels, k)
    torch.testing.assert_close(loss["loss_random"], F.cross_entropy(logits, soft.float()))


@pytest.mark.parametrize("method", ["gist", "ldam-drw"])
def test_a_resumed_run_goes_on_to_the_same_bits(method: str, images: Dataset, seed: int) -> None:
    config = IMAGES.replace(mixup=0.3, cutmix=0.7, stage2_epochs=1)
    check_resuming(method, config, images, random.Random(seed).randrange(1, 8))


def test_steps_with_tensors_at_fixed_addresses_are_the_same(images: Dataset) -> None:
    """A CUDA graph reads new pairs and numbers from the tensors of its first step."""
    config = IMAGES.replace(mixup=0.3, cutmix=0.7, batch_size=20, accumulate=2, stage2_epochs=0)
    eager, held = Trainer("gist", config, images), Trainer("gist", config, images)
    held.graphed = GraphedSteps(held, lambda step: step)
    assert finish(held) == finish(eager)
    assert equal(held.state_dict(), eager.state_dict())


def test_methods_with_other_losses_and_features_are_refused(features: Dataset) -> None:
    config = FEATURES.replace(mixup=0.2, methods=("gist", "oltr"))
    assert any("with --mixup, got oltr" in str(problem) for problem in problems_of(config, features))
    assert not list(problems_of(config.replace(methods=tuple(MIXED)), features))
    config = FEATURES.replace(cutmix=1.0, methods=("lfme",))
    problems = list(map(str, problems_of(config, features)))
    assert any("with --cutmix, got lfme" in problem for problem in problems)
    assert any("--cutmix: expected 0 for features" in problem for problem in problems)
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=r"--mixup: expected .*at least 0, got"):
            Config().replace(mixup=value)
