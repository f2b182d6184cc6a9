"""Decoupled methods against their formulas in float64; what the second stage leaves as it is; resumption and processes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train.config import Config
from train.data.dataset import Dataset
from train.data.hold_out import hold_out_validation
from train.data.sources.arrays import load_arrays
from train.methods.lws import ScaledLinear
from train.methods.ncm import class_mean_classifier
from train.methods.tau_norm import GRID, best_exponent
from train.model.model import load_model, save_model
from train.trained import describe, load_trained
from train.training.trainer import Trainer

from ...processes import in_group
from ..short_runs import FEATURES, IMAGES, equal, finish

NAMES = ("ncm", "crt", "tau-norm", "lws")
SHORT = {"stage1_epochs": 1, "stage2_epochs": 0, "crt_epochs": 2}


def at_the_end_of_stage_1(name: str, config: Config, data: Dataset) -> Trainer:
    """Return a trainer that has trained its first stage of one epoch, and has not begun the second stage."""
    trainer = Trainer(name, config, data)
    for _ in range(trainer.steps_per_epoch):
        trainer.step()
    trainer.end_epoch()
    return trainer


def test_the_nearest_class_mean(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(6), [1, 2, 3, 9, 20, 40]))
    x, query = rng.normal(1, 1, (len(labels), 5)), rng.normal(1, 1, (30, 5))
    weight, bias = class_mean_classifier(torch.from_numpy(x), torch.from_numpy(labels), 6)
    scores = query @ weight.numpy().T + bias.numpy()
    mean = sum(x) / len(x)
    for k in range(6):
        units = [(row - mean) / np.sqrt(((row - mean) ** 2).sum()) for row in x[labels == k]]
        center = sum(units) / len(units)
        for score, row in zip(scores[:, k], query - mean, strict=True):
            cosine = (row * center).sum() / np.sqrt((row**2).sum() * (center**2).sum())
            np.testing.assert_allclose(score, np.sqrt((row**2).sum()) * cosine, rtol=1e-9, atol=1e-9)


def accuracies(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> list[float]:
    """Return the mean of the classes' accuracies for each exponent of the grid, in plain NumPy."""
    lengths = np.sqrt((weight**2).sum(1, keepdims=True))
    found = []
    for step in range(21):
        predicted = (x @ (weight / lengths ** (step / 10)).T).argmax(1)
        found.append(float(np.mean([(predicted[y == k] == k).mean() for k in np.unique(y)])))
    return found


def test_the_exponent_of_the_largest_mean_accuracy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(7, 5)) * np.geomspace(1, 0.1, 7)[:, None]
    y = rng.integers(0, 6, 700)  # the last class has no sample
    x = rng.normal(size=(700, 5)) + weight[y] / np.sqrt((weight[y] ** 2).sum(1, keepdims=True))
    best = best_exponent(*map(torch.from_numpy, (weight, x, y)))
    expected = accuracies(weight, x, y)
    assert expected[GRID.index(best)] >= max(expected) - 1e-12
    unit = weight / np.sqrt((weight**2).sum(1, keepdims=True))
    assert best_exponent(*map(torch.from_numpy, (unit, x, y))) == 0


@pytest.mark.parametrize(("given", "held"), [(0.4, 0.2), (None, 0.2), (None, 0.0)])
def test_the_normalized_classifier(given: float | None, held: float, features: Dataset) -> None:
    data = hold_out_validation(features, held, 0, "--hold-out") if held else features
    trainer = at_the_end_of_stage_1("tau-norm", FEATURES.replace(tau_norm=given, **SHORT), data)
    head = trainer.model.head
    assert trainer.method.describe(head) == {}
    trainer.begin_stage(1)
    weight = head.weight.detach().double().numpy()
    found = trainer.method.describe(trainer.model.head)
    if given is not None:
        assert found == {"tau_norm": 0.4, "tau_norm_from": "--tau-norm"}
    elif held:
        assert found["tau_norm_from"] == "validation samples"
        assert data.y_val is not None
        validation = trainer.validation_features()[0].double().numpy()
        means = accuracies(weight, validation, data.y_val.numpy())
        assert means[GRID.index(found["tau_norm"])] >= max(means) - 1e-12
    else:
        expected = {"tau_norm_from": "the maximum on ImageNet-LT, as there are no validation samples"}
        assert found == {"tau_norm": 0.7} | expected
    t = found["tau_norm"]
    expected_weight = weight / np.sqrt((weight**2).sum(1, keepdims=True)) ** t
    assert isinstance(trainer.model.head, nn.Linear)
    np.testing.assert_allclose(trainer.model.head.weight.detach().numpy(), expected_weight, rtol=1e-6)
    assert not trainer.model.head.bias.any()


