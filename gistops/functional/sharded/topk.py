"""The classes with the largest logits, and the winning slots, over sharded classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..._checks import check_integer
from ..._classifier import Classifier
from ..logits import checked_logits
from ..topk import topk as local_topk
from .collectives import all_reduce, gather_rows
from .problem import Problem, agreed
from .shards import Batch, Shards

#: Rows per chunk in `slot_counts`, which computes the logits of as many classes.
CHUNK_ROWS = 512


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
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

    def check(
        shards: Shards, input: Tensor, classifier: Classifier
    ) -> tuple[dict[str, object], tuple[int, Tensor | None]]:
        checked = check_integer("k", k, 1, shards.classes)
        bias = shards.local_part("class_bias", class_bias)
        facts: dict[str, object] = {"k": checked, "class_bias": bias is not None, "return_lse": return_lse}
        return facts, (checked, bias)

    shards, batch, problem = agreed("top-k", input, classifier, backend, check)
    k, bias = problem.more
    x = problem.input if problem.replicated_input else gather_rows(shards, batch.sizes, problem.input)
    values, classes, slots, lse = _of_local_classes(shards, problem, x, k, bias)
    values = torch.cat([values, lse[:, None]], 1)
    coded = classes * 256 + slots
    values, coded = (_exchanged(shards, batch, problem, t) for t in (values, coded))  # [size, B, ...]
    lse = values[:, :, k].logsumexp(0)
    values, coded = (t.transpose(0, 1).flatten(1) for t in (values[:, :, :k], coded))  # [B, size · k]
    order = coded.sort(
        dim=1, stable=True
    ).indices  # by class: a stable sort by value then leaves ties in that order
    values, coded = values.gather(1, order), coded.gather(1, order)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    values, coded = values.gather(1, order), coded.gather(1, order)
    found = (values, coded // 256, (coded % 256).to(torch.uint8))
    outputs = tuple(t.reshape(*problem.shape, k) for t in found)
    return (*outputs, lse.reshape(problem.shape)) if return_lse else outputs


def _of_local_classes(
    shards: Shards, problem: Problem, x: Tensor, k: int, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return values, classes and slots [B, k] and the log-sum-exp [B] over this process's classes.

    A process with fewer classes fills up with -inf and with the class K, which come after all real ones.
    """
    dtype, count = problem.classifier.compute_dtype(x), min(k, shards.stop - shards.start)
    values = x.new_full((len(x), k), -torch.inf, dtype=dtype)
    classes = x.new_full((len(x), k), shards.classes, dtype=torch.int64)
    slots = x.new_zeros((len(x), k), dtype=torch.uint8)
    lse = x.new_full((len(x),), -torch.inf, dtype=dtype)
    if count:
        best = local_topk(x, problem.classifier, count, bias, True, problem.backend)
        values[:, :count], classes[:, :count], slots[:, :count] = best[0], best[1] + shards.start, best[2]
        lse = best[3]
    return values, classes, slots, lse


def _exchanged(shards: Shards, batch: Batch, problem: Problem, x: Tensor) -> Tensor:
    """Return, for the rows of this process, what each process has found, [size, B, ...]; x: for all rows, [sum of B, ...]."""
    if shards.size == 1:
        return x[None]
    mine = len(problem.input)
    out = x.new_empty(shards.size * mine, *x.shape[1:])
    with shards.collective():
        if problem.replicated_input:
            dist.all_gather_into_tensor(out, x.contiguous(), group=shards.group)
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
        flat = labels.reshape(-1).to(input.device, torch.int64)
        if flat.device.type == "cpu" and ((flat < 0) | (flat >= shards.classes)).any():
            wrong = flat[(flat < 0) | (flat >= shards.classes)][0]
            raise IndexError(f"labels: expected 0 to {shards.classes - 1}, got {int(wrong)}")
        return {}, flat

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
