"""focal, cb-focal and ldam-drw: the published formulas in float64, class weights, and the deferred re-weighting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train.config import Config
from train.data.dataset import Dataset
from train.methods import METHODS
from train.methods.cb_focal import sigmoid_focal_loss
from train.methods.class_weights import class_balanced_weights
from train.methods.focal import focal_loss
from train.methods.ldam_drw import LdamDrw
from train.methods.method import Method
from train.model.model import load_model, save_model
from train.options import ConfigError
from train.training.trainer import Trainer

from ..short_runs import FEATURES, IMAGES, equal, finish

COUNTS = torch.tensor([500, 120, 40, 11, 3, 1])
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def published_weights(beta: float) -> Tensor:
    weights = torch.tensor([(1 - beta) / (1 - beta**n) for n in COUNTS.tolist()], dtype=torch.float64)
    return weights / weights.sum() * len(COUNTS)


def published_focal(head: nn.Linear, features: Tensor, labels: Tensor) -> Tensor:
    exponentials = (features @ head.weight.T + head.bias).exp()
    p = exponentials[torch.arange(len(labels)), labels] / exponentials.sum(1)
    return (-((1 - p) ** 2) * p.log()).mean()


def published_cb_focal(
    head: nn.Linear, features: Tensor, labels: Tensor, beta: float, gamma: float
) -> Tensor:
    p = 1 / (1 + (-features @ head.weight.T - head.bias).exp())
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(p, labels.tolist(), strict=True):
        for k, p_k in enumerate(row):
            p_t = p_k if k == label else 1 - p_k
            total = total - published_weights(beta)[label] * (1 - p_t) ** gamma * p_t.log()
    return total / len(labels)  # a label is one positive


def published_ldam(weights: Tensor) -> Loss:
    def loss(head: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
        centers = head.centers / head.centers.norm(dim=1, keepdim=True)
        cosines = features / features.norm(dim=1, keepdim=True) @ centers.T
        margins = COUNTS.double() ** -0.25
        margins = 0.5 * margins / margins.max()
        rows = torch.arange(len(labels))
        lowered = cosines.clone()
        lowered[rows, labels] = cosines[rows, labels] - margins[labels]
        exponentials = (30 * lowered).exp()
        losses = exponentials.sum(1).log() - 30 * lowered[rows, labels]
        return (weights[labels] * losses).sum() / weights[labels].sum()

    return loss


def assert_loss_is(method: Method, published: Loss) -> None:
    """Compare the loss and the gradients of the head's parameters and the features with those in float64."""
    head = method.make_head(16, len(COUNTS))
    features = torch.randn(40, 16).requires_grad_()
    labels = torch.randint(len(COUNTS), (40,))
    exact_head = method.make_head(16, len(COUNTS)).double()
    exact_head.load_state_dict(head.state_dict())
    exact_features = features.detach().double().requires_grad_()
    losses = method.losses(head, features, labels, 0)
    assert list(losses) == list(method.loss_coefficients) == ["loss_random"]
    loss, exact = losses["loss_random"], published(exact_head, exact_features, labels)
    loss.backward()
    exact.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    pairs = [(features, exact_features), *zip(head.parameters(), exact_head.parameters(), strict=True)]
    for got, expected in pairs:
        if got.requires_grad and got.numel():
            scale = expected.grad.abs().max().item()
            torch.testing.assert_close(got.grad.double(), expected.grad, rtol=0, atol=2e-5 * scale)


def test_focal_loss_is_the_published_one() -> None:
    assert_loss_is(METHODS["focal"](Config(), COUNTS), published_focal)


@pytest.mark.parametrize(("beta", "gamma"), [(0.9999, 1.0), (0.999, 0.5), (0.9, 2.0), (0.0, 0.0)])
def test_class_balanced_focal_loss_is_the_published_one(beta: float, gamma: float) -> None:
    config = Config().replace(class_balanced_beta=beta, cb_focal_gamma=gamma)
    assert_loss_is(
        METHODS["cb-focal"](config, COUNTS),
        lambda head, features, labels: published_cb_focal(head, features, labels, beta, gamma),
    )


