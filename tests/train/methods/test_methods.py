"""The methods: batches, losses, gradients, alternative scores and displacements."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from gistops.sampling import ClassBalancedBatchSampler
from train.config import Config, MethodName
from train.data.dataset import Dataset
from train.data.stream.streams import BalancedStream
from train.methods import METHODS, TITLES
from train.recipes import load_recipe
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, finish

CONFIG: Config = FEATURES.replace(num_displacements=3)
#: Images of the balanced and the random stream in a step of 12 + 48, for each stage; (0, 60) for other methods.
DRAWS = {
    "gist": [(12, 48)] * 2,
    "gist-rotation": [(12, 48)] * 2,
    "gist-mlp": [(12, 48)] * 2,
    "cos-gist": [(12, 48)] * 2,
    "gist-combined": [(12, 48)] * 2,
    "cos-cb": [(60, 0)] * 2,
    "cos-cs-cb": [(60, 0)] * 2,
    "lifted": [(60, 0)],
    "range": [(60, 0)],
    "fslwf": [(0, 60), (60, 0)],
    "oltr": [(0, 60), (60, 0)],
    "crt": [(0, 60), (60, 0)],
    "lws": [(0, 60), (60, 0)],
}
#: One method of each kind.
RESUMED = (
    "cos-cs-cb",
    "gist-mlp",
    "gist-rotation",
    "balanced-softmax",
    "focal",
    "cb-focal",
    "ldam-drw",
    "lifted",
    "range",
    "fslwf",
    "oltr",
)
#: The methods whose stages all use all samples; test_lfme.py tests the other one.
SAME_SAMPLES = [name for name in METHODS if name != "lfme"]


def test_every_name_has_a_method_and_a_title() -> None:
    assert list(get_args(MethodName)) == list(METHODS) == list(TITLES)


@pytest.mark.parametrize("name", SAME_SAMPLES)
def test_each_method_trains_on_as_many_samples_and_learns(name: str, features: Dataset) -> None:
    config = CONFIG.replace(stage1_epochs=4, stage2_epochs=4)
    trainer = Trainer(name, config, features)
    assert [stage.split(12, 48) for stage in trainer.method.stages] == DRAWS.get(name, [(0, 60)])
    records = finish(trainer)
    per_epoch = sum(map(sum, trainer.batches.sizes))
    assert [record["images"] for record in records] == [per_epoch * n for n in range(1, len(records) + 1)]
    last = 5 if name == "ldam-drw" else -1  # the later losses of ldam-drw are weighted
    assert records[last]["loss"] < records[0]["loss"]
    found = trainer.evaluate()
    assert found["accuracy"]["overall"] > 0.5
    displaced = name.startswith("gist") or name == "cos-cs-cb"
    assert len(found.get("slot_usage", [0])) == (4 if displaced else 1)


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_gets_its_gradient(name: str, features: Dataset) -> None:
    trainer = Trainer(name, CONFIG, features)
    if len(trainer.method.stages) > 1:
        trainer.begin_stage(1)
    trainer.step()
    for what, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, what
            assert parameter.grad.any(), what


def test_the_combined_head_learns_its_displacements_from_the_random_stream(features: Dataset) -> None:
    trainer = Trainer("gist-combined", CONFIG, features)
    trainer.begin_stage(1)
    head, x, y = trainer.model.head, torch.randn(20, 12), torch.randint(5, (20,))
    losses = trainer.method.losses(head, x, y, 8)
    losses["loss_balanced"].backward(retain_graph=True)
    assert head.displacements.grad is None
    assert head.centers.grad is not None
    losses["loss_random"].backward()
    assert head.displacements.grad is not None
    torch.testing.assert_close(losses["loss_random"], F.cross_entropy(head(x[8:]), y[8:]))
    torch.testing.assert_close(losses["loss_balanced"], F.cross_entropy(head(x[:8]), y[:8]))


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_priors(strength: float, features: Dataset) -> None:
    config = CONFIG.replace(prior_strength=strength)
    prior = strength * (features.train_counts / len(features.y_train)).log()
    x, y = torch.randn(20, 12), torch.randint(5, (20,))
    for name in ("balanced-softmax", "cos-balanced-softmax"):
        trainer = Trainer(name, config, features)
        loss = trainer.method.losses(trainer.model.head, x, y, 0)["loss_random"]
        torch.testing.assert_close(loss, F.cross_entropy(trainer.model.head(x) + prior, y))
        assert trainer.method.alternative_scores(trainer.model.head, x, trainer.model.head(x)) == {}
    trainer = Trainer("plain", config, features)
    (adjusted,) = trainer.method.alternative_scores(trainer.model.head, x, trainer.model.head(x)).values()
    torch.testing.assert_close(adjusted, trainer.model.head(x) - prior)
    trainer = Trainer("gist", config, features)
    adjusted, both = trainer.method.alternative_scores(trainer.model.head, x, trainer.model.head(x)).values()
    torch.testing.assert_close(adjusted, trainer.model.head.random_logits(x) - prior)
    torch.testing.assert_close(both, adjusted.log_softmax(1) + trainer.model.head(x).log_softmax(1))


@pytest.mark.parametrize("name", ["gist", "cos-cs-cb"])
def test_no_displacements_where_no_epoch_would_train_them(name: str, features: Dataset) -> None:
    trainer = Trainer(name, CONFIG.replace(stage2_epochs=0), features)
    finish(trainer)
    assert trainer.model.head.num_displacements == 0


def test_a_balanced_stream_in_any_runs_is_the_samplers(features: Dataset) -> None:
    def sampler() -> ClassBalancedBatchSampler:
        return ClassBalancedBatchSampler(features.y_train, 4, 3, seed=7)

    batches = iter(sampler())
    expected = torch.tensor([i for _ in range(10) for i in next(batches)])
    stream = BalancedStream(sampler())
    taken = [stream.take(n) for n in (5, 0, 19, 12, 1)]
    resumed = BalancedStream(sampler())
    resumed.load_state_dict(stream.state_dict())
    taken += [resumed.take(n) for n in (50, 33)]
    assert torch.equal(torch.cat(taken), expected)


@pytest.mark.parametrize("name", RESUMED)
def test_methods_resume_exactly(name: str, images: Dataset) -> None:
    config = IMAGES.replace(displacement_init="residuals")
    whole = Trainer(name, config, images)
    finish(whole, steps=9)
    half = Trainer(name, config, images)
    finish(half, steps=4)
    state = half.state_dict()
    rest = Trainer(name, config, images)
    rest.load_state_dict(state)
    finish(rest, steps=5)
    for key, value in whole.state_dict()["model"].items():
        assert torch.equal(rest.state_dict()["model"][key], value), key


def test_recipes_name_methods_that_are_there() -> None:
    for recipe in ("features", "cifar100-lt", "fashion-mnist-lt", "smoke"):
        assert set(load_recipe(recipe).method.methods) <= set(METHODS)


@pytest.mark.parametrize("name", ["gist", "cos-cs-cb", "gist-rotation", "gist-mlp"])
def test_scores_of_the_centers_alone(name: str, features: Dataset) -> None:
    trainer = Trainer(name, CONFIG.replace(displacement_scale=1.0), features)
    head, x = trainer.model.head, torch.randn(20, 12)
    assert "centers alone" not in trainer.method.alternative_scores(head, x, head(x))
    trainer.begin_stage(1)
    head = trainer.model.head
    alone = trainer.method.alternative_scores(head, x, head(x))["centers alone"]
    expected = head.tau * F.normalize(x) @ F.normalize(head.centers).T
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone, head(x), atol=0.1)
