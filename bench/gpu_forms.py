"""The forms that `bench.gpu` compares on a GPU, by name; bench/forms.py has those of plain PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import gistops
from gistops import backends

from . import forms
from .forms import Tensors
from .gpu_plan import LOSSES, OURS, backend_of, is_ours

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # input, centers, displacements, tau -> logits
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # input, weight, labels -> mean loss


def constellation(backend: str) -> Head:
    """Ours, with this backend."""

    def head(x: Tensor, w: Tensor, delta: Tensor, tau: Tensor) -> Tensor:
        return gistops.constellation_logits(x, w, delta, tau, backend=backend)

    return head


def make(name: str) -> Head:
    """The logits of a form, as a function of input, centers, displacements and tau.

    A compiled form is compiled for the sizes it meets; the caller clears what torch.compile has kept before.
    """
    if name in (*OURS, "cpu"):
        return constellation(name)
    if name.endswith(", m=0"):
        head = constellation(name.removesuffix(", m=0"))
        return lambda x, w, delta, tau: head(x, w, delta.detach()[:0], tau)
    function = forms.PLAIN[name.removesuffix(" compiled")]
    if name.endswith(" compiled"):
        return torch.compile(function, fullgraph=True, dynamic=False)
    return function


def why_not(name: str, device: str) -> str | None:
    """Why a form cannot be measured here, or None."""
    backend = backend_of(name)
    if backend in backends.NAMES:
        return backends.why_not(backend, device)
    if name.startswith("torch linear_cross_entropy") and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none; 2.13 brought it"
    for start, module in (("CCE", "cut_cross_entropy"), ("Liger", "liger_kernel")):
        if name.startswith(start) and importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None


def _torch_loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    # Without options it is F.linear and F.cross_entropy, one after the other.
    return F.linear_cross_entropy(x, w, labels, options=torch.nn.LinearCrossEntropyOptions())


def _loss(name: str) -> Loss:
    if name == "torch linear_cross_entropy":
        return _torch_loss
    if name == "CCE":
        from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

        return lambda x, w, labels: linear_cross_entropy(x, w, labels)
    from liger_kernel.transformers import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyLoss,
    )

    liger = LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, labels: liger(w, x, labels)


def _loss_step(name: str, arguments: Tensors) -> Callable[[], None]:
    """A step of a form that gives the loss without its logits."""
    x, w, _, tau = arguments
    labels = forms.labels_of(arguments)
    loss = _loss(name.removesuffix(", cosine"))
    cosine = name.endswith(", cosine")

    def run() -> None:
        for argument in arguments:
            argument.grad = None
        if cosine:
            loss((tau * F.normalize(x)).to(x.dtype), F.normalize(w), labels).backward()
        else:
            loss(x, w, labels).backward()

    return run


def _our_loss_step(name: str, arguments: Tensors) -> Callable[[], None]:
    x, w, delta, tau = arguments
    labels, backend = forms.labels_of(arguments), backend_of(name)
    delta = delta.detach()[:0] if name.endswith("m=0") else delta

    def run() -> None:
        for argument in arguments:
            argument.grad = None
        loss = gistops.constellation_cross_entropy(x, w, delta, tau, labels, backend=backend)
        assert isinstance(loss, Tensor)
        loss.backward()

    return run


def runner(name: str, kind: str, arguments: Tensors) -> tuple[Callable[[], object], Head | None]:
    """One call of a form's forward or step, and its head alone where it has one that makes the constellation's logits.

    Args:
        name: the form.
        kind: "forward" or "step".
        arguments: input, centers, displacements, tau; a step leaves their gradients in them.
    """
    if is_ours(name) and " loss" in name:
        head = None if name.endswith("m=0") else constellation(backend_of(name))
        return _our_loss_step(name, arguments), head
    if name in LOSSES and not is_ours(name):
        return _loss_step(name, arguments), None
    head = make(name)
    same = name != "linear" and not name.endswith("m=0")
    return forms.PASSES[kind](head, arguments), head if same else None


#: Precision -> the largest relative error, ‖out − ref‖ / ‖ref‖, of logits and of gradients with which a time counts.
#: bf16 arguments are exact in the reference, so that this is the error of what is computed from them. The forms of
#: plain PyTorch that compute in bf16 throughout err by some 1e-2 in the logits, and their routing by more.
TOLERANCE = {"bf16": (3e-2, 5e-2), "float32": (1e-4, 2e-3), "tf32": (5e-3, 0.2)}
CHECKED_CLASSES = 512
#: Largest B·K·M for the check of gradients, which holds that many scores in float32 several times.
CHECKED_SCORES = 1 << 26


def _relative(got: Tensor, wanted: Tensor) -> float:
    difference = got.detach().to(wanted.dtype) - wanted
    return float(difference.norm() / wanted.norm().clamp(min=1e-30))


def logits_error(head: Head, arguments: Tensors) -> float:
    """Relative error of the first classes' logits, against the definition in float64."""
    x, w, delta, tau = (argument.detach() for argument in arguments)
    with torch.no_grad():
        got = head(*arguments)[:, :CHECKED_CLASSES]
        doubles = (x.double(), w[:CHECKED_CLASSES].double(), delta.double(), tau.double())
        return _relative(got, forms.direct(*doubles))


def reference_gradients(arguments: Tensors) -> tuple[Tensor, ...] | None:
    """Gradients of a step in float32 by the algebra in plain PyTorch; None where they would take too much memory."""
    x, w, delta, _ = arguments
    if x.shape[0] * w.shape[0] * (delta.shape[0] + 1) > CHECKED_SCORES:
        return None
    singles = tuple(argument.detach().float().requires_grad_() for argument in arguments)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        loss = F.cross_entropy(forms.split(*singles), forms.labels_of(arguments))
        return torch.autograd.grad(loss, singles)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def gradients_error(arguments: Tensors, wanted: tuple[Tensor, ...]) -> float:
    """The largest relative error of the four gradients that a step has left in its arguments."""
    return max(
        float("inf") if argument.grad is None else _relative(argument.grad, gradient)
        for argument, gradient in zip(arguments, wanted, strict=True)
    )
