"""Sharded heads in the ways that PyTorch uses a module, against one process on the joint batch."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from gistops.distributed import shard_classes
from gistops.nn.head import MaxCosineHead

from ..processes import in_group
from .test_sharded import D, compare, make_head, rows_of, whole

N = 29


class Uses:
    """A sharded head and a whole one, and a batch, in one of several processes."""

    def __init__(self, rank: int, size: int, mesh: DeviceMesh, kind: str, classes: int) -> None:
        self.rank, self.size, self.mesh, self.kind, self.classes = rank, size, mesh, kind, classes
        self.mine = rows_of(rank, size, N)
        torch.manual_seed(classes)
        self.x, self.y = torch.randn(N, D, dtype=torch.float64), torch.randint(classes, (N,))

    def heads(self) -> tuple[MaxCosineHead, MaxCosineHead]:
        sharded = shard_classes(make_head(self.kind, self.classes), self.mesh)
        return make_head(self.kind, self.classes), sharded

    def check(
        self,
        use: Callable[[MaxCosineHead, Tensor, Tensor], Tensor | None],
        cast: Callable[[Tensor], Tensor] = lambda x: x,
        change: Callable[[MaxCosineHead], object] = lambda head: None,
        rounding: float = 0.0,
    ) -> None:
        """Compare the result and all gradients of `use(head, features, targets)`.

        Args:
            use: calls the loss and the backward.
            cast: makes the features.
            change: is called with each head.
            rounding: relative error of rounded gradients, for the largest of them.
        """
        alone, sharded = self.heads()
        for head in (alone, sharded):
            change(head)
        label = f"{getattr(use, '__name__', use)} {self.kind} {self.classes}"
        x, own = (cast(part).clone().requires_grad_() for part in (self.x, self.x[self.mine]))
        expected, found = use(alone, x, self.y), use(sharded, own, self.y[self.mine])
        pairs = [
            ("result", found, expected),
            ("input", own.grad, None if x.grad is None else x.grad[self.mine] * self.size),
        ]
        pairs += [
            (name, p.grad, q.grad)
            for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True)
        ]
        for name, a, b in pairs:
            assert (a is None) == (b is None), f"{label} {name}"
            if a is None or b is None:
                continue
            a = whole(a)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{label} {name}"
            if not rounding:
                compare(a, b, f"{label} {name}")
            elif b.numel():
                a, b = a.detach().double(), b.detach().double()
                difference = float((a - b).abs().max() / (b.abs().max() + 1e-300))
                assert difference <= rounding, f"{label} {name}: {difference:.2e}"


def twice(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    loss = head.loss(x, y)
    loss.backward(retain_graph=True)
    loss.backward()
    return loss


def accumulated(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    """Two calls, then their backwards in the reverse order, then a third call."""
    first, second = head.loss(x, y), head.loss(2 * x + 1, y, reduction="sum")
    second.backward()
    first.backward()
    head.loss(x.detach(), y, label_smoothing=0.1).backward()
    return first + second


def without_gradients(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        loss = head.loss(x, y)
    assert not loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(loss, head.loss(x, y))
    return loss


def head_only(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    loss = head.loss(x.detach(), y)
    loss.backward()
    return loss


def plain(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    loss = head.loss(x, y)
    loss.backward()
    return loss


def unused_lse(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    loss, _ = head.loss(x, y, return_lse=True)
    loss.backward()
    return loss


def checkpointed(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    loss = checkpoint(head.loss, torch.tanh(x), y, use_reentrant=False)
    loss.backward()
    return loss


def checkpointed_reentrant(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    loss = checkpoint(head.loss, torch.tanh(x), y, use_reentrant=True)
    loss.backward()
    return loss


def autocast(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    weight = torch.eye(D, dtype=x.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        features = torch.nn.functional.linear(x, weight)
        assert features.dtype == torch.bfloat16
        loss = head.loss(features, y)
    assert loss.dtype == torch.float32
    loss.backward()
    return loss


def more_dimensions(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    """Features [1, B, d], not contiguous, and int32 targets."""
    spread = torch.stack([x, x], dim=2)[None, ..., 0]
    rows, lse = head.loss(spread.detach(), y[None].int(), reduction="none", return_lse=True)
    assert rows.shape == lse.shape == (1, len(y))
    loss = head.loss(spread, y[None].int())
    loss.backward()
    return loss


def copied(head: MaxCosineHead, x: Tensor, y: Tensor) -> Tensor:
    """A copy and a pickle train as the head does; a state dict keeps the values."""
    before = head.loss(x.detach(), y)
    other, third = copy.deepcopy(head), pickle.loads(pickle.dumps(head))
    third.loss(x, y).backward()
    for p, q in zip(head.parameters(), third.parameters(), strict=True):
        p.grad = q.grad
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=False)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(head.loss(x.detach(), y), before)
    other.load_state_dict(state)
    assert torch.equal(other.loss(x.detach(), y), before)
    return before


def check_second_derivatives(uses: Uses) -> None:
    """Check that they raise, because they would lack the parts of other processes."""
    _, head = uses.heads()
    for head.backend in ("cpu", "reference"):
        x = uses.x[uses.mine].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(head.loss(x, uses.y[uses.mine]), x, create_graph=True)
        with pytest.raises(
            (RuntimeError, NotImplementedError), match=r"differentiate twice|differentiable once"
        ):
            gradient.square().sum().backward()


def check_uses(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,))
    every = (
        twice,
        accumulated,
        without_gradients,
        head_only,
        plain,
        unused_lse,
        checkpointed,
        checkpointed_reentrant,
        more_dimensions,
        copied,
    )
    for kind, classes in (("translation", 31), ("translation", 1), ("rotation", 31), ("subcenters", 5)):
        uses = Uses(rank, size, mesh, kind, classes)
        check_second_derivatives(uses)
        for use in every:
            uses.check(use)
        uses.check(plain, change=lambda head: head.requires_grad_(False))
        uses.check(plain, change=lambda head: head.centers.requires_grad_(False))
        for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
            for of_head in (torch.float32, dtype):
                uses.check(
                    plain, partial(Tensor.to, dtype=dtype), partial(nn.Module.to, dtype=of_head), rounding
                )
        uses.check(autocast, Tensor.float, nn.Module.float, 2e-2)


@pytest.mark.parametrize("size", [1, 3])
def test_uses(size: int, tmp_path: Path) -> None:
    in_group(check_uses, size, tmp_path, size)
