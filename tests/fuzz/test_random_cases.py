"""Logits, losses and top k of random cases against the definition, with all gradients."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import gistops

from . import oracle
from .cases import Case, LossCase, cases, loss_cases
from .conftest import Runner
from .examples import LOGITS, LOSSES
from .judge import FACTOR, bound, compare, compute_eps
from .oracle import Noise, Tensors

pytestmark = pytest.mark.cpu
BACKENDS = ("cpu", "reference")


def call(name: str, case: Case, t: Tensors, *positional: Any, **options: Any) -> Any:
    """Call gistops.constellation_<name> or gistops.subcenter_<name>."""
    tau: Tensor | float = case.tau if case.tau_form == "number" else t["tau"]
    if case.classifier == "subcenters":
        return getattr(gistops, f"subcenter_{name}")(t["input"], t["centers"], tau, *positional, **options)
    options["transform"] = case.classifier
    options["axis"] = t.get("axis")
    options["mlp"] = (t["mlp0"], t["mlp1"]) if case.classifier == "mlp" else None
    tensors = (t["input"], t["centers"], t["displacements"], tau)
    return getattr(gistops, f"constellation_{name}")(*tensors, *positional, **options)


def case_eps(case: Case) -> float:
    dtypes = case.dtypes[:2] if case.classifier == "subcenters" else case.dtypes
    return compute_eps(*dtypes)


def cosines_and_error(case: Case, wide: Tensors, eps: float) -> tuple[Tensor, float]:
    """Return all cosines [B, K, M] and the error that a backend may make in them."""
    with torch.no_grad():
        truth, deviation = oracle.spread(lambda noise: {"": oracle.cosines(case, wide, noise)}, eps)
    largest = float(deviation[""].nan_to_num(0, 0, 0).max()) if deviation[""].numel() else 0.0
    return truth[""], FACTOR * (largest + eps)


def check_slots(slots: Tensor, cosine: Tensor, error: float) -> None:
    """Check that the slots attain the maximum."""
    finite = cosine.isfinite().all(2)
    assert slots.dtype == torch.uint8
    assert not slots.numel() or int(slots.max()) < cosine.shape[2]
    attained = oracle.chosen(cosine, slots)
    short = torch.where(finite, cosine.amax(2) - attained, 0) if cosine.numel() else torch.zeros(())
    assert (short <= 2 * error).all(), f"slots: a chosen cosine is {float(short.max()):.3g} below the largest"


def check_ties(case: Case, slots: Tensor, cosine: Tensor, wide: Tensors) -> None:
    """Check that among equal vectors the lowest slot is chosen."""
    with torch.no_grad():
        every = oracle.vectors(case, wide, Noise())
    for slot in range(1, cosine.shape[2]):
        repeats = (every[:, :slot] == every[:, slot : slot + 1]).all(2).any(1)  # [K]
        wrong = (slots == slot) & repeats & cosine.isfinite().all(2)
        assert not wrong.any(), f"slots: {slot} is chosen, and a lower slot has the same vector"


def given_gradients(output: Tensor, t: Tensors) -> Tensors:
    """Return the gradients of two backward passes, which must agree in every bit."""
    if not output.requires_grad:
        return {}
    needed = {name: v for name, v in t.items() if v.requires_grad}
    passes = [
        torch.autograd.grad(output, list(needed.values()), retain_graph=True, allow_unused=True)
        for _ in range(2)
    ]
    for first, second in zip(*passes, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first.nan_to_num(), second.nan_to_num())
    return {
        name: torch.zeros_like(v) if g is None else g
        for (name, v), g in zip(needed.items(), passes[0], strict=True)
    }


def skipped(case: Case, name: str, gradient: Tensor) -> bool:
    """Return True for a gradient that is checked to be finite alone: a rotation where its plane is not unique.

    The gradient of a zero vector, of the size 1e12, is infinite in float16.
    """
    degenerate = case.d == 1 or "zero displacement" in case.specials
    if case.classifier != "rotation" or not case.m or not degenerate:
        return False
    finite = ~gradient.isnan() if gradient.dtype == torch.float16 else gradient.isfinite()
    assert finite.all(), f"gradient of {name}: expected finite values"
    return True


def rounded_weights(case: Case, backend: str, wide: Tensors, slots: Tensor, upstream: Tensor) -> Tensors:
    """Return the errors of gradients that come from rounding the weights H of their products to bfloat16.

    The CPU multiplies in bfloat16 where the processor has units for it (csrc/README.md).

    Args:
        upstream: gradient of the largest cosines, [B, K].
    """
    halves = set(case.dtypes[:2]) == {torch.bfloat16} and case.d % 2 == 0
    is_rounded = backend == "cpu" and halves and case.classifier in ("translation", "rotation")
    if not is_rounded or not torch.ops.gistops.cpu_multiplies(torch.bfloat16):
        return {}
    with torch.no_grad():
        x, w = wide["input"], wide["centers"]
        lengths = oracle.vectors(case, wide, Noise()).norm(dim=2)  # [K, M]
        chosen = oracle.chosen(lengths.expand(len(x), -1, -1), slots)
        weights = upstream.abs() / (chosen * x.norm(dim=1, keepdim=True)).clamp(min=1e-12)
        error = torch.finfo(torch.bfloat16).eps / 2 * weights
        of_input = error @ w.abs()
        unit = F.normalize(x, dim=1).abs()
        of_input += (of_input * unit).sum(1, keepdim=True) * unit  # the part along x is subtracted
        return {"input": of_input, "centers": error.T @ x.abs()}


def check_logits(case: Case, backend: str) -> None:
    t, eps = case.tensors(), case_eps(case)
    wide = oracle.widened(t, case.tau if case.tau_form == "number" else None)
    logits, slots = call("logits", case, t, return_slots=True, backend=backend)
    assert logits.dtype == (torch.float64 if eps < 1e-10 else torch.float32)
    cosine, error = cosines_and_error(case, wide, eps)
    check_slots(slots, cosine, error)
    if case.classifier in ("translation", "subcenters"):
        check_ties(case, slots, cosine, wide)
    best = oracle.chosen(cosine, slots)
    truth = case.tau * torch.where(cosine.isnan().any(2), torch.nan, best)
    compare(
        "logits", logits, truth, bound(truth, torch.zeros_like(truth), eps, logits.dtype, case.tau * error)
    )
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(case.seed), dtype=logits.dtype)
    made = given_gradients((logits * grad).nansum(), t) if all(v.isfinite().all() for v in t.values()) else {}

    def gradients(noise: Noise) -> Tensors:
        best = oracle.chosen(oracle.cosines(case, wide, noise), slots)
        return oracle.gradients((noise(wide["tau"] * best) * noise(grad.double())).sum(), wide)

    if made:
        expected, deviation = oracle.spread(gradients, eps)
        rounded = rounded_weights(case, backend, wide, slots, wide["tau"] * grad.double())
        for name, value in made.items():
            if skipped(case, name, value):
                continue
            extra = rounded.get(name, torch.zeros(()))
            allowed = bound(expected[name], deviation[name], eps, value.dtype, extra)
            compare(
                f"gradient of {name}",
                value,
                expected[name].reshape(value.shape),
                allowed.reshape(value.shape),
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits(backend: str, run_cases: Runner) -> None:
    run_cases(lambda case: check_logits(case, backend), LOGITS, case=cases())


def near_ties(case: Case, cosine: Tensor, upstream: Tensor, error: float, wide: Tensors) -> Tensors:
    """Return the error of each gradient if the loss chose another slot wherever two are equal within the error."""
    with torch.no_grad():
        lengths = oracle.vectors(case, wide, Noise()).norm(dim=2)  # [K, M]
        candidates = cosine >= cosine.amax(2, keepdim=True) - 2 * error
        candidates &= candidates.sum(2, keepdim=True) > 1
        per_vector = candidates * upstream.abs()[..., None] * 2 / lengths.clamp(min=1e-12)
        per_input = (candidates.any(2) * upstream.abs()).sum(1, keepdim=True) * 2
        per_input = per_input / wide["input"].norm(dim=1, keepdim=True).clamp(min=1e-12)
        if case.classifier == "subcenters":
            return {"input": per_input, "centers": per_vector.sum(0)[..., None]}
        by_slot = per_vector.sum((0, 1))[1:, None]
        return {"input": per_input, "centers": per_vector.sum((0, 2))[:, None], "displacements": by_slot}


def check_loss(case: Case, loss: LossCase, backend: str) -> None:
    hypothesis.assume(case.K > 0)
    t, eps = case.tensors(), case_eps(case)
    hypothesis.assume(all(v.isfinite().all() for v in t.values()))
    t |= loss.tensors(case.B, case.K)
    wide = oracle.widened(t, case.tau if case.tau_form == "number" else None)
    made = call(
        "cross_entropy",
        case,
        t,
        t["target"],
        class_bias=t.get("class_bias"),
        weight=t.get("weight"),
        margin=loss.margin_size if loss.margin == "number" else t.get("margin"),
        margin_kind=loss.margin_kind,
        reduction=loss.reduction,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
        return_lse=True,
        backend=backend,
    )
    slots = call("logits", case, t, return_slots=True, backend=backend)[1]
    cosine, error = cosines_and_error(case, wide, eps)
    best = oracle.chosen(cosine, slots)
    if loss.margin != "none" and loss.margin_kind == "angle":
        target, _ = oracle.targets(loss, t)
        angle = best.gather(1, target[:, None])[:, 0].clamp(-1, 1).acos()
        margin = t["margin"].detach() if "margin" in t else torch.tensor(loss.margin_size)
        margin = margin[target] if margin.dim() else margin
        hypothesis.assume(((angle + margin - torch.pi).abs() > 1e-3).all())  # the loss jumps there
        hypothesis.assume((angle.sin() > 0.05).all())  # its derivative is unbounded there

    def outputs(noise: Noise) -> Tensors:
        noisy = best if not noise.eps else noise(best) + noise(torch.full_like(best, error)) - error
        z = oracle.scores(loss, noisy, wide["tau"], wide, noise)
        return dict(zip(("loss", "lse"), oracle.loss_and_lse(loss, z, wide), strict=True))

    with torch.no_grad():
        truth, deviation = oracle.spread(outputs, eps)
    for name, value in zip(("loss", "lse"), made, strict=True):
        extra = 3 * case.tau * error * (1 if name == "lse" or loss.reduction != "sum" else max(1, case.B))
        compare(name, value, truth[name], bound(truth[name], deviation[name], eps, value.dtype, extra))
    if not all(v.isfinite().all() for v in truth.values()):
        return
    source = torch.Generator().manual_seed(loss.seed)
    grads = [torch.randn(v.shape, generator=source, dtype=v.dtype) for v in made]
    ours = given_gradients(sum((v * g).sum() for v, g in zip(made, grads, strict=True)), t)

    def scalar(picked: Tensor, noise: Noise) -> Tensor:
        z = oracle.scores(loss, picked, wide["tau"], wide, noise)
        both = oracle.loss_and_lse(loss, z, wide)
        return sum((v * g.double()).sum() for v, g in zip(both, grads, strict=True))  # type: ignore[return-value]

    def gradients(noise: Noise) -> Tensors:
        picked = oracle.chosen(oracle.cosines(case, wide, noise), slots)
        return oracle.gradients(scalar(picked, noise), wide)

    leaf = best.clone().requires_grad_()
    upstream = oracle.gradients(scalar(leaf, Noise()), {"": leaf})[""]
    tied = near_ties(case, cosine, upstream, error, wide) if cosine.numel() else {}
    has_ties = any(bool(v.any()) for v in tied.values())
    expected, deviation = oracle.spread(gradients, eps)
    rounded = rounded_weights(case, backend, wide, slots, upstream)
    for name, value in ours.items():
        if skipped(case, name, value):
            continue
        if has_ties and case.classifier in ("rotation", "mlp") and name not in ("input", "tau", "class_bias"):
            continue
        extra = tied.get(name, torch.zeros(())) + rounded.get(name, torch.zeros(()))
        allowed = bound(expected[name], deviation[name], eps, value.dtype, extra)
        compare(
            f"gradient of {name}", value, expected[name].reshape(value.shape), allowed.reshape(value.shape)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses(backend: str, run_cases: Runner) -> None:
    run_cases(lambda case, loss: check_loss(case, loss, backend), LOSSES, case=cases(), loss=loss_cases())


def check_topk(case: Case, share: float, bias: bool, backend: str) -> None:
    hypothesis.assume(case.K > 0)
    t, eps = case.tensors(), case_eps(case)
    hypothesis.assume(all(v.isfinite().all() for v in t.values()))
    k = max(1, round(share * case.K))
    class_bias = torch.randn(case.K, generator=torch.Generator().manual_seed(case.seed)) if bias else None
    values, classes, slots, lse = call(
        "topk", case, t, k, class_bias=class_bias, return_lse=True, backend=backend
    )
    wide = oracle.widened(t, case.tau if case.tau_form == "number" else None)
    cosine, error = cosines_and_error(case, wide, eps)
    scores = case.tau * (cosine.amax(2) if cosine.numel() else cosine.sum(2))
    if class_bias is not None:
        scores = scores + class_bias.double()
    allowed = FACTOR * eps * (scores.abs().max() if scores.numel() else 0) + case.tau * error
    assert values.shape == classes.shape == slots.shape == (case.B, k)
    assert (classes.sort(1).values.diff(dim=1) > 0).all(), "classes: one is returned twice"
    assert (values.diff(dim=1) <= 0).all(), "values: not in descending order"
    truth = scores.gather(1, classes)
    compare("values", values, truth, torch.zeros_like(truth) + allowed)
    left_out = scores.scatter(1, classes, -torch.inf).amax(1) if case.B else scores.sum(1)
    assert (left_out <= truth.amin(1) + 2 * allowed).all() if case.B else True, "a larger class is left out"
    attained = cosine.gather(1, classes[..., None].expand(-1, -1, cosine.shape[2]))
    check_slots(slots, attained, error)
    compare("lse", lse, scores.logsumexp(1), torch.zeros(case.B) + 2 * allowed + FACTOR * eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk(backend: str, run_cases: Runner) -> None:
    run_cases(
        lambda case, share, bias: check_topk(case, share, bias, backend),
        case=cases(),
        share=st.floats(0, 1),
        bias=st.booleans(),
    )
