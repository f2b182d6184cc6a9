"""The calls of the variants: which logits and slots they ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import accuracy, calls, roofline, smoke_checks, variants
from bench.problem import Size, make_tensors

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
    arguments = make_tensors(SIZE, torch.bfloat16, "cpu", smoke_checks.SEED)
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
    others = ("bf16 logits", ", slots", ", rotation", ", subcenters")
    assert not any(other in name for name in names for other in others)


def test_bytes_of_logits_and_slots() -> None:
    def written(name: str) -> int:
        works = roofline.work(name, SIZE, "forward", 2)
        assert works is not None
        return works[0].bytes

    pairs = SIZE.B * SIZE.K
    assert written("cuda, slots") - written("cuda") == pairs
    assert written("cuda") - written("cuda, bf16 logits") == 2 * pairs


@pytest.mark.parametrize("K", [131, 7])
@pytest.mark.parametrize("name", ["cpu", "linear"])
def test_values_and_classes_of_a_topk(name: str, K: int) -> None:
    arguments = make_tensors(replace(SIZE, K=K), torch.float32, "cpu", smoke_checks.SEED)
    values, classes = calls.make_call(name, "topk", arguments, "float32")()
    assert values.shape == classes.shape == (SIZE.B, min(K, 10))
    if name == "linear":
        expected = (arguments[0] @ arguments[1].T).topk(min(K, 10))
        torch.testing.assert_close(values, expected.values)
        return
    oracle = smoke_checks.Oracle(arguments, cosine=False)
    found = smoke_checks.run_smoke_check(name, "float32", arguments, oracle, "cpu")
    assert set(found) == set(variants.KINDS)
    assert found["topk"].keys() == {"error"}
    assert found["topk"]["error"].keys() == {"values", "classes"}
    assert "inexact" not in accuracy.check_call(name, "topk", "float32", (values, classes), arguments, None)


def test_a_topk_that_misses_a_class_is_detected() -> None:
    arguments = make_tensors(SIZE, torch.float32, "cpu", smoke_checks.SEED)
    values, classes = calls.make_call("cpu", "topk", arguments, "float32")()
    oracle = smoke_checks.Oracle(arguments, cosine=False)
    right = accuracy.check_errors(oracle.errors("topk", (values, classes), arguments), "float32")
    assert "inexact" not in right
    wrong = (values, classes.roll(1, 1))
    assert "classes" in accuracy.check_errors(oracle.errors("topk", wrong, arguments), "float32")["inexact"]
    assert "values" in accuracy.check_call("cpu", "topk", "float32", wrong, arguments, None)["inexact"]
    every = oracle.logits.topk(11)
    missed = (every.values[:, 1:], every.indices[:, 1:])  # without the best
    assert "values" in accuracy.check_errors(oracle.errors("topk", missed, arguments), "float32")["inexact"]


def test_work_of_a_topk() -> None:
    pairs, best = SIZE.B * SIZE.K, SIZE.B * 10 * 13
    (forward,) = roofline.work("cuda", SIZE, "forward", 2) or []
    assert roofline.work("cuda", SIZE, "topk", 2) == [
        roofline.Work(forward.flops, forward.bytes - 4 * pairs + best)
    ]
    linear = roofline.work("linear", SIZE, "topk", 2) or []
    assert sum(phase.bytes for phase in linear) == 2 * SIZE.d * (SIZE.B + SIZE.K) + 2 * 2 * pairs + best
