"""Loss, best k and free centres from kernels for logits, in chunks of classes: what GPUs use.

Nothing waits for the device. A chunk's scores and what is made of them take some 15 bytes each, at most
`CHUNK_ELEMENTS` of them at once, so that most stay in the cache of a large GPU. The backward makes the scores again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .registry import compute_dtype

#: Scores in a chunk, at most: 16 MiB in float32.
CHUNK_ELEMENTS = 1 << 22
_NONE = -torch.inf


class Streaming:
    """Kernels for the streaming operators of a family, over its operators for logits."""

    def __init__(self, family: str) -> None:
        self.family = family

    def _forward(
        self, input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = (input, centers, displacements, tau, allow_tf32)
        if centers.dim() == 3:
            return self.free_forward(*arguments)
        made: tuple[Tensor, Tensor, Tensor, Tensor] = getattr(torch.ops.gistops, f"{self.family}_forward")(
            *arguments
        )
        return made

    def _backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if arguments[2].dim() == 3:
            return self.free_backward(*arguments)
        made: tuple[Tensor, Tensor, Tensor, Tensor] = getattr(torch.ops.gistops, f"{self.family}_backward")(
            *arguments
        )
        return made

    def free_forward(
        self, input: Tensor, centers: Tensor, displacements: Tensor, tau: Tensor, allow_tf32: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`FORWARD_SCHEMA` for centers [K, M, d]: a cosine classifier of K·M classes, and the best of every M."""
        batch, (classes, count, _) = input.shape[0], centers.shape
        dtype = compute_dtype(input, centers, displacements)
        logits = input.new_empty(batch, classes, dtype=dtype)
        slots = input.new_empty(batch, classes, dtype=torch.uint8)
        rnorms = input.new_empty(count, classes, dtype=dtype)
        input_rnorms = input.new_ones(batch, dtype=dtype)
        for part in _chunks(batch, centers):
            flat = centers[part].flatten(0, 1)
            z, _, r, input_rnorms = self._forward(input, flat, displacements, tau, allow_tf32)
            scores = z.unflatten(1, (-1, count))
            best = scores[:, :, 0]
            slot = torch.zeros_like(best, dtype=torch.uint8)
            for j in range(1, count):
                score = scores[:, :, j]
                wins = (score > best) | (score.isnan() & ~best.isnan())
                best = torch.where(wins, score, best)
                slot = torch.where(wins, j, slot)
            logits[:, part] = best
            slots[:, part] = slot
            rnorms[:, part] = r.unflatten(1, (-1, count))[0].T
        return logits, slots, rnorms, input_rnorms

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
        """`BACKWARD_SCHEMA` for centers [K, M, d]: each gradient goes to the centre that won."""
        count = centers.shape[1]
        sums = _Sums(
            input, centers, displacements, tau, (need_input, need_centers, need_displacements, need_tau)
        )
        for part in _chunks(input.shape[0], centers):
            chosen = slots[:, part, None].long()
            z = logits[:, part, None].expand(-1, -1, count)
            routed = torch.zeros_like(z, memory_format=torch.contiguous_format)
            routed = routed.scatter_(2, chosen, grad[:, part, None])
            sums.add(
                part,
                self._backward(
                    routed.flatten(1),
                    input,
                    centers[part].flatten(0, 1),
                    displacements,
                    tau,
                    z.flatten(1),
                    torch.zeros_like(routed, dtype=torch.uint8).flatten(1),
                    center_rnorms[:, part].T.reshape(1, -1),
                    input_rnorms,
                    need_input,
                    need_centers,
                    need_displacements,
                    need_tau,
                    allow_tf32,
                ),
            )
        return sums.gradients()

    def lse_forward(
        self,
        input: Tensor,
        centers: Tensor,
        displacements: Tensor,
        tau: Tensor,
        class_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        allow_tf32: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`loss.FORWARD_SCHEMA`."""
        dtype = compute_dtype(input, centers, displacements)
        target_logits = input.new_zeros(input.shape[0], dtype=dtype)
        sums = torch.zeros_like(target_logits) if weight is not None else input.new_empty(0, dtype=dtype)
        parts = [torch.full_like(target_logits, _NONE)]
        for part in _chunks(input.shape[0], centers):
            z = self._forward(input, centers[part], displacements, tau, allow_tf32)[0]
            place, here = _targets(target, ignore_index, part)
            target_logits = torch.where(here, z.gather(1, place)[:, 0], target_logits)
            if weight is not None:
                sums = sums + (z * weight[part].to(dtype)).sum(1)
            parts.append(_others(z, class_bias, part, place, here).logsumexp(1))
        return torch.stack(parts).logsumexp(0), target_logits, sums

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`loss.BACKWARD_SCHEMA`."""
        needs = (need_input, need_centers, need_displacements, need_tau)
        sums = _Sums(input, centers, displacements, tau, needs)
        need_bias = need_bias and class_bias is not None
        bias_gradient = lse.new_empty(centers.shape[0] if need_bias else 0)
        shift = torch.where(lse == _NONE, torch.inf, lse)[:, None]  # no other class: probability 0
        for part in _chunks(input.shape[0], centers):
            arguments = (input, centers[part], displacements, tau)
            saved = self._forward(*arguments, allow_tf32)
            place, here = _targets(target, ignore_index, part)
            grad = (_others(saved[0], class_bias, part, place, here) - shift).exp() * grad_lse[:, None]
            if need_bias:
                bias_gradient[part] = grad.sum(0)
            if weight is not None:
                grad = grad + grad_sums[:, None] * weight[part].to(grad.dtype)
            of_target = grad.gather(1, place) + torch.where(here, grad_target, 0)[:, None]
            grad = grad.scatter(1, place, of_target)
            sums.add(part, self._backward(grad, *arguments, *saved, *needs, allow_tf32))
        made = bias_gradient if class_bias is None else bias_gradient.to(class_bias.dtype)
        return *sums.gradients(), made

    def topk(
        self,
        input: Tensor,
        centers: Tensor,
        displacements: Tensor,
        tau: Tensor,
        class_bias: Tensor | None,
        k: int,
        need_lse: bool = False,
        allow_tf32: bool = False,
        norms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`topk.SCHEMA`; norms are made anew, in the same pass as the products."""
        batch = input.shape[0]
        dtype = compute_dtype(input, centers, displacements)
        best = (
            input.new_empty(batch, 0, dtype=dtype),
            input.new_empty(batch, 0, dtype=torch.int64),
            input.new_empty(batch, 0, dtype=torch.uint8),
        )
        parts = []
        for part in _chunks(batch, centers):
            z, slots = self._forward(input, centers[part], displacements, tau, allow_tf32)[:2]
            if class_bias is not None:
                z = z + class_bias[part].to(dtype)
            if need_lse:
                parts.append(z.logsumexp(1))
            classes = torch.arange(part.start, part.stop, device=z.device).expand_as(z)
            values, order = _largest(z, k)
            some = (values, classes.gather(1, order), slots.gather(1, order))
            joined = tuple(torch.cat(pair, 1) for pair in zip(best, some, strict=True))
            _, order = _largest(joined[0], k)
            best = tuple(x.gather(1, order) for x in joined)  # type: ignore[assignment]
        lse = torch.stack(parts).logsumexp(0) if need_lse else input.new_empty(0, dtype=dtype)
        return *best, lse


class _Sums:
    """Gradients that come in chunks of classes: of features, displacements and tau summed, of centres put together."""

    def __init__(
        self,
        input: Tensor,
        centers: Tensor,
        displacements: Tensor,
        tau: Tensor,
        needs: tuple[bool, bool, bool, bool],
    ) -> None:
        self.arguments = (input, centers, displacements, tau)
        self.needs = needs
        dtype = compute_dtype(input, centers, displacements)
        self.sums = [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if x is centers
            else torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
            for x, needed in zip(self.arguments, needs, strict=True)
            if needed
        ]

    def add(self, part: slice, gradients: tuple[Tensor, ...]) -> None:
        made = (g for g, needed in zip(gradients, self.needs, strict=True) if needed)
        of = (x for x, needed in zip(self.arguments, self.needs, strict=True) if needed)
        for total, gradient, argument in zip(self.sums, made, of, strict=True):
            if argument is self.arguments[1]:
                total[part] = gradient.reshape(total[part].shape)
            else:
                total += gradient

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sums = iter(self.sums)
        return tuple(  # type: ignore[return-value]
            next(sums).to(x.dtype) if needed else x.new_empty(0)
            for x, needed in zip(self.arguments, self.needs, strict=True)
        )


def _chunks(batch: int, centers: Tensor) -> Iterator[slice]:
    vectors = centers.shape[1] if centers.dim() == 3 else 1
    size = max(64, CHUNK_ELEMENTS // (max(batch, 1) * vectors))
    classes = centers.shape[0]
    return (slice(start, min(start + size, classes)) for start in range(0, classes, size))


def _targets(target: Tensor, ignore_index: int, part: slice) -> tuple[Tensor, Tensor]:
    """Where in the chunk a row's target is, [B, 1], and whether it is there, [B]."""
    place = target - part.start
    here = (place >= 0) & (target < part.stop) & (target != ignore_index)
    return torch.where(here, place, 0)[:, None], here


def _others(z: Tensor, class_bias: Tensor | None, part: slice, place: Tensor, here: Tensor) -> Tensor:
    """Scores with their bias, -inf for the target."""
    if class_bias is not None:
        z = z + class_bias[part].to(z.dtype)
    return z.scatter(1, place, torch.where(here[:, None], _NONE, z.gather(1, place)))


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
