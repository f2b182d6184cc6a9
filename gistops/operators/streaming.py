"""Kernels for the streaming operators over a family's kernels for logits, in chunks of classes: what GPUs use.

Nothing waits for the device. A chunk's scores and what is made of them take some 15 bytes each. Most calls are one chunk,
which spares launches, passes and copies: scores are overwritten where nothing else needs them, and gradients are those of
the chunk. The backward makes the scores again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import Needs, Shared, Sums, scorer

_NONE = -torch.inf


class Streaming:
    """Kernels of the operators of a family that has `<family>_forward` and `<family>_backward`."""

    def __init__(self, family: str) -> None:
        self.family = family

    def free_forward(
        self, input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`logits.FORWARD_SCHEMA` for centers [K, M, d]."""
        return _logits(scorer(self.family, input, centers, displacements, tau, None, None, allow_tf32))

    def free_backward(
        self,
        grad: Tensor,
        input: Tensor,
        centers: Tensor,
        displacements: Tensor,
        tau: Tensor,
        logits: Tensor,
        slots: Tensor,
        center_rnorms: Tensor,
        input_rnorms: Tensor,
        need_input: bool,
        need_centers: bool,
        need_displacements: bool,
        need_tau: bool,
        allow_tf32: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`logits.BACKWARD_SCHEMA` for centers [K, M, d]."""
        over = scorer(self.family, input, centers, displacements, tau, None, None, allow_tf32)
        needs = Needs(need_input, need_centers, need_displacements, need_tau)
        made = _gradients(over, grad, logits, slots, center_rnorms, input_rnorms, needs)
        return made[0], made[1], made[2], made[3]

    def tabled_forward(
        self,
        input: Tensor,
        centers: Tensor,
        tau: Tensor,
        feature_table: Tensor,
        class_tables: Tensor,
        allow_tf32: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`tabled.FORWARD_SCHEMA`."""
        none = input.new_empty(0, input.shape[1])
        return _logits(
            scorer(self.family, input, centers, none, tau, feature_table, class_tables, allow_tf32)
        )

    def tabled_backward(
        self,
        grad: Tensor,
        input: Tensor,
        centers: Tensor,
        tau: Tensor,
        feature_table: Tensor,
        class_tables: Tensor,
        logits: Tensor,
        slots: Tensor,
        center_rnorms: Tensor,
        input_rnorms: Tensor,
        need_input: bool,
        need_centers: bool,
        need_tau: bool,
        allow_tf32: bool = False,
    ) -> tuple[Tensor, ...]:
        """`tabled.BACKWARD_SCHEMA`."""
        none = input.new_empty(0, input.shape[1])
        over = scorer(self.family, input, centers, none, tau, feature_table, class_tables, allow_tf32)
        needs = Needs(need_input, need_centers, False, need_tau)
        made = _gradients(over, grad, logits, slots, center_rnorms, input_rnorms, needs)
        return made[0], made[1], made[3], made[4], made[5]

    def lse_forward(
        self,
        input: Tensor,
        centers: Tensor,
        displacements: Tensor,
        tau: Tensor,
        class_bias: Tensor | None,
        feature_table: Tensor | None,
        class_tables: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        allow_tf32: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`loss.FORWARD_SCHEMA`."""
        over = scorer(
            self.family, input, centers, displacements, tau, feature_table, class_tables, allow_tf32
        )
        target_logits = input.new_zeros(input.shape[0], 1, dtype=over.dtype)
        sums = target_logits[:, 0] if weight is not None else input.new_empty(0, dtype=over.dtype)
        none, counted = target_logits.new_full((), _NONE), target != ignore_index
        parts = []
        for part in over.parts():
            z = over.forward(part)[0]
            place, here = _targets(target, counted, part)
            own = z.gather(1, place)
            target_logits = torch.where(here, own, target_logits)
            if weight is not None:
                sums = sums + (z * weight[part].to(z.dtype)).sum(1)
            if class_bias is not None:
                own = z.add_(class_bias[part].to(z.dtype)).gather(1, place)
            parts.append(z.scatter_(1, place, torch.where(here, none, own)).logsumexp(1))
        return _logsumexp(parts, none.expand(input.shape[0])), target_logits[:, 0], sums

    def lse_backward(
        self,
        grad_lse: Tensor,
        grad_target: Tensor,
        grad_sums: Tensor,
        input: Tensor,
        centers: Tensor,
        displacements: Tensor,
        tau: Tensor,
        class_bias: Tensor | None,
        feature_table: Tensor | None,
        class_tables: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        lse: Tensor,
        need_input: bool,
        need_centers: bool,
        need_displacements: bool,
        need_tau: bool,
        need_bias: bool,
        allow_tf32: bool = False,
    ) -> tuple[Tensor, ...]:
        """`loss.BACKWARD_SCHEMA`."""
        over = scorer(
            self.family, input, centers, displacements, tau, feature_table, class_tables, allow_tf32
        )
        needs = Needs(need_input, need_centers, need_displacements, need_tau)
        sums = Sums(over, needs)
        need_bias = need_bias and class_bias is not None
        bias_gradient = lse.new_empty(centers.shape[0] if need_bias else 0)
        shift = torch.where(lse == _NONE, torch.inf, lse)[:, None]  # no other class: probability 0
        zero, counted = lse.new_zeros(()), target != ignore_index
        for part in over.parts():
            made = over.forward(part)
            place, here = _targets(target, counted, part)
            z = made[0] if class_bias is None else made[0] + class_bias[part].to(lse.dtype)
            grad = (z - shift).exp_().mul_(grad_lse[:, None])
            of_target = grad_target[:, None]
            if need_bias:
                _put(grad, place, here, zero)
                bias_gradient[part] = grad.sum(0)
            if weight is not None:
                shares = weight[part].to(lse.dtype)
                grad.addcmul_(grad_sums[:, None], shares)
                of_target = torch.addcmul(of_target, grad_sums[:, None], shares[place])
            _put(grad, place, here, of_target)
            sums.add(part, over.backward(part, grad, made, needs))
        gradients = sums.gradients()
        of_bias = bias_gradient if class_bias is None else bias_gradient.to(class_bias.dtype)
        return *gradients[:4], of_bias, *gradients[4:]

    def topk(
        self,
        input: Tensor,
        centers: Tensor,
        displacements: Tensor,
        tau: Tensor,
        class_bias: Tensor | None,
        feature_table: Tensor | None,
        class_tables: Tensor | None,
        k: int,
        need_lse: bool = False,
        allow_tf32: bool = False,
        norms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`topk.SCHEMA`; norms are made anew, in the same pass as the products."""
        over = scorer(
            self.family, input, centers, displacements, tau, feature_table, class_tables, allow_tf32
        )
        best: tuple[Tensor, ...] = ()
        parts = []
        for part in over.parts():
            z, slots = over.forward(part)[:2]
            if class_bias is not None:
                z = z + class_bias[part].to(z.dtype)
            if need_lse:
                parts.append(z.logsumexp(1))
            classes = torch.arange(part.start, part.stop, device=z.device).expand_as(z)
            values, order = _largest(z, k)
            some = (values, classes.gather(1, order), slots.gather(1, order))
            best = join_best(best, some, k)
        none = input.new_empty(0, dtype=over.dtype)
        lse = _logsumexp(parts, none) if need_lse else none
        values, best_classes, best_slots = best
        return values, best_classes, best_slots, lse


def _logits(over: Shared) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All chunks' logits, slots and norms in one tensor each."""
    made = [over.forward(part) for part in over.parts()]
    if not made:  # no class
        made = [over.forward(slice(0, 0))]
    if len(made) == 1:
        logits, slots, center_rnorms, input_rnorms = made[0]
        return logits, slots.contiguous(), center_rnorms.contiguous(), input_rnorms
    logits, slots, center_rnorms = (torch.cat([one[i] for one in made], 1) for i in range(3))
    return logits, slots, center_rnorms, made[0][3]


def _gradients(
    over: Shared,
    grad: Tensor,
    logits: Tensor,
    slots: Tensor,
    center_rnorms: Tensor,
    input_rnorms: Tensor,
    needs: Needs,
) -> tuple[Tensor, ...]:
    sums = Sums(over, needs)
    for part in over.parts():
        made = (logits[:, part], slots[:, part], center_rnorms[:, part], input_rnorms)
        sums.add(part, over.backward(part, grad[:, part], made, needs))
    return sums.gradients()


def _targets(target: Tensor, counted: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The place of a row's target in the chunk, and whether it is there and counts, [B, 1] each."""
    local = target - part.start if part.start else target
    place = local.clamp(0, part.stop - part.start - 1)
    return place[:, None], ((place == local) & counted)[:, None]


def _put(scores: Tensor, place: Tensor, here: Tensor, value: Tensor) -> None:
    """Overwrite the scores of the targets that are here."""
    scores.scatter_(1, place, torch.where(here, value, scores.gather(1, place)))


def _logsumexp(parts: list[Tensor], none: Tensor) -> Tensor:
    """Of the chunks' own; `none` where there is no chunk."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).logsumexp(0) if parts else none.contiguous()


def join_best(best: tuple[Tensor, ...], more: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
    """The k best of both, in order: scores, classes and slots [B, ·]; those of `best`, or nothing, come first."""
    joined = [torch.cat(pair, 1) for pair in zip(best, more, strict=True)] if best else list(more)
    order = _largest(joined[0], k)[1]
    return tuple(x.gather(1, order) for x in joined)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, or all, in order, and where they are: of equals the first, NaN before all."""
    k = min(k, scores.shape[1])
    if scores.dtype == torch.float64:
        values, order = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :k], order[:, :k]
    # topk leaves the order of equals open. So it gets distinct keys: the score's bits, ordered as integers, then the place.
    scores = torch.where(scores.isnan(), torch.nan, scores) + 0.0  # one NaN, one zero
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    places = torch.arange(scores.shape[1], device=scores.device)
    order = ((ordered << 32) | (0x7FFFFFFF - places)).topk(k, dim=1).indices
    return scores.gather(1, order), order
