"""Small runs on memory full of NaN, compared with float64 and repeated. A variant that fails is not measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gistops

from ..problem import Tensors, make_labels
from . import accuracy, calls
from .plan import supports
from .variants import TABLE

SEED = 20211011
#: Bytes and number of the blocks that are filled and freed: torch's allocator reuses them for the next tensors.
POISON = ((1 << 9, 64), (1 << 14, 32), (1 << 18, 32), (1 << 21, 8), (1 << 24, 4))


@contextlib.contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Fill all memory that is allocated in the `with` with ones in every bit, which is NaN in every float type.

    On a GPU this function fills blocks that torch's allocator then reuses, so that no additional kernel is launched in
    the `with`. The CPU's allocator caches no blocks: there torch's own option fills new tensors.
    """
    if device == "cuda":
        torch.cuda.empty_cache()  # so that no other block is reused
        blocks = [
            torch.full((n,), 255, dtype=torch.uint8, device=device)
            for n, count in POISON
            for _ in range(count)
        ]
        del blocks
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory is its default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Oracle:
    """Logits, loss and gradients of the reference backend in float64."""

    def __init__(self, arguments: Tensors, cosine: bool, vectors: str = "") -> None:
        """Compute the results, with `cosine` without displacements, with `vectors` for the loss as in `gistops_loss`."""
        doubles = [argument.detach().double().requires_grad_() for argument in arguments]
        x, w, delta, tau = doubles
        delta = delta.detach()[:0] if cosine else delta
        logits = gistops.constellation_logits(x, w, delta, tau, backend="reference")
        value = F.cross_entropy(logits, make_labels(arguments))
        if vectors:
            value = calls.gistops_loss("reference", cosine, vectors)(*doubles, make_labels(arguments))
        self.kept = [n for n, a in enumerate(doubles) if a.numel() and not (cosine and n == 2)]
        self.gradients = torch.autograd.grad(value, [doubles[n] for n in self.kept])
        self.logits, self.loss = logits.detach(), value.detach()

    def errors(self, kind: str, output: Any, arguments: Tensors) -> dict[str, float]:
        """Return the relative errors of a call."""
        if kind == "forward":
            return {"logits": accuracy.relative_error(output, self.logits)}
        if kind == "topk":
            return accuracy.best_errors(output, self.logits)
        kept = [arguments[n] for n in self.kept]
        return {
            "loss": accuracy.relative_error(output, self.loss),
            "gradients": accuracy.gradients_error(kept, self.gradients),
        }


def run_smoke_check(
    name: str,
    precision: str,
    arguments: Tensors,
    oracle: Oracle,
    device: str,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Check a gistops variant. Returns per kind `error`, `inexact`, and `unstable` if a second run gave other bits.

    Args:
        name: name of the variant.
        precision: precision of the arguments.
        arguments: input tensors.
        oracle: the expected results.
        device: "cuda" or "cpu".
        before: called before each kind.
    """
    found: dict[str, Any] = {}
    for kind in TABLE[name].kinds:
        if not supports(TABLE[name], precision, kind):
            continue
        before()
        call = calls.make_call(name, kind, arguments, precision)
        first = _results(call, arguments, device)
        output = first[0] if kind != "topk" else (first[0], first[1])
        result = found[kind] = accuracy.check_errors(oracle.errors(kind, output, arguments), precision)
        second = _results(call, arguments, device)
        same = all(
            (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
            for a, b in zip(first, second, strict=True)
        )
        if not same and not any(bool(x.isnan().any()) for x in first if x is not None):
            result["unstable"] = "a second run gave other bits"
    return found


def _results(call: Any, arguments: Tensors, device: str) -> list[Tensor | None]:
    for argument in arguments:
        argument.grad = None
    with poisoned(device):
        output = call()
    outputs = output if isinstance(output, tuple) else (output,)
    return [*(x.clone() for x in outputs), *(None if a.grad is None else a.grad.clone() for a in arguments)]


def objection(found: dict[str, Any]) -> str:
    """Return the objection to a result, or an empty string."""
    return str(found.get("failed") or found.get("inexact") or found.get("unstable") or "")
