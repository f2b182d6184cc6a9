"""Tests of the heads on a GPU: CUDA graphs, no synchronization, compile, float16 with GradScaler, a real size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gistops.nn import ConstellationClassifier, GistClassifier, MaxCosineHead, SubcenterClassifier

from ..cuda_graphs import captured

pytestmark = pytest.mark.cuda
D, K, B = 136, 601, 96
HEADS: dict[str, Callable[[], MaxCosineHead]] = {
    "constellation": lambda: ConstellationClassifier(D, K),
    "gist": lambda: GistClassifier(D, K),
    "subcenter": lambda: SubcenterClassifier(D, K),
    "rotation": lambda: ConstellationClassifier(D, K, transform="rotation"),
    "mlp": lambda: ConstellationClassifier(D, K, transform="mlp", hidden_features=16),
}
every_head = pytest.mark.parametrize("name", HEADS)


class Model(nn.Module):
    """A linear layer, which returns half-precision features under autocast, and a head. Returns the loss."""

    def __init__(self, head: MaxCosineHead) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = self.body(x)
        if isinstance(self.head, GistClassifier):
            balanced, random = self.head.losses(features[::2], y[::2], features[1::2], y[1::2])
            return random + 0.5 * balanced
        return self.head.loss(features, y)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(B, D), torch.randint(0, K, (B,))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, dtype: torch.dtype
) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss: Tensor = model(x, y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_of_a_graph_train_as_eager_steps(name: str, dtype: torch.dtype, seed: int) -> None:
    """Replays on new batches have the bits of eager steps."""
    model, (x, y) = Model(HEADS[name]()), batch()
    optimizer = make_optimizer(model)
    twins: list[tuple[nn.Module, torch.optim.Optimizer]] = []

    def keep() -> None:
        optimizer.zero_grad(set_to_none=True)
        twin = copy.deepcopy(model)
        twin_optimizer = make_optimizer(twin)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twins.append((twin, twin_optimizer))

    replay, loss = captured(lambda: one_step(model, optimizer, x, y, dtype), keep)
    twin, twin_optimizer = twins[0]
    for _ in range(3):
        new, target = batch()
        x.copy_(new)
        y.copy_(target)
        replay()
        assert torch.equal(loss, one_step(twin, twin_optimizer, new, target, dtype))
        assert same(model.parameters(), twin.parameters())


@every_head
def test_a_step_does_not_synchronize(name: str, seed: int) -> None:
    model, (x, y) = Model(HEADS[name]()), batch()
    optimizer = make_optimizer(model)

    def everything() -> None:
        one_step(model, optimizer, x, y, torch.bfloat16)
        model.head.predict_topk(x, 5)
        model.head(x)

    everything()  # first calls may synchronize
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["constellation", "gist"])
def test_a_compiled_step_has_the_gradients_of_eager_mode(name: str, seed: int) -> None:
    torch.compiler.reset()
    model, (x, y) = Model(HEADS[name]()), batch()
    x.requires_grad_()
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    compiled = torch.compile(model, fullgraph=True)
    for region in (torch.float32, torch.bfloat16):
        with torch.autocast("cuda", region, enabled=region != torch.float32):
            losses = compiled(x, y), model(x, y)
        torch.testing.assert_close(*losses, atol=1e-4 if region == torch.float32 else 5e-2, rtol=1e-4)
        ours, expected = (torch.autograd.grad(loss, leaves) for loss in losses)
        loose = 1e-4 if region == torch.float32 else 5e-2
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, atol=loose * float(b.abs().max()), rtol=loose)


@every_head
def test_float16_gradients_with_a_scaler_are_finite_and_close(name: str, seed: int) -> None:
    """The scaled gradients are finite in half precision, and the unscaled ones are close to those of float32."""
    model, (x, y) = Model(HEADS[name]()), batch()
    exact = copy.deepcopy(model)
    exact(x, y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    with torch.autocast("cuda", torch.float16):
        loss = model(x, y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for (parameter, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if p.numel():
            assert p.grad is not None, parameter
            assert q.grad is not None
            # Rounding changes the winner of near ties, which moves about a hundredth of the head's gradients to other
            # slots. The gradient of a temperature is a sum with cancellation.
            limit = (0.05 if "body" in parameter else 0.3) * q.grad.norm() + (
                0.01 if "tau" in parameter else 0
            )
            assert (p.grad - q.grad).norm() < limit, parameter
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**14, "a gradient was not finite"
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True) if p.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_deterministic_at_a_real_size(dtype: torch.dtype, seed: int) -> None:
    """256 rows of 2048 dimensions, 8142 classes: logits, slots, loss, top-k and all gradients."""
    head = ConstellationClassifier(2048, 8142)
    x, y = torch.randn(256, 2048), torch.randint(0, 8142, (256,))
    grad = torch.randn(256, 8142)
    leaves = [x.requires_grad_(), *head.parameters()]

    def bits() -> list[Tensor]:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            logits, slots = head(x, return_slots=True)
            loss = head.loss(x, y, label_smoothing=0.1)
            best = head.predict_topk(x, 5)
        gradients = (torch.autograd.grad(logits, leaves, grad), torch.autograd.grad(loss, leaves))
        return [logits, slots, loss, *best, *gradients[0], *gradients[1]]

    first = bits()
    torch.testing.assert_close(
        first[2], F.cross_entropy(first[0], y, label_smoothing=0.1), atol=1e-3, rtol=1e-4
    )
    for _ in range(5):
        torch.empty(1 << 24).normal_()  # changes the memory layout
        assert same(first, bits())
