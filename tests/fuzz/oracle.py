"""The definition of logits and losses, written from the docstrings, in float64.

Nothing here is shared with the package. `Noise` disturbs every intermediate value by one rounding of the dtype under test:
results that differ by much more than disturbed results do are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case, LossCase

Tensors = dict[str, Tensor]


class Noise:
    """Multiplies tensors by 1 + eps · N(0, 1). With eps = 0 it returns them unchanged."""

    def __init__(self, eps: float = 0.0, seed: int = 0) -> None:
        self.eps, self.source = eps, torch.Generator().manual_seed(seed)

    def __call__(self, values: Tensor) -> Tensor:
        if not self.eps:
            return values
        return values * (1 + self.eps * torch.randn(values.shape, generator=self.source, dtype=values.dtype))


def normalized_parts(x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Return x / max(|x|, 1e-12) along the last dimension, and a zero that has the gradient of the norm.

    The two terms of the gradient cancel if the gradient is parallel to x, so each has noise of its own.
    """
    numerator, reciprocal = noise(x), 1 / noise(x).norm(dim=-1, keepdim=True).clamp(min=1e-12)
    along_x = noise(x).detach() * reciprocal
    return numerator * reciprocal.detach(), along_x - along_x.detach()


def normalized(x: Tensor, noise: Noise) -> Tensor:
    """Return x / max(|x|, 1e-12) along the last dimension."""
    return sum(normalized_parts(x, noise))  # type: ignore[return-value]


def vectors(case: Case, t: Tensors, noise: Noise) -> Tensor:
    """Return all vectors of all classes, [K, M, d]."""
    w, deltas = t["centers"], t["displacements"]
    if case.classifier == "subcenters":
        return noise(w)
    if case.classifier == "translation":
        return noise(torch.cat([w[:, None], w[:, None] + deltas], 1))  # w + δ is exact before the noise
    w, deltas = noise(w), noise(deltas)
    if case.classifier == "mlp":
        unit = F.normalize(w, dim=1, eps=1e-12)
        joined = torch.cat([unit[:, None].expand(-1, case.m, -1), deltas[None].expand(len(w), -1, -1)], dim=2)
        learned = noise(noise(joined @ noise(t["mlp0"]).T).relu() @ noise(t["mlp1"]).T)
        return noise(torch.cat([w[:, None], w[:, None] + learned], 1))
    return noise(torch.stack([w, *(rotated(w, t["axis"], delta, noise) for delta in deltas)], 1))


def rotated(w: Tensor, axis: Tensor, delta: Tensor, noise: Noise) -> Tensor:
    """Rotate w [K, d] in the plane of `axis` and `delta` by the angle from `axis` to `delta`; not at all if one is zero."""
    if min(axis.norm(), delta.norm()) <= 1e-12:
        return w
    u, unit = normalized(axis, noise), normalized(delta, noise)
    cosine = noise(unit @ u)
    rest = noise(unit) - noise(cosine * u)
    sine = noise(rest.norm())
    v = normalized(rest, noise)
    along_u, along_v = noise(w @ u)[:, None], noise(w @ v)[:, None]
    onto_u = noise(along_u * (cosine - 1)) - noise(along_v * sine)
    onto_v = noise(along_u * sine) + noise(along_v * (cosine - 1))
    return w + onto_u * u + onto_v * v


def cosines(case: Case, t: Tensors, noise: Noise) -> Tensor:
    """Return the cosines of all inputs and vectors, [B, K, M].

    The two terms of a gradient are sums over many pairs, and each of their elements has noise of its own.
    """

    def products(a: Tensor, b: Tensor) -> Tensor:
        return noise(torch.einsum("bd,kmd->bkm", a, b))

    unit, unit_norm = normalized_parts(t["input"], noise)
    units, units_norm = normalized_parts(vectors(case, t, noise), noise)
    if not torch.is_grad_enabled():
        return products(unit, units)
    return products(unit, units) + products(unit_norm, units) + products(unit, units_norm)


def chosen(cosine: Tensor, slots: Tensor) -> Tensor:
    """Return the cosines [B, K] of the given slots."""
    return cosine.gather(2, slots.long()[..., None])[..., 0]


def targets(loss: LossCase, t: Tensors) -> tuple[Tensor, Tensor]:
    """Return the targets, with 0 in place of ignored ones, and True where a row is ignored."""
    target = t["target"].long()
    ignored = target == loss.ignore_index
    return torch.where(ignored, 0, target), ignored


def scores(loss: LossCase, cosine: Tensor, tau: Tensor, t: Tensors, noise: Noise) -> Tensor:
    """Return the logits with margin and bias, [B, K]."""
    target, ignored = targets(loss, t)
    logits = tau * cosine
    if loss.margin != "none":
        margin = t["margin"] if "margin" in t else torch.tensor(loss.margin_size, dtype=torch.float64)
        margin = margin[target][:, None] if margin.dim() else margin
        is_target = F.one_hot(target, cosine.shape[1]).bool() & ~ignored[:, None]
        if loss.margin_kind == "logit":
            lowered = logits - margin
        elif loss.margin_kind == "cosine":
            lowered = tau * (cosine - margin)
        else:
            limit = 1 - 1e-9
            angle = noise(torch.where(is_target, cosine, 0).clamp(-limit, limit).acos())
            beyond = tau * (cosine - margin * margin.sin())
            lowered = torch.where(angle + margin > math.pi, beyond, tau * (angle + margin).cos())
        logits = torch.where(is_target, lowered, logits)
    if "class_bias" in t:
        logits = logits + t["class_bias"]
    return noise(logits)


def loss_and_lse(loss: LossCase, logits: Tensor, t: Tensors) -> tuple[Tensor, Tensor]:
    """Return `F.cross_entropy` of the logits and their log-sum-exp."""
    value = F.cross_entropy(
        logits,
        t["target"].long(),
        t.get("weight"),
        reduction=loss.reduction,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
    )
    return value, logits.logsumexp(1)


def widened(tensors: Tensors, number: float | None) -> Tensors:
    """Return leaves in float64 of the same values; `number`: the value of tau if it was given as a number."""
    wide = {
        name: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
        for name, v in tensors.items()
    }
    if number is not None:
        wide["tau"] = torch.tensor(number, dtype=torch.float64)
    return wide


def gradients(output: Tensor, leaves: Tensors) -> Tensors:
    """Return the gradients of a scalar, zeros where it does not depend on a leaf."""
    needed = {name: v for name, v in leaves.items() if v.requires_grad}
    if not output.requires_grad:
        return {name: torch.zeros_like(v) for name, v in needed.items()}
    found = torch.autograd.grad(output, list(needed.values()), allow_unused=True)
    return {
        name: torch.zeros_like(v) if g is None else g
        for (name, v), g in zip(needed.items(), found, strict=True)
    }


Spread = Callable[[Callable[[Noise], Tensors]], Tensors]


def spread(function: Callable[[Noise], Tensors], eps: float, draws: int = 4) -> tuple[Tensors, Tensors]:
    """Return the undisturbed outputs of a function, and the largest deviation of `draws` disturbed ones."""
    truth = function(Noise())
    deviations = {name: torch.zeros_like(v) for name, v in truth.items()}
    for seed in range(draws):
        for name, value in function(Noise(eps, seed)).items():
            deviations[name] = torch.maximum(deviations[name], (value - truth[name]).abs())
    return truth, deviations
