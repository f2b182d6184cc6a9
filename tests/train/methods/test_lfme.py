"""LFME: the losses against an independent float64 implementation, the schedules, the stages, and resuming."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train import footprint
from train.data.dataset import Dataset
from train.methods.experts import Expert, ExpertHead, Experts, distillation_loss, distillation_weight
from train.model import load_model, save_model
from train.trained import describe, load_trained
from train.training.input import image_passes
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, equal, finish

GROUPS = torch.tensor(
    [[1, 0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0]], dtype=torch.bool
)  # class 2, 6: no expert


def softmax(row: list[float]) -> list[float]:
    exp = [math.exp(x - max(row)) for x in row]
    return [x / sum(exp) for x in exp]


def loss_by_definition(
    z: Tensor, labels: Tensor, teachers: list[Tensor], a: list[float], scale: list[float]
) -> tuple[float, Tensor]:
    """Return the loss of logits `z` and its gradient, in float64, sample by sample."""
    total, gradient, y = 0.0, torch.zeros(z.shape, dtype=torch.float64), labels.tolist()
    for i, row in enumerate(z.double().tolist()):
        scaled = [scale[i] * x for x in row]
        p = softmax(scaled)
        total -= math.log(p[y[i]])
        d_scaled = [p_k - (k == y[i]) for k, p_k in enumerate(p)]
        for weight, group, teacher in zip(a, GROUPS, teachers, strict=True):
            classes = [k for k in range(len(group)) if group[k]]
            q = softmax([scaled[k] / 2 for k in classes])
            t = softmax([x / 2 for x in teacher[i].tolist()])
            total += weight * sum(t_k * math.log(t_k / q_k) for t_k, q_k in zip(t, q, strict=True))
            for k, t_k, q_k in zip(classes, t, q, strict=True):
                d_scaled[k] += weight * (q_k - t_k) / 2
        gradient[i] = torch.tensor(d_scaled, dtype=torch.float64) * scale[i]
    return total / len(z), gradient / len(z)


def random_experts(features: int = 5) -> Experts:
    """Return two experts without a backbone, with random weights and confidences of training samples."""
    experts = Experts(torch.rand(GROUPS.shape[1]), len(GROUPS))
    for group in GROUPS:
        head = ExpertHead(features, group)
        x, y = torch.randn(200, features), torch.randint(GROUPS.shape[1], (200,))
        head.set_confidences(x, y, 7)
        experts.experts.append(Expert(nn.Identity(), nn.Identity(), head))
    return experts


def test_the_students_loss_and_its_gradient_are_those_of_the_definition() -> None:
    experts = random_experts()
    a = torch.rand(2)
    experts.weights.copy_(a)
    experts.progress.fill_(torch.rand(()).item() * 2)
    x, y = torch.randn(40, 5), torch.randint(GROUPS.shape[1], (40,))
    teachers = [logits.double() for logits in experts.logits(x)]
    scale = []
    for i, label in enumerate(y.tolist()):
        start = 1.0
        for expert, group, logits in zip(experts.experts, GROUPS, teachers, strict=True):
            if group[label]:
                position = int(group[:label].sum())
                least, most = float(expert.head.least[position]), float(expert.head.most[position])
                p = softmax(logits[i].tolist())[position]
                easiness = min(max((p - least) / (most - least), 0.0), 1.0)
                floor = float(experts.floors[label])
                start = floor + (1 - floor) * easiness
        scale.append(start + (1 - start) * float(experts.progress))
    torch.testing.assert_close(
        experts.instance_weights(teachers, y), torch.tensor(scale, dtype=torch.float64), atol=1e-6, rtol=1e-6
    )
    z = 3 * torch.randn(40, GROUPS.shape[1], dtype=torch.float64)
    z.requires_grad_()
    expected, gradient = loss_by_definition(z, y, teachers, a.tolist(), scale)
    loss = experts.loss(z, teachers, y)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(z.grad, gradient, atol=1e-6, rtol=1e-5)


def test_the_distillation_loss_is_the_divergence_at_temperature_2() -> None:
    student = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    teacher = 4 * torch.randn(30, 6, dtype=torch.float64)
    loss = distillation_loss(student, teacher)
    loss.backward()
    q, t = (student.detach() / 2).softmax(1), (teacher / 2).softmax(1)
    torch.testing.assert_close(loss.detach(), (t * (t / q).log()).sum(1).mean())
    torch.testing.assert_close(student.grad, (q - t) / 2 / 30)
    assert distillation_loss(teacher, teacher + 1).item() == pytest.approx(0, abs=1e-12)


def test_distillation_fades_from_a_threshold_to_the_experts_accuracy() -> None:
    for expert in (0.1, 0.55, 1.0):
        for share, weight in ((0, 1), (0.2, 1), (0.3, 1), (0.65, 0.5), (0.825, 0.25), (1, 0), (1.4, 0)):
            student = torch.tensor(share * expert)
            found = distillation_weight(student, torch.tensor(expert)).item()
            assert found == pytest.approx(weight, abs=1e-5), (expert, share)
    for student in (0.0, 0.5):
        assert distillation_weight(torch.tensor(student), torch.tensor(0.0)) == 0


def test_an_expert_scores_its_group_alone() -> None:
    group = GROUPS[0]
    head, x = ExpertHead(5, group), torch.randn(20, 5)
    y = torch.tensor([0, 3, 5])[torch.randint(3, (20,))]
    scores = head(x)
    assert (scores[:, ~group] == -math.inf).all()
    torch.testing.assert_close(scores[:, group], F.linear(x, head.weight, head.bias))
    torch.testing.assert_close(head.loss(x, y), F.cross_entropy(scores, y))


def test_the_curriculum_begins_with_the_samples_of_which_the_expert_is_sure() -> None:
    group = GROUPS[1]  # classes 1 and 4
    head = ExpertHead(3, group)
    x, y = torch.randn(50, 3), torch.tensor([1] * 40 + [4] + [0] * 9)
    head.set_confidences(x, y, 16)
    easiness = head.easiness(head.logits(x), y)
    p = head.logits(x).softmax(1)[:40, 0]
    torch.testing.assert_close(easiness[:40], (p - p.min()) / (p.max() - p.min()), atol=1e-5, rtol=1e-5)
    assert easiness[40] == 1  # a single sample
    assert head.easiness(torch.tensor([[-9.0, 9.0], [9.0, -9.0]]), torch.tensor([1, 1])).tolist() == [0, 1]


def balanced_groups(data: Dataset) -> Dataset:
    """Return a dataset with two classes in each of the three groups: two of 110, two of 40 and two of 8 samples."""
    counts = (110, 110, 40, 40, 8, 8)
    y = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    y_test = torch.arange(6).repeat(10)

    def samples(labels: Tensor) -> Tensor:
        noise = torch.rand(len(labels), *data.sample_shape)
        if data.is_images:
            return (noise * 100 + 25 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
        return noise + torch.eye(6, data.sample_shape[0])[labels]

    names = [f"class {k}" for k in range(6)]
    return Dataset(samples(y), y, samples(y_test), y_test, names, torch.tensor(counts))


def finish_stage(trainer: Trainer) -> None:
    while trainer.epoch < trainer.method.stages[trainer.stage].epochs:
        while trainer.step_of_epoch < trainer.steps_per_epoch:
            trainer.step()
        trainer.end_epoch()
    trainer.begin_stage(trainer.stage + 1)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["images", "features"])
def test_each_network_starts_anew_and_experts_stay_as_they_are(
    kind: str, request: pytest.FixtureRequest
) -> None:
    config = IMAGES if kind == "images" else FEATURES
    config = config.replace(stage1_epochs=1, stage2_epochs=0, max_steps_per_epoch=2)
    trainer = Trainer("lfme", config, balanced_groups(request.getfixturevalue(kind)))
    model, method = trainer.model, trainer.method
    assert [stage.name for stage in method.stages] == [
        "expert many",
        "expert medium",
        "expert few",
        "student",
    ]
    backbone, starts, kept = model.backbone, [tensors(model.backbone)], []
    for stage in range(3):
        assert model.head(torch.zeros(1, model.head.in_features)).isfinite().sum() == 2
        trained_labels = trainer.batches.y[trainer.batches.subset].unique()
        assert trained_labels.tolist() == [2 * stage, 2 * stage + 1]
        finish_stage(trainer)
        expert = model.auxiliary.experts[stage]
        assert len(model.auxiliary.experts) == stage + 1
        assert 0 < expert.head.accuracy <= 1
        assert (expert.head.least < expert.head.most).all()
        starts.append(tensors(model.backbone))
        kept.append(tensors(expert))
    assert model.backbone is backbone  # torch.compile holds it
    assert isinstance(model.head, nn.Linear)
    assert model.head.out_features == 6
    if kind == "images":
        for one, other in itertools.pairwise(starts):
            assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
        assert starts[3]["bn1.running_mean"].eq(0).all()
    assert model.center.running_mean.eq(0).all()
    model.train()
    assert not any(module.training for module in model.auxiliary.modules())
    trainer.step()
    finish_stage(trainer)
    for expert, before in zip(model.auxiliary.experts, kept, strict=True):
        assert equal(tensors(expert), before)
        assert not any(parameter.requires_grad for parameter in expert.parameters())
    assert (
        trainer.images
        == image_passes(config, trainer.data, "lfme")
        > image_passes(config, trainer.data, "plain")
    )


@pytest.mark.parametrize("stage", range(4))
def test_a_run_resumes_exactly_in_every_stage(stage: int, images: Dataset) -> None:
    config = IMAGES.replace(stage1_epochs=2, stage2_epochs=0, max_steps_per_epoch=2, batch_size=10)
    data = balanced_groups(images)
    whole = Trainer("lfme", config, data)
    while whole.stage < stage:
        finish_stage(whole)
    for _ in range(whole.steps_per_epoch):
        whole.step()
    whole.end_epoch()
    whole.model.auxiliary.weights.copy_(torch.rand(3))  # as in the middle of a longer training
    whole.step()
    rest = Trainer("lfme", config, data)
    rest.load_state_dict(copy.deepcopy(whole.state_dict()))
    if stage == 3:
        assert rest.model.auxiliary.progress == 2
    finish_stage(whole)
    finish_stage(rest)
    assert equal(whole.state_dict()["model"], rest.state_dict()["model"])


@pytest.mark.parametrize("validation", [False, True])
def test_accuracies_are_never_those_on_test_samples(validation: bool, features: Dataset) -> None:
    data = balanced_groups(features)
    config = FEATURES.replace(stage1_epochs=2, stage2_epochs=0, max_steps_per_epoch=2)
    if validation:
        data = dataclasses.replace(data, x_val=data.x_test, y_val=data.y_test.roll(10))
    other = dataclasses.replace(data, x_test=data.x_test + 1, y_test=data.y_test.roll(3))
    trainers = [Trainer("lfme", config, split) for split in (data, other)]
    for trainer in trainers:
        finish(trainer)
    assert equal(*(trainer.state_dict()["model"] for trainer in trainers))


def test_accuracies_are_means_over_the_classes_of_a_group(features: Dataset) -> None:
    data = balanced_groups(features)
    x_val = torch.eye(6, 12)[[0, 0, 0, 1, 2, 3, 4, 5]]
    y_val = torch.tensor([0, 0, 1, 1, 2, 3, 4, 4])
    data = dataclasses.replace(data, x_val=x_val, y_val=y_val)
    trainer = Trainer("lfme", FEATURES.replace(center_features=False), data)
    while trainer.stage < 3:
        trainer.begin_stage(trainer.stage + 1)
    experts = trainer.model.auxiliary
    with torch.no_grad():
        trainer.model.head.weight.copy_(torch.eye(6, 12))
        trainer.model.head.bias.zero_()
        for expert in experts.experts:
            expert.head.accuracy.fill_(1)
    trainer.method.end_epoch(trainer.model, trainer.stage_data)
    # Many-shot: 2 of 2 and 1 of 2. Medium-shot: all. Few-shot: 1 of 2, and class 5 has no samples.
    torch.testing.assert_close(experts.weights, torch.tensor([0.25, 0.0, 0.5]) / 0.7)


def test_without_a_group_of_two_classes_the_student_trains_alone(features: Dataset) -> None:
    data = balanced_groups(features)
    train, test = data.y_train % 2 == 0, data.y_test % 2 == 0
    splits = (data.x_train[train], data.y_train[train] // 2, data.x_test[test], data.y_test[test] // 2)
    small = Dataset(*splits, data.class_names[::2], data.train_counts[::2])
    trainer = Trainer("lfme", FEATURES.replace(stage1_epochs=8), small)
    assert [stage.name for stage in trainer.method.stages] == ["student"]
    finish(trainer)
    assert trainer.evaluate()["accuracy"]["overall"] > 0.6


def test_the_model_file_is_that_of_the_student(images: Dataset, tmp_path: Path) -> None:
    config = IMAGES.replace(stage1_epochs=1, stage2_epochs=0, max_steps_per_epoch=2)
    trainer = Trainer("lfme", config, images)
    assert [stage.name for stage in trainer.method.stages] == ["expert medium", "expert few", "student"]
    finish(trainer)
    save_model(tmp_path / "m", trainer.model, images.class_names, describe("lfme", config, images))
    plain = Trainer("plain", config, images)
    save_model(tmp_path / "p", plain.model, images.class_names, describe("plain", config, images))
    trainer.model.eval()
    expected = trainer.model(images.x_test)
    loaded, _ = load_model(tmp_path / "m")
    assert torch.equal(loaded(images.x_test), expected)
    assert torch.equal(load_trained(tmp_path / "m").scores(images.x_test)[""], expected)
    sizes = [(tmp_path / name).stat().st_size for name in "mp"]
    assert abs(sizes[0] - sizes[1]) < 1000


def test_the_estimates_count_four_networks(images: Dataset) -> None:
    config, data = IMAGES, balanced_groups(images)
    trial = footprint.try_network(config, data, 2)
    trainer = Trainer("lfme", config, data)
    while trainer.stage < 3:
        trainer.begin_stage(trainer.stage + 1)
    experts = sum(tensor.nbytes for tensor in trainer.model.auxiliary.state_dict().values())
    features = 2 * 4 * len(data.y_train) * trial.features
    lfme, focal = (footprint.memory_needed(name, config, data, trial) for name in ("lfme", "focal"))
    assert lfme - focal == experts + features
    lfme, focal = (
        footprint.disk_needed(config.replace(methods=(name,)), data, trial) for name in ("lfme", "focal")
    )
    assert lfme - focal == 2 * experts
