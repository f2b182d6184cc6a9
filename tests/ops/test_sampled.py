"""Losses over drawn classes, and the optimizer of their sparse gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from gistops import constellation_cross_entropy, subcenter_cross_entropy
from gistops.functional.sampled_classes import drawn_classes
from gistops.nn import ConstellationClassifier, GistClassifier, SubcenterClassifier
from gistops.optim import RowOptimizer

K, D, B = 211, 13, 37
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}

pytestmark = pytest.mark.cpu


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_all_targets_are_drawn_and_the_others_evenly(share: float, seed: int) -> None:
    g = generator(seed)
    target = torch.randint(K, (B,), generator=g)
    target[::5] = -100
    targets = target[target >= 0].unique()
    count = max(B, -int(-share * K // 1))
    times = torch.zeros(K)
    for _ in range(2000):
        index = drawn_classes(K, target, share, g)
        assert len(index) == min(K, count)
        assert torch.equal(index, index.unique())
        times[index] += 1
    assert (times[targets] == 2000).all()
    others = torch.ones(K, dtype=torch.bool)
    others[targets] = False
    expected = 2000 * (len(index) - len(targets)) / (K - len(targets))
    spread = (expected * (1 - expected / 2000)) ** 0.5
    assert (times[others] - expected).abs().max() <= 5 * spread + 1e-9


def sample(kind: str, seed: int) -> tuple[Tensor, Tensor, list[Tensor], dict[str, Any]]:
    g = generator(seed)
    x = torch.randn(B, D, dtype=torch.float64, generator=g).requires_grad_()
    target = torch.randint(K, (B,), generator=g)
    target[3] = -100
    shape = (K, 3, D) if kind == "subcenters" else (K, D)
    tensors = [torch.randn(shape, dtype=torch.float64, generator=g).requires_grad_()]
    if kind != "subcenters":
        tensors.append(torch.randn(2, D, dtype=torch.float64, generator=g).requires_grad_())
    vector = torch.rand(K, dtype=torch.float64, generator=g)
    options = {
        "class_bias": vector.clone().requires_grad_(),
        "weight": 1 - vector,
        "margin": vector / 3,
        "margin_kind": "angle",
    }
    return x, target, tensors, options


@pytest.mark.parametrize("kind", ["translation", "subcenters"])
def test_the_loss_is_that_of_a_classifier_with_the_drawn_classes(kind: str, seed: int) -> None:
    x, target, tensors, options = sample(kind, seed)
    function: Any = subcenter_cross_entropy if kind == "subcenters" else constellation_cross_entropy
    loss = function(x, *tensors, 9.0, target, **options, sample_negatives=0.4, generator=generator(seed))
    loss.backward()
    index = drawn_classes(K, target, 0.4, generator(seed))
    assert 0.35 * K < len(index) < 0.5 * K
    position = torch.full((K,), -1)
    position[index] = torch.arange(len(index))
    other = [t.detach().clone().requires_grad_() for t in (x, *tensors, options["class_bias"])]
    mapped = torch.where(target == -100, -100, position[target])
    rest = {"weight": options["weight"][index], "margin": options["margin"][index], "margin_kind": "angle"}
    expected = function(
        other[0],
        other[1][index],
        *other[2:-1],
        9.0,
        mapped,
        class_bias=other[-1][index],
        **rest,
        backend="reference",
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert tensors[0].grad is not None
    assert tensors[0].grad.is_sparse
    assert torch.equal(tensors[0].grad.coalesce().indices()[0], index)
    for found, wanted in zip((x, *tensors, options["class_bias"]), other, strict=True):
        torch.testing.assert_close(found.grad.to_dense(), wanted.grad)


def test_heads_take_it(seed: int) -> None:
    x, y = torch.randn(B, D), torch.randint(K, (B,))
    for head in (ConstellationClassifier(D, K, 2), SubcenterClassifier(D, K)):
        head.loss(x, y, sample_negatives=0.2).backward()
        assert head.centers.grad.is_sparse
    gist = GistClassifier(D, K, 2)
    sum(gist.losses(x, y, x, y, sample_negatives=0.2, generator=generator(seed))).backward()
    assert gist.centers.grad.is_sparse
    assert gist.random_centers.grad.is_sparse


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_all_classes_it_is_the_optimizer_itself(name: str, seed: int) -> None:
    kind, options = OPTIMIZERS[name]
    torch.manual_seed(seed)
    heads = [ConstellationClassifier(D, K, 2, dtype=torch.float64) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    optimizers = [
        kind(heads[0].parameters(), **options),
        RowOptimizer(kind, heads[1].parameters(), **options),
    ]
    for step in range(6):
        x, y = torch.randn(B, D, dtype=torch.float64), torch.randint(K, (B,))
        for i, (head, optimizer) in enumerate(zip(heads, optimizers, strict=True)):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = options["lr"] / (1 + step)
            head.loss(x, y, sample_negatives=1.0 if i else None).backward()
            optimizer.step()
    for (label, p), q in zip(heads[1].named_parameters(), heads[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, label=label: f"{label}: {text}")


def test_only_drawn_rows_and_their_state_change(seed: int) -> None:
    torch.manual_seed(seed)
    head = ConstellationClassifier(D, K, 2)
    optimizer = RowOptimizer(torch.optim.AdamW, head.parameters(), lr=0.1)
    for _ in range(3):
        before = head.centers.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state[head.centers].items()}
        optimizer.zero_grad()
        head.loss(torch.randn(B, D), torch.randint(K, (B,)), sample_negatives=0.3).backward()
        drawn = torch.zeros(K, dtype=torch.bool)
        drawn[head.centers.grad.coalesce().indices()[0]] = True
        optimizer.step()
        changed = (head.centers != before).any(1)
        assert torch.equal(changed, drawn)
        for name in ("exp_avg", "exp_avg_sq"):
            old = state.get(name, torch.zeros_like(before))
            assert torch.equal((optimizer.state[head.centers][name] != old).any(1), drawn)


def test_accumulated_gradients_and_state_dicts(seed: int) -> None:
    torch.manual_seed(seed)
    heads = [ConstellationClassifier(D, K, 2) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    kind, options = OPTIMIZERS["sgd"]
    optimizers = [RowOptimizer(kind, head.parameters(), **options) for head in heads]
    batches = [(torch.randn(B, D), torch.randint(K, (B,))) for _ in range(8)]
    for step in range(4):
        if step == 2:
            optimizers[1] = RowOptimizer(kind, heads[1].parameters(), **options)
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for head, optimizer in zip(heads, optimizers, strict=True):
            g = generator(step)
            optimizer.zero_grad()
            for x, y in batches[2 * step : 2 * step + 2]:
                head.loss(x, y, sample_negatives=0.1, generator=g).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(heads[0].parameters(), heads[1].parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"sample_negatives": 0.0},
            ValueError,
            "sample_negatives: expected a number above 0, up to 1, got 0.0",
        ),
        ({"sample_negatives": 1.5}, ValueError, "sample_negatives: expected a number above 0, up to 1"),
        (
            {"sample_negatives": "all"},
            TypeError,
            "sample_negatives: expected a number above 0, up to 1, got str",
        ),
        (
            {"sample_negatives": 0.5, "label_smoothing": 0.1},
            ValueError,
            "label_smoothing: expected 0 with sample_neg",
        ),
        ({"generator": torch.Generator()}, ValueError, "generator: expected None without sample_negatives"),
        (
            {"sample_negatives": 0.5, "generator": 3},
            TypeError,
            "generator: expected a torch.Generator or None, got int",
        ),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    head = ConstellationClassifier(D, K)
    with pytest.raises(error, match=words):
        head.loss(torch.randn(2, D), torch.tensor([0, 1]), **changes)


@pytest.mark.parametrize("wrong", [-1, K])
def test_compiled_targets_out_of_range(wrong: int) -> None:
    head = ConstellationClassifier(D, K)
    x, y = torch.randn(B, D), torch.randint(K, (B,))
    y[3] = -2
    compiled = torch.compile(
        lambda x, y: head.loss(x, y, sample_negatives=0.2, ignore_index=-2), backend="eager"
    )
    assert compiled(x, y).isfinite()
    y[2] = wrong
    with pytest.raises(RuntimeError, match="target: expected 0 to"):
        compiled(x, y)


def test_optimizers_copy(seed: int) -> None:
    torch.manual_seed(seed)
    parameter = torch.randn(K, D, requires_grad=True)
    optimizer = RowOptimizer(torch.optim.AdamW, [parameter], lr=0.1)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (other,) = copied.param_groups[0]["params"]
        for p, one in ((parameter, optimizer), (other, copied)):
            p.data = torch.ones(K, D)
            p.grad = torch.ones(K, D)
            one.state.clear()
            one.step()
        assert torch.equal(parameter, other)
        assert (other != 1).all()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (torch.optim.Adafactor, "Adafactor: one where rows depend on each other"),
        (torch.optim.LBFGS, "LBFGS: .*closure"),
        (torch.optim.Rprop, "Rprop: one whose step_size starts at 1"),
        (torch.optim.SparseAdam, "SparseAdam: .* dense gradients"),
    ],
)
def test_optimizers_whose_updates_are_not_those_of_rows(
    kind: type[torch.optim.Optimizer], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^optimizer: expected a class .* element alone, .* got {words}"):
        RowOptimizer(kind, [torch.zeros(K, D, requires_grad=True)])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *OPTIMIZERS.values(),
        (torch.optim.SGD, {"lr": 0.0, "momentum": 0.9}),  # before a warm-up
        (torch.optim.Adam, {"lr": torch.tensor(0.1), "fused": True, "amsgrad": True}),
        (torch.optim.Adam, {"capturable": True}),  # for CUDA graphs
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.5, "weight_decay": 0.1}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
        *((getattr(torch.optim, name), {}) for name in ("Adadelta", "Adamax", "NAdam", "RAdam")),
    ],
)
def test_other_optimizers_are_accepted(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    RowOptimizer(kind, [torch.zeros(K, D, requires_grad=True)], **options)


def test_the_optimizer_needs_a_class() -> None:
    with pytest.raises(TypeError, match=r"optimizer: expected a class of torch\.optim, got 'sgd'"):
        RowOptimizer("sgd", [torch.zeros(1, requires_grad=True)])


def dense_gradient(centers: Tensor, *arguments: Tensor) -> Tensor:
    """Return the gradient of centers of the sampled loss below as a dense tensor."""
    leaf = centers.detach().clone().requires_grad_()
    sampled_loss(leaf, *arguments).sum().backward()
    return leaf.grad.to_dense()


def sampled_loss(centers: Tensor, x: Tensor, y: Tensor) -> Tensor:
    tensors = (x, centers, x[:2], 9.0, y)
    loss: Any = constellation_cross_entropy(
        *tensors, reduction="none", sample_negatives=0.3, generator=generator(3)
    )
    return loss


@pytest.mark.parametrize("change", ["cast", "parametrization"])
def test_centers_that_are_computed(change: str, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(B, D), torch.randint(K, (B,))
    head = ConstellationClassifier(D, K, 0)
    if change == "cast":
        head.half()
        sampled_loss(head.centers.float(), x, y).sum().backward()
        expected, found = dense_gradient(head.centers.float(), x, y).half(), head.centers.grad
    else:
        torch.nn.utils.parametrizations.weight_norm(head, "centers", dim=0)
        parts = list(head.parametrizations.centers.parameters())
        sampled_loss(head.centers, x, y).sum().backward()
        centers, found = head.centers, parts[1].grad
        (expected,) = torch.autograd.grad(centers, parts[1], dense_gradient(centers, x, y))
    torch.testing.assert_close(found, expected)


def test_transforms_of_functorch(seed: int) -> None:
    torch.manual_seed(seed)
    x, y, other = torch.randn(B, D), torch.randint(K, (B,)), torch.randint(K, (B,))
    centers = torch.randn(K, D, requires_grad=True)
    grad = torch.func.grad(lambda w: sampled_loss(w, x, y).sum())(centers.detach())
    expected = dense_gradient(centers, x, y)
    torch.testing.assert_close(grad, expected)
    losses = torch.vmap(lambda y: sampled_loss(centers, x, y).sum(), randomness="same")(
        torch.stack([y, other])
    )
    torch.testing.assert_close(losses, torch.stack([sampled_loss(centers, x, t).sum() for t in (y, other)]))
    weights = torch.rand(2, B)
    (grads,) = torch.autograd.grad(sampled_loss(centers, x, y), centers, weights, is_grads_batched=True)
    for found, weight in zip(grads, weights, strict=True):
        (single,) = torch.autograd.grad(sampled_loss(centers, x, y), centers, weight)
        torch.testing.assert_close(found, single.to_dense())
