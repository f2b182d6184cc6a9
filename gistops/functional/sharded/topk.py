"""The classes with the largest logits, and the winning slots, over sharded classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..._checks import check_class_vector, check_classifier, refuse_classes
from ..._classifier import Classifier
from ..._numbers import check_integer
from ..logits import checked_logits
from ..topk import local_topk
from .collectives import all_reduce, gather_rows
from .problem import Problem, agreed, local_classifier
from .shards import Batch, Shards, all_gather_single

#: Rows per chunk in `slot_counts`, which computes the logits of as many classes.
CHUNK_ROWS = 512


#: (rows [B, d], the classifiers of this process's classes, k, bias, return_lse, backend) -> values and classes [B, k],
#: slots [B, k, heads], and lse [B] if wanted.
BestOfLocal = Callable[[Tensor, Sequence[Classifier], int, Any, bool, str], tuple[Tensor, ...]]


def topk(
    input: Tensor,
    classifier: Classifier,
    k: int,
    class_bias: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """Return values, classes and slots [..., k] over the classes of all processes; with `return_lse` also lse [...].

    Arguments are those of the public functions, unchecked. Centers are a DTensor with placement Shard(0).
    """
    best = best_of_shards(input, [classifier], k, [class_bias], return_lse, backend, _best_of_local)
    values, classes, slots, *lse = best
    return values, classes, slots[..., 0], *lse


def _best_of_local(
    x: Tensor,
    classifiers: Sequence[Classifier],
    k: int,
    bias: Tensor | None,
    return_lse: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    values, classes, slots, *lse = local_topk(x, classifiers[0], k, bias, return_lse, backend)
    return values, classes, slots[..., None], *lse


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def best_of_shards(
    input: Tensor,
    classifiers: Sequence[Classifier],
    k: int,
    biases: Sequence[Tensor | None],
    return_lse: bool,
    backend: str | None,
    best_of_local: BestOfLocal,
) -> tuple[Tensor, ...]:
    """Return values and classes [..., k] and slots [..., k, heads] over all processes; with `return_lse` also lse [...].

    Args:
        input, k, return_lse, backend: as in `topk`.
        classifiers: one for each head, unchecked, with classes that are divided alike.
        biases: vectors [K], whose sum is added to the logits.
        best_of_local: computes the same over the classes of this process.
    """

    def check(
        shards: Shards, input: Tensor, classifier: Classifier
    ) -> tuple[dict[str, object], tuple[int, list[Classifier], Tensor | None]]:
        checked = check_integer("k", k, 1, shards.classes)
        parts = [shards.local_part("class_bias", bias) for bias in biases if bias is not None]
        for part in parts:
            check_class_vector("class_bias", part, shards.stop - shards.start, input)
        others = [check_classifier(input, local_classifier(shards, other)) for other in classifiers[1:]]
        facts: dict[str, object] = {"k": checked, "class_bias": len(parts), "return_lse": return_lse}
        return facts, (checked, [classifier, *others], sum(parts[1:], parts[0]) if parts else None)

    shards, batch, problem = agreed("top-k", input, classifiers[0], backend, check)
    k, local, bias = problem.more
    x = problem.input if problem.replicated_input else gather_rows(shards, batch.sizes, problem.input)
    dtype = torch.promote_types(*(c.compute_dtype(x) for c in (local[0], local[-1])))
    count, heads = min(k, shards.stop - shards.start), len(local)
    # A process with fewer classes fills up with -inf and with the class K, which come after all real ones.
    values = x.new_full((len(x), k + 1), -torch.inf, dtype=dtype)  # the last column is the log-sum-exp
    coded = x.new_full((len(x), k), shards.classes << 8 * heads, dtype=torch.int64)
    if count:
        best, classes, slots, *lse = best_of_local(x, local, count, bias, return_lse, problem.backend)
        values[:, :count] = best
        if return_lse:
            values[:, k] = lse[0]
        coded[:, :count] = classes + shards.start
        for slot in slots.unbind(-1):
            coded[:, :count] = coded[:, :count] * 256 + slot
    values, coded = (_exchanged(shards, batch, problem, t) for t in (values, coded))  # [size, B, ...]
    joint_lse = values[:, :, k].logsumexp(0).reshape(problem.shape)
    values, coded = (t.transpose(0, 1).flatten(1) for t in (values[:, :, :k], coded))  # [B, size · k]
    order = coded.sort(dim=1).indices  # by class: a stable sort by value then leaves ties in that order
    values, coded = values.gather(1, order), coded.gather(1, order)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    values, coded = (t.gather(1, order).reshape(*problem.shape, k) for t in (values, coded))
    slots = torch.stack([coded >> 8 * (heads - 1 - i) & 255 for i in range(heads)], -1).to(torch.uint8)
    found = (values, coded >> 8 * heads, slots)
    return (*found, joint_lse) if return_lse else found


def _exchanged(shards: Shards, batch: Batch, problem: Problem, x: Tensor) -> Tensor:
    """Return, for the rows of this process, what each process has found, [size, B, ...]; x: for all rows, [sum of B, ...]."""
    if shards.size == 1:
        return x[None]
    mine = len(problem.input)
    out = x.new_empty(shards.size * mine, *x.shape[1:])
    with shards.collective():
        if problem.replicated_input:
            all_gather_single(out, x.contiguous(), group=shards.group)
        else:
            dist.all_to_all_single(
                out, x.contiguous(), [mine] * shards.size, list(batch.sizes), group=shards.group
            )
    return out.view(shards.size, mine, *x.shape[1:])


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def slot_counts(
    input: Tensor, classifier: Classifier, labels: Any, slots: int, backend: str | None
) -> Tensor:
    """Return how many rows of the joint batch have their own class won by each slot, [slots], int64.

    Args:
        input, classifier, backend: as in `topk`.
        labels: the classes of this process's rows, [...], integer.
        slots: the number of slots.
    """

    def check(shards: Shards, input: Tensor, classifier: Classifier) -> tuple[dict[str, object], Tensor]:
        if labels.shape != input.shape[:-1]:
            raise ValueError(f"labels: expected shape {list(input.shape[:-1])}, got {list(labels.shape)}")
        own = labels.to(input.device, torch.int64)
        if own.device.type == "cpu":
            outside = (own < 0) | (own >= shards.classes)
            refuse_classes("labels", own, outside, f"0 to {shards.classes - 1}")
        return {}, own.reshape(-1)

    shards, batch, problem = agreed("slot usage", input, classifier, backend, check)
    x, own = problem.input, problem.more
    if not problem.replicated_input:
        x, own = (gather_rows(shards, batch.sizes, t) for t in (x, own))
    mine = (own >= shards.start) & (own < shards.stop)
    counts = torch.zeros(slots, dtype=torch.int64, device=x.device)
    for features, classes in zip(x[mine].split(CHUNK_ROWS), own[mine].split(CHUNK_ROWS), strict=True):
        part = problem.classifier._replace(centers=problem.classifier.centers[classes - shards.start])
        _, won = checked_logits(features, part, problem.backend, True, None)
        counts += torch.bincount(won.diagonal().long(), minlength=slots)
    return all_reduce(shards, counts)
