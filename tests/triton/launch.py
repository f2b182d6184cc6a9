"""Forward and backward through Triton's launcher, up to the launch itself, for an H100 that need not be present.

This covers what neither the interpreter nor aot.py covers: the binding of arguments, their specialization, the grids.
test_aot.py runs this file in a process of its own, since it replaces Triton's driver. It prints each kernel and its grid.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gistops.backends.triton import configs, logits, loss, topk
from gistops.operators.cross_entropy import CrossEntropyBackward, CrossEntropyForward
from gistops.operators.logits import LogitsBackward, LogitsForward
from gistops.operators.topk import FusedTopk


class Driver:
    """A driver that reports an H100."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def main() -> None:
    launch, product = JITFunction.run, torch.mm

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        print(self.fn.__name__, *grid)
        return launch(self, *arguments, grid=grid, warmup=True, **options)

    def mm(a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        assert out.dtype == (out_dtype or a.dtype)
        return out.copy_(product(a, b))

    def slow(*_: Any) -> int:
        raise AssertionError(
            "on the host this takes 3 µs a call: configs.tiles and configs.power_of_two serve"
        )

    triton.cdiv = triton.next_power_of_2 = slow
    driver.set_active(Driver())
    JITFunction.run, torch.mm = compile_only, mm  # type: ignore[method-assign, assignment]
    configs.target = lambda device: "hopper"  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=132)  # type: ignore[assignment]
    for dtype, B, K, d, m in (
        (torch.bfloat16, 256, 1000, 64, 4),
        (torch.float32, 1, 1, 1, 0),
        (torch.float16, 5, 7, 33, 20),
    ):
        tensors = [torch.randn(n, d, dtype=dtype) for n in (B, K, m)] + [torch.tensor(3.0)]
        saved = logits.forward(LogitsForward(*tensors))
        made: tuple[torch.Tensor, ...]
        made = logits.backward(LogitsBackward(torch.randn(B, K), *tensors, *saved, True, True, True, True))
        assert all(g.shape == t.shape and g.dtype == t.dtype for g, t in zip(made, tensors, strict=True))
        narrow = logits.forward(LogitsForward(*tensors, False, False, dtype))
        assert narrow.logits.dtype == dtype
        assert narrow.slots.numel() == 0
        made = logits.backward(
            LogitsBackward(
                narrow.logits, *tensors, *narrow._replace(slots=saved.slots), True, True, True, True
            )
        )
        with configs.forced(product="fused", centers_product="cublas"):
            saved = logits.forward(LogitsForward(*tensors))
            logits.backward(LogitsBackward(torch.randn(B, K), *tensors, *saved, False, True, False, False))
        k = min(K, 10)
        best = topk.topk(FusedTopk(*tensors, torch.zeros(K), k, True))
        assert [t.shape for t in best] == [(B, k), (B, k), (B, k), (B,)]
        subcenters = [tensors[0], torch.randn(K, m + 1, d, dtype=dtype), tensors[2][:0], tensors[3]]
        coeffs = torch.randn(B, m + 1), torch.randn(2, m + 1, K)
        for keep in (True, False):
            step_of_a_loss(tensors, keep)
            step_of_a_loss(subcenters, keep)
            step_of_a_loss([*tensors[:2], tensors[2][:0], tensors[3]], keep, coeffs)


def step_of_a_loss(
    tensors: list[Tensor], keep: bool, coeffs: tuple[Tensor | None, Tensor | None] = (None, None)
) -> None:
    """Launch a forward and a backward with every option."""
    B, K = tensors[0].shape[0], tensors[1].shape[0]
    target, bias, weight, margin = (
        torch.zeros(B, dtype=torch.int64),
        torch.zeros(K),
        torch.ones(K),
        torch.ones(K),
    )
    arguments = (*tensors, *coeffs, target, bias, weight, margin)
    options = (2, 1, -100, 0.1)
    value, lse, _, *kept = loss.forward(CrossEntropyForward(*arguments, *options, keep))
    gradients = loss.backward(CrossEntropyBackward(value, lse, *arguments, lse, *kept, *options, *[True] * 6))
    expected = (*tensors, *coeffs, bias, margin)
    for gradient, argument in zip(gradients, expected, strict=True):
        assert argument is None or (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype)


if __name__ == "__main__":
    main()