def gradient_of_logits(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the gradient of the mean cross-entropy with respect to the logits, [n, K]."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    return p / len(y)


@pytest.mark.parametrize("name", ["crt", "lws"])
def test_gradients_of_the_second_stage(name: str, features: Dataset) -> None:
    trainer = at_the_end_of_stage_1(name, FEATURES.replace(**SHORT), features)
    trainer.begin_stage(1)
    head = trainer.model.head.double()
    if name == "lws":
        assert torch.equal(head.scales, torch.ones_like(head.scales))
        nn.init.uniform_(head.scales, 0.5, 2)
    x, y = torch.randn(20, 12, dtype=torch.float64), torch.randint(5, (20,))
    trainer.optimizer.zero_grad()
    losses = trainer.method.losses(head, x, y, len(y))
    assert losses.keys() == {"loss_balanced"}
    losses["loss_balanced"].backward()
    linear = head if name == "crt" else head.classifier
    w, b = (tensor.detach().numpy() for tensor in (linear.weight, linear.bias))
    logits = x.numpy() @ w.T + b
    scales = np.ones(5) if name == "crt" else head.scales.detach().numpy()
    gradient = gradient_of_logits(scales * logits, y.numpy())
    log_p = torch.from_numpy(scales * logits).log_softmax(1)
    torch.testing.assert_close(losses["loss_balanced"], -log_p[range(20), y].mean())
    if name == "crt":
        np.testing.assert_allclose(head.weight.grad.numpy(), gradient.T @ x.numpy(), atol=1e-12)
        np.testing.assert_allclose(head.bias.grad.numpy(), gradient.sum(0), atol=1e-12)
    else:
        np.testing.assert_allclose(head.scales.grad.numpy(), (gradient * logits).sum(0), atol=1e-12)
        assert linear.weight.grad is None
        assert linear.bias.grad is None


@pytest.mark.parametrize("name", ["crt", "lws"])
@pytest.mark.parametrize("batch_norm", ["joint", "split"])
def test_the_second_stage_trains_the_classifier_alone(name: str, batch_norm: str, images: Dataset) -> None:
    trainer = at_the_end_of_stage_1(name, IMAGES.replace(batch_norm=batch_norm, **SHORT), images)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.begin_stage(1)
    start = {key: value.clone() for key, value in trainer.model.head.state_dict().items()}
    classes = torch.bincount(trainer.batches.next()[0].y, minlength=5)
    assert classes.max() <= 4 * 5 + 2  # of 62 samples, in rounds of the 5 classes with 4 samples each
    for _ in range(3):
        trainer.step()
    after = trainer.model.state_dict()
    network = [key for key in before if not key.startswith("head.")]
    assert any(key.endswith("running_mean") for key in network)
    assert all(torch.equal(after[key], before[key]) for key in network)
    changed = {key for key, value in trainer.model.head.state_dict().items() if not equal(value, start[key])}
    assert changed == ({"weight", "bias"} if name == "crt" else {"scales"})
    trained = {key for key, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained == {f"head.{key}" for key in changed}
    if name == "crt":
        assert not torch.equal(start["weight"], before["head.weight"])
    else:
        assert torch.equal(start["classifier.weight"], before["head.weight"])


def test_the_scales_are_folded(features: Dataset) -> None:
    trainer = Trainer("lws", FEATURES.replace(**SHORT), features)
    finish(trainer, steps=3 * trainer.steps_per_epoch)
    head, x = trainer.model.head, torch.randn(20, 12)
    assert isinstance(head, ScaledLinear)
    expected = head(x)
    assert not torch.allclose(expected, head.classifier(x))
    trainer.begin_stage(2)
    assert isinstance(trainer.model.head, nn.Linear)
    torch.testing.assert_close(trainer.model.head(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_in_both_stages(name: str, images: Dataset) -> None:
    config = IMAGES.replace(max_steps_per_epoch=3, **SHORT)
    whole = Trainer(name, config, images)
    records = finish(whole)
    per_epoch = whole.steps_per_epoch
    for stop in [2] + [per_epoch + 2] * (len(whole.method.stages) > 1):
        first = Trainer(name, config, images)
        found = finish(first, stop)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = Trainer(name, config, images)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert found + finish(second) == records
        assert equal(second.model.state_dict(), whole.model.state_dict())
        assert second.evaluate(final=True) == whole.evaluate(final=True)


@pytest.mark.parametrize("name", NAMES)
def test_model_files_give_the_same_logits(name: str, images: Dataset, tmp_path: Path) -> None:
    config = IMAGES.replace(**SHORT)
    trainer = Trainer(name, config, images)
    finish(trainer)
    save_model(tmp_path / "model", trainer.model, images.class_names, describe(name, config, images))
    expected = trainer.model.eval()(images.x_test)
    assert torch.equal(load_model(tmp_path / "model")[0](images.x_test), expected)
    scores = load_trained(tmp_path / "model").scores(images.x_test)
    assert scores.keys() == {""}
    assert torch.equal(scores[""], expected)


def run(name: str, config: Config, data: Dataset) -> list[Tensor]:
    """Return the states of the head after each step of the second stage, in float64, and the final classifier."""
    trainer = Trainer(name, config, data)
    trainer.model.double()
    trainer.begin_stage(0)
    finish(trainer, steps=2)
    states: list[Tensor] = []
    for stage in range(1, len(trainer.method.stages)):
        trainer.begin_stage(stage)
        for _ in range(3):
            trainer.step()
            states += [parameter.detach().clone() for parameter in trainer.model.head.parameters()]
    trainer.begin_stage(len(trainer.method.stages))
    return states + [parameter.detach() for parameter in trainer.model.head.parameters()]


def _as_one_process(rank: int, folder: str, config: Config) -> None:
    for name, expected in torch.load(f"{folder}/expected.pt").items():
        states = run(name, config, load_arrays(f"{folder}/data.npz"))
        assert len(states) == len(expected)
        for state, wanted in zip(states, expected, strict=True):
            torch.testing.assert_close(state, wanted, rtol=1e-6, atol=1e-8)


def test_two_processes_come_to_the_classifiers_of_one(image_file: Path, tmp_path: Path) -> None:
    config = IMAGES.replace(batch_size=51, **SHORT)
    folder = tmp_path / "group"
    folder.mkdir()
    data = load_arrays(str(image_file))
    torch.save({name: run(name, config, data) for name in NAMES}, folder / "expected.pt")
    image_file.rename(folder / "data.npz")
    in_group(_as_one_process, 2, folder, str(folder), config)
