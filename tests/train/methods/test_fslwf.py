"""FSLwF: the weight generator, its episodes and the weights of the final head, against loops in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from train.config import Config
from train.data.dataset import Dataset
from train.methods.fslwf import Fslwf, WeightGenerator, base_classes
from train.training.trainer import Trainer

from ..short_runs import FEATURES, finish

CONFIG: Config = FEATURES
D = 12  # of the test data


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def published_weight(
    generator: dict[str, Tensor], exemplars: Tensor, base: Tensor, attended: list[int]
) -> Tensor:
    """Return the weight of a class, with attention over the `attended` rows of `base`."""
    average = sum(unit(f) for f in exemplars) / len(exemplars)
    attention = torch.zeros_like(average)
    for f in exemplars:
        query = unit(generator["query.weight"] @ unit(f) + generator["query.bias"])
        scores = torch.stack(
            [generator["attention_tau"][0] * query @ unit(generator["keys"][b]) for b in attended]
        )
        shares = scores.exp() / scores.exp().sum()
        attention = attention + sum(a * unit(base[b]) for a, b in zip(shares, attended, strict=True)) / len(
            exemplars
        )
    return generator["average_scale"] * average + generator["attention_scale"] * attention


def published_loss(tau: Tensor, queries: Tensor, labels: list[int], weights: list[Tensor]) -> Tensor:
    """Return the mean cross-entropy of a cosine classifier."""
    total = torch.zeros_like(tau)
    for f, y in zip(queries, labels, strict=True):
        scores = torch.stack([tau * unit(f) @ unit(w) for w in weights])
        total = total + scores.exp().sum().log() - scores[y]
    return total / len(queries)


def randomized(generator: WeightGenerator) -> WeightGenerator:
    """Return the generator with values that do not cancel: its start is nearly the identity."""
    generator.double()
    with torch.no_grad():
        for parameter in (generator.query.weight, generator.query.bias, generator.keys):
            parameter.normal_()
        for parameter in (generator.average_scale, generator.attention_scale):
            parameter.uniform_(0.5, 1.5)
        generator.attention_tau.fill_(3.0)
    return generator


def copies(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def test_an_episode_is_the_published_loss_with_its_gradients(features: Dataset, seed: int) -> None:
    trainer = Trainer("fslwf", CONFIG, features)
    trainer.begin_stage(1)
    method, model = trainer.method, trainer.model.double()
    assert isinstance(method, Fslwf)
    assert isinstance(model.auxiliary, WeightGenerator)
    randomized(model.auxiliary)
    base = method.base.tolist()
    x, y = torch.randn(20, D).double(), method.base[torch.randperm(20) % len(base)]

    torch.manual_seed(seed)
    loss = method.training_losses(model, x, x, y, len(x))["loss_balanced"]
    loss.backward()

    torch.manual_seed(seed)
    novel, exemplar = method._episode(method.position[y])
    generator = copies(model.auxiliary)
    head = copies(model.head)
    attended = [b for b in range(len(base)) if not novel[b]]
    assert len(attended) < len(base)
    weights = [head["centers"][k] for k in base]
    originals = torch.stack(weights)
    for b in range(len(base)):
        own = (y == base[b]).nonzero().flatten().tolist()
        expected = own[: len(own) // 2] if novel[b] else []
        assert [i for i in own if exemplar[i]] == expected
        assert not novel[b] or len(own) > 1
        if expected:
            weights[b] = published_weight(generator, x[expected], originals, attended)
    queries = (~exemplar).nonzero().flatten()
    labels = [base.index(k) for k in y[queries].tolist()]
    tau = torch.nn.functional.softplus(head["raw_tau"])[0]
    expected_loss = published_loss(tau, x[queries], labels, weights)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
    expected_loss.backward()
    for module, theirs in ((model.auxiliary, generator), (model.head, head)):
        for name, parameter in module.named_parameters():
            if parameter.numel():
                torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-6, atol=1e-8, msg=name)


def test_the_first_stage_is_a_cosine_classifier_of_the_base_classes(features: Dataset, seed: int) -> None:
    trainer = Trainer("fslwf", CONFIG, features)
    method, model = trainer.method, trainer.model.double()
    assert isinstance(method, Fslwf)
    base = method.base.tolist()
    x, y = torch.randn(20, D).double(), method.base[torch.randperm(20) % len(base)]
    loss = method.training_losses(model, x, x, y, 0)["loss_random"]
    head = copies(model.head)
    tau = torch.nn.functional.softplus(head["raw_tau"])[0]
    labels = [base.index(k) for k in y.tolist()]
    torch.testing.assert_close(loss, published_loss(tau, x, labels, [head["centers"][k] for k in base]))


@pytest.mark.parametrize("stage", [0, 1])
def test_the_weights_of_other_classes_come_from_all_their_samples(stage: int, features: Dataset) -> None:
    trainer = Trainer("fslwf", CONFIG, features)
    method, model = trainer.method, trainer.model
    assert isinstance(method, Fslwf)
    if stage:
        trainer.begin_stage(1)
        assert isinstance(model.auxiliary, WeightGenerator)
        randomized(model.auxiliary).float()
    before = model.head.centers.detach().clone().double()
    method.end_epoch(model, trainer.stage_data)
    centers = model.head.centers.detach().double()
    model.eval()
    x, base = model.features(features.x_train).double(), method.base.tolist()
    assert torch.equal(centers[base], before[base])
    assert sorted(base + method.novel.tolist()) == list(range(features.num_classes))
    for k in method.novel.tolist():
        exemplars = x[features.y_train == k]
        expected = sum(unit(f) for f in exemplars) / len(exemplars)
        if stage:
            generator = {name: p.detach().double() for name, p in model.auxiliary.named_parameters()}
            expected = published_weight(generator, exemplars, centers[base], list(range(len(base))))
        torch.testing.assert_close(centers[k], expected, rtol=1e-4, atol=1e-5)


def test_base_classes_are_the_many_shot_ones_and_at_least_three() -> None:
    counts = torch.tensor([500, 300, 101, 100, 20, 5])
    assert base_classes(counts, "standard").tolist() == [True, True, True, False, False, False]
    assert base_classes(counts, "paper_code").tolist() == [True, True, True, True, False, False]
    assert base_classes(torch.tensor([7, 40, 9, 8]), "standard").tolist() == [False, True, True, True]
    assert base_classes(torch.tensor([9, 9, 9, 9, 1]), "standard").tolist() == [True, True, True, True, False]
    assert base_classes(torch.tensor([9, 2]), "standard").all()


def test_without_a_second_stage_the_other_classes_have_their_mean_features(features: Dataset) -> None:
    trainer = Trainer("fslwf", CONFIG.replace(stage2_epochs=0), features)
    finish(trainer)
    assert trainer.model.auxiliary is None
    assert trainer.evaluate()["accuracy"]["few"] > 0.5


def test_a_data_set_of_base_classes_alone_trains(features: Dataset) -> None:
    kept, tested = features.y_train < 3, features.y_test < 3
    data = dataclasses.replace(
        features,
        x_train=features.x_train[kept],
        y_train=features.y_train[kept],
        x_test=features.x_test[tested],
        y_test=features.y_test[tested],
        train_counts=features.train_counts[:3],
        class_names=features.class_names[:3],
        class_labels=features.class_labels[:3],
    )
    trainer = Trainer("fslwf", CONFIG, data)
    finish(trainer)
    assert trainer.evaluate()["accuracy"]["overall"] > 0.5
