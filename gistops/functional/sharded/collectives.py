"""Collectives with their derivatives.

The computation between `enter` and `leave` is the same in all processes, but for the classes that each one scores. Its gradients are
therefore partial sums over the classes, which `enter` adds up. The objective is the mean over the processes of the values that each
one differentiates, as under DistributedDataParallel. A second derivative would lack the parts of the other processes, so it raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...operators.registry import compute_dtype
from .shards import Batch, Shards, all_gather_single, reduce_scatter_single

INPUT = 1  # the bit of input in `Batch.needs`; parameter i has the bit 2 << i


def gather_rows(shards: Shards, sizes: Sequence[int], x: Tensor) -> Tensor:
    """Return the rows of all processes, [sum of sizes, ...], in the order of the ranks."""
    longest = max(sizes)
    if shards.size == 1 or longest == 0:
        return x
    out = x.new_empty(shards.size * longest, *x.shape[1:])
    with shards.collective():
        all_gather_single(out, _padded(x, longest), group=shards.group)
    if min(sizes) == longest:
        return out
    return torch.cat([part[:n] for part, n in zip(out.split(longest), sizes, strict=True)])


def reduce_scatter_rows(shards: Shards, sizes: Sequence[int], x: Tensor) -> Tensor:
    """Return the sum over the processes of x [sum of sizes, ...], for the rows of this process."""
    longest = max(sizes)
    if shards.size == 1 or longest == 0:
        return x
    if min(sizes) < longest:
        x = torch.cat([_padded(part, longest) for part in x.split(list(sizes))])
    out = x.new_empty(longest, *x.shape[1:])
    with shards.collective():
        reduce_scatter_single(out, x.contiguous(), group=shards.group)
    return out[: sizes[shards.rank]]


def all_reduce(shards: Shards, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce x in-place over the processes and return it."""
    if shards.size > 1:
        with shards.collective():
            dist.all_reduce(x, op, group=shards.group)
    return x


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def all_reduce_together(shards: Shards, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums over the processes of tensors of one dtype, in one collective."""
    flat = all_reduce(shards, torch.cat([x.reshape(-1) for x in tensors]))
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def enter(
    shards: Shards, batch: Batch, replicated_input: bool, input: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the rows of all processes, and the parameters that all processes have.

    Args:
        shards: the division of the classes.
        batch: the joint batch.
        replicated_input: all processes have the same rows.
        input: the rows of this process, [B, d].
        parameters: tensors that are equal in all processes.
    """
    if batch.needs & ~(~0 << (len(parameters) + 1)) and torch.is_grad_enabled():
        if not any(x.requires_grad for x in (input, *parameters)):
            input = input.detach().requires_grad_()  # the backward of another process waits for this one's
        x, *parameters = _Enter.apply(shards, batch, replicated_input, input, *parameters)  # type: ignore[no-untyped-call]
        return x, list(parameters)
    return input if replicated_input else gather_rows(shards, batch.sizes, input), list(parameters)


class _Enter(torch.autograd.Function):
    """One node, so that its collectives have one order in all processes."""

    @staticmethod
    def forward(
        ctx: Any, shards: Shards, batch: Batch, replicated_input: bool, input: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shards, ctx.batch, ctx.replicated_input = shards, batch, replicated_input
        x = input if replicated_input else gather_rows(shards, batch.sizes, input)
        return x.view_as(x), *(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shards, batch = ctx.shards, ctx.batch
        grad_input = None
        if batch.needs & INPUT:
            wide = grad.to(compute_dtype(grad))  # sums of rounded sums would lose digits
            if ctx.replicated_input:
                grad_input = all_reduce(shards, wide.clone())
            else:
                grad_input = reduce_scatter_rows(shards, batch.sizes, wide) * shards.size
            grad_input = grad_input.to(grad.dtype)
        chosen = [i for i in range(len(grads)) if batch.needs & (2 << i)]
        sums: dict[int, Tensor] = {}
        if chosen:
            dtype = compute_dtype(*(grads[i] for i in chosen))
            totals = all_reduce_together(shards, [grads[i].to(dtype) for i in chosen])
            sums = {i: total.to(grads[i].dtype) for i, total in zip(chosen, totals, strict=True)}
        needed = ctx.needs_input_grad[3:]
        out = (grad_input, *(sums.get(i) for i in range(len(grads))))
        return None, None, None, *(g if need else None for g, need in zip(out, needed, strict=True))


def once(shards: Shards, x: Tensor) -> Tensor:
    """Return x, a parameter from `enter`, for a computation that all processes repeat: its gradient counts once."""
    if shards.size == 1 or not x.requires_grad:
        return x
    result: Tensor = _Once.apply(x, shards.size)  # type: ignore[no-untyped-call]
    return result


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.div(ctx.size), None


def join(shards: Shards, lse: Tensor, sums: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the log of the sum of exp(lse) over the processes, [B], and the sums of other tensors of its dtype.

    Its backward needs no collective: all processes know the gradients of the joint values.
    """
    joint, *totals = _Join.apply(shards, lse, *sums)  # type: ignore[no-untyped-call]
    return joint, totals


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Shards, lse: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        largest = all_reduce(shards, lse.clone(), dist.ReduceOp.MAX)
        largest = torch.where(largest == -torch.inf, 0, largest)  # no class anywhere, or all biases -inf
        total, *totals = all_reduce_together(shards, [(lse - largest).exp(), *sums])
        joint = largest + total.log()
        ctx.save_for_backward(lse, joint)
        return joint, *totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lse, joint = ctx.saved_tensors
        share = torch.where(lse == -torch.inf, 0, (lse - joint).exp())
        return None, grad * share, *grads


def leave(shards: Shards, batch: Batch, replicated_input: bool, *values: Tensor) -> list[Tensor]:
    """Return scalars as they are, and of values of all rows, [sum of sizes], those of the rows of this process.

    The gradient of a value is the mean over the processes of the gradients that each one has for it.
    """
    if batch.needs and torch.is_grad_enabled():
        return list(_Leave.apply(shards, batch, replicated_input, *values))  # type: ignore[no-untyped-call]
    return [_own_rows(shards, batch, replicated_input, value) for value in values]


def _own_rows(shards: Shards, batch: Batch, replicated_input: bool, value: Tensor) -> Tensor:
    if value.dim() == 0 or replicated_input:
        return value
    own: Tensor = value.split(batch.sizes)[shards.rank]
    return own


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shards: Shards, batch: Batch, replicated_input: bool, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shards, ctx.batch, ctx.replicated_input = shards, batch, replicated_input
        # Copies: the backward of the rows may need the values, which the caller may change in-place.
        return tuple(_own_rows(shards, batch, replicated_input, value).clone() for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shards = ctx.shards
        joint = []
        for grad in grads:
            if grad.dim() == 0 or ctx.replicated_input:
                grad = all_reduce(shards, grad.clone())
            else:
                grad = gather_rows(shards, ctx.batch.sizes, grad)
            joint.append(grad / shards.size)
        return None, None, None, *joint
