"""The calls of the variants: which logits and slots they ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import accuracy, calls, roofline, smoke_checks, variants
from bench.problem import Size

SIZE = Size(37, 131, 40, 4)


class Outputs(TorchDispatchMode):
    """Records dtype and slots of the logits ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **kwargs or {})
        if str(function).startswith("gistops.logits_forward"):
            self.found.append((output[0].dtype, tuple(output[1].shape)))
        return output


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "slots"),
    [
        ("cpu", "forward", torch.float32, (0,)),
        ("cpu", "step", torch.float32, (37, 131)),
        ("cpu, slots", "forward", torch.float32, (37, 131)),
        ("cpu, bf16 logits", "forward", torch.bfloat16, (0,)),
        ("cpu, bf16 logits", "step", torch.bfloat16, (37, 131)),
    ],
)
def test_logits_and_slots_of_a_call(name: str, kind: str, dtype: torch.dtype, slots: tuple[int, ...]) -> None:
    arguments = smoke_checks.make_inputs(SIZE, torch.bfloat16, "cpu")
    call = calls.make_call(name, kind, arguments, "bf16")
    with Outputs() as outputs:
        result = call()
    assert outputs.found == [(dtype, slots)]
    assert isinstance(result, torch.Tensor)
    oracle = smoke_checks.Oracle(arguments, cosine=False)
    assert "inexact" not in accuracy.check_errors(oracle.errors(kind, result, arguments), "bf16")


def test_variants_with_other_results_are_no_candidates_of_the_selection_rule() -> None:
    names = {variant.name for variant in variants.CANDIDATES}
    assert {"cuda", "triton"} <= names
    assert not any("bf16 logits" in name or ", slots" in name for name in names)


def test_bytes_of_logits_and_slots() -> None:
    def written(name: str) -> int:
        works = roofline.work(name, SIZE, "forward", 2)
        assert works is not None
        return works[0].bytes

    pairs = SIZE.B * SIZE.K
    assert written("cuda, slots") - written("cuda") == pairs
    assert written("cuda") - written("cuda, bf16 logits") == 2 * pairs
