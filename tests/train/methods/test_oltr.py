"""OLTR: its head, its loss and its start, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.config import Config
from train.data.dataset import Dataset
from train.methods.oltr import CENTROID_WEIGHT, centroid_loss, class_means
from train.model.memory_head import MemoryHead
from train.training.trainer import Trainer

from ..short_runs import FEATURES, finish

CONFIG: Config = FEATURES
B, K, D = 12, 5, 6


def published_scores(head: dict[str, Tensor], features: Tensor) -> Tensor:
    """Return the scores of a `MemoryHead` with these parameters, sample by sample and class by class."""
    rows = []
    for f in features:
        reach = 10 / min((f - c).square().sum().sqrt() for c in head["centroids"])
        answer = (head["hallucinator.weight"] @ f + head["hallucinator.bias"]).exp()
        memory = sum(a / answer.sum() * c for a, c in zip(answer, head["centroids"], strict=True))
        selector = torch.tanh(head["selector.weight"] @ f + head["selector.bias"])
        x = reach * (f + selector * memory)
        norm = x.square().sum().sqrt()
        squashed = norm / (1 + norm) * (x / norm)
        rows.append(torch.stack([16 * squashed @ (w / w.square().sum().sqrt()) for w in head["weight"]]))
    return torch.stack(rows)


def published_centroid_terms(features: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attracting and the repelling term."""
    attract, others = features.new_zeros(()), features.new_zeros(())
    for f, y in zip(features, labels.tolist(), strict=True):
        attract = attract + (f - centroids[y]).square().sum() / (2 * len(labels))
        for k, c in enumerate(centroids):
            if k != y:
                others = others + (f - c).square().sum() / (len(labels) * len(centroids))
    return attract, 0.01 * torch.clamp(10 - others, min=0)


def float64_head() -> MemoryHead:
    head = MemoryHead(D, K, backend="reference").double()
    torch.nn.init.normal_(head.centroids)
    return head


def test_scores_and_their_gradients(seed: int) -> None:
    head, x, direction = float64_head(), torch.randn(B, D).double(), torch.randn(B, K).double()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    copies = {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}
    scores, expected = head(inputs[0]), published_scores(copies, inputs[1])
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    (scores * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-7)
    assert head.centroids.grad is None  # the classification loss does not train the memory
    for name, parameter in head.named_parameters():
        if name != "centroids":
            torch.testing.assert_close(parameter.grad, copies[name].grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("spread", [0.3, 3.0])  # with and without repulsion
def test_the_centroid_loss_and_its_gradients(spread: float, seed: int) -> None:
    x, c = spread * torch.randn(B, D).double(), spread * torch.randn(K, D).double()
    y = torch.randint(K, (B,))
    ours, theirs = ([t.clone().requires_grad_() for t in (x, c)] for _ in range(2))
    loss = centroid_loss(ours[0], y, ours[1])
    attract, repel = published_centroid_terms(theirs[0], y, theirs[1])
    assert (repel > 0) == (spread < 1)
    torch.testing.assert_close(loss, attract + repel, rtol=1e-12, atol=1e-12)
    (CENTROID_WEIGHT * loss).backward()
    (CENTROID_WEIGHT * (attract + repel)).backward()
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-10, atol=1e-12)
    theirs[1].grad = None
    if spread < 1:
        (CENTROID_WEIGHT * published_centroid_terms(theirs[0], y, theirs[1])[1]).backward()
    expected = torch.zeros_like(c) if theirs[1].grad is None else theirs[1].grad
    for k in range(K):  # independent of the weight of the loss, as in the authors' code
        own = (y == k).nonzero().flatten()
        expected[k] += sum((c[k] - x[i] for i in own), torch.zeros(D)) / (1 + len(own)) / B
    torch.testing.assert_close(ours[1].grad, expected, rtol=1e-10, atol=1e-12)


def test_a_feature_at_its_centroid_has_finite_scores_and_gradients(seed: int) -> None:
    head = MemoryHead(D, K)
    torch.nn.init.normal_(head.centroids)
    x = head.centroids.detach()[:2].clone().requires_grad_()
    scores = head(x)
    assert scores.isfinite().all()
    scores.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def test_the_second_stage_starts_with_class_means_and_the_first_classifier(features: Dataset) -> None:
    trainer = Trainer("oltr", CONFIG, features)
    assert isinstance(trainer.model.head, torch.nn.Linear)
    linear = trainer.model.head.weight.detach().clone()
    trainer.begin_stage(1)
    head = trainer.model.head
    assert isinstance(head, MemoryHead)
    assert torch.equal(head.hallucinator.weight, linear)
    trainer.model.eval()
    x = trainer.model.features(features.x_train).double()
    means = torch.stack([x[features.y_train == k].mean(0) for k in range(features.num_classes)])
    torch.testing.assert_close(head.centroids.double(), means, rtol=1e-5, atol=1e-6)


def test_the_mean_of_a_class_without_samples_is_zero() -> None:
    means = class_means(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2, 2]), 4)
    assert means.tolist() == [[0, 0], [0, 0], [2, 3], [0, 0]]


def test_the_head_can_be_exported(seed: int) -> None:
    head, x = MemoryHead(D, K).eval(), torch.randn(B, D)
    torch.nn.init.normal_(head.centroids)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(head, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(2 * B, D)
    torch.testing.assert_close(exported.module()(more), head(more))


def test_no_memory_where_no_epoch_would_train_it(features: Dataset) -> None:
    trainer = Trainer("oltr", CONFIG.replace(stage2_epochs=0), features)
    finish(trainer)
    assert isinstance(trainer.model.head, torch.nn.Linear)