@pytest.mark.parametrize("epoch", [0, 79, 80, 99])
def test_ldam_loss_is_the_published_one(epoch: int) -> None:
    method = METHODS["ldam-drw"](Config().replace(stage1_epochs=40, stage2_epochs=60), COUNTS)
    assert isinstance(method, LdamDrw)
    before = method.class_weights.data_ptr()
    method.begin_epoch(0, epoch, None)  # type: ignore[arg-type]
    assert method.class_weights.data_ptr() == before, "a CUDA graph reads the old address"
    weights = published_weights(0.9999) if epoch >= 80 else torch.ones(len(COUNTS), dtype=torch.float64)
    assert_loss_is(method, published_ldam(weights))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_class_weights_have_mean_1(beta: float) -> None:
    weights = class_balanced_weights(COUNTS, beta)
    torch.testing.assert_close(weights.double(), published_weights(beta), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))


def test_class_weights_close_to_inverse_frequencies() -> None:
    inverse = 1 / COUNTS.double()
    weights = class_balanced_weights(COUNTS, 1 - 1e-12)
    torch.testing.assert_close(weights.double(), inverse / inverse.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_certain_predictions_are_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], dtype=dtype, requires_grad=True)
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    ones = torch.ones(2)
    for labels, softmax, sigmoid in ((right, 0.0, 0.0), (wrong, 400.0, 400.0)):
        for loss, expected in (
            (focal_loss(logits, labels), softmax),
            (sigmoid_focal_loss(logits, labels, ones, 0.5), sigmoid),
        ):
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.item(), expected)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("option", "value"),
    [("class_balanced_beta", 1.0), ("class_balanced_beta", -0.1), ("cb_focal_gamma", -1.0)],
)
def test_invalid_options_are_named(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=option.replace("_", "-")):
        Config().replace(**{option: value})


def test_biases_of_cb_focal_start_at_the_prior_and_do_not_decay(features: Dataset) -> None:
    trainer = Trainer("cb-focal", FEATURES.replace(weight_decay=0.3), features)
    head = trainer.model.head
    probabilities = head.bias.sigmoid()
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / features.num_classes))
    for parameter, decay in ((head.weight, 0.3), (head.bias, 0.0)):
        (group,) = [g for g in trainer.optimizer.param_groups if any(p is parameter for p in g["params"])]
        assert group["weight_decay"] == decay


def test_the_temperature_of_ldam_is_fixed_and_saved(features: Dataset, tmp_path: Path) -> None:
    trainer = Trainer("ldam-drw", FEATURES, features)
    finish(trainer)
    assert trainer.model.head.tau.item() == 30
    save_model(tmp_path / "model", trainer.model, features.class_names)
    model, _ = load_model(tmp_path / "model")
    assert model.head.tau.item() == 30
    x = features.x_test[:9]
    trainer.model.eval()
    torch.testing.assert_close(model(x), trainer.model(x), rtol=0, atol=0)


@pytest.mark.parametrize("steps_of_last_epoch", [0, 1])
def test_ldam_is_reweighted_in_the_last_fifth_of_the_epochs(
    steps_of_last_epoch: int, images: Dataset
) -> None:
    config = IMAGES.replace(stage1_epochs=2, stage2_epochs=3)
    whole = Trainer("ldam-drw", config, images)
    deferred = class_balanced_weights(images.train_counts, 0.9999)
    for epoch in range(4):
        assert whole.epoch == epoch
        assert equal(whole.method.class_weights, torch.ones_like(deferred))
        finish(whole, steps=whole.steps_per_epoch)
    assert equal(whole.method.class_weights, deferred)
    finish(whole, steps=steps_of_last_epoch)
    rest = Trainer("ldam-drw", config, images)
    rest.load_state_dict(copy.deepcopy(whole.state_dict()))  # `whole` goes on to change its tensors
    assert equal(rest.method.class_weights, deferred)
    for trainer in (whole, rest):
        finish(trainer)
    assert equal(rest.state_dict()["model"], whole.state_dict()["model"])
