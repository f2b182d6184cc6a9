"""Tests of TwoHeadClassifier: its logits by definition, predictions in chunks, frozen copies, state dicts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gistops.backends import reference
from gistops.nn import (
    ConstellationClassifier,
    FrozenClassifier,
    GistClassifier,
    SubcenterClassifier,
    TwoHeadClassifier,
    two_heads,
)

from .samples import B, D, K, spread

HEADS: dict[str, Callable[..., GistClassifier]] = {
    "translation": lambda **o: GistClassifier(D, K, 3, **o),
    "no displacements": lambda **o: GistClassifier(D, K, 0, **o),
    "rotation": lambda **o: GistClassifier(D, K, 3, transform="rotation", **o),
    "mlp": lambda **o: GistClassifier(D, K, 3, transform="mlp", **o),
    "reference": lambda **o: GistClassifier(D, K, 3, backend="reference", **o),
}
every_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
F64 = torch.float64


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predict in chunks of 17 classes: four chunks, the last of 16."""
    for name in ("CHUNK_ELEMENTS", "CPU_CHUNK_ELEMENTS"):
        monkeypatch.setattr(two_heads, name, 1)
    monkeypatch.setattr(two_heads, "LEAST_CHUNK", 17)


def exported(make: Callable[..., GistClassifier], **options: Any) -> TwoHeadClassifier:
    return spread(make(**options)).export("both", torch.randn(K, dtype=options.get("dtype")))


@every_head
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_softmax_is_that_of_the_sum_of_log_probabilities(
    make: Callable[..., GistClassifier], dtype: torch.dtype, seed: int
) -> None:
    gist, bias, x = spread(make(dtype=dtype)), torch.randn(K), torch.randn(B, D)
    state = torch.get_rng_state()
    head = gist.export("both", bias)
    assert torch.equal(torch.get_rng_state(), state), "export draws no random numbers"
    exact = copy.deepcopy(gist).double()
    balanced = exact._classifier()
    random = balanced._replace(centers=exact.random_centers, tau=exact.random_tau)
    log_probabilities = [
        reference.logits(x.double(), classifier)[0].log_softmax(1) for classifier in (balanced, random)
    ]
    expected = (log_probabilities[0] + log_probabilities[1] + bias.double()).log_softmax(1)
    logits = head(x)
    assert logits.dtype == (F64 if dtype == F64 else torch.float32)
    # Logits are at most 40 + |bias|. Their float32 rounding errors are below 1e-4.
    tolerance = 1e-11 if dtype == F64 else 1e-3
    torch.testing.assert_close(logits.double().log_softmax(1), expected, atol=tolerance, rtol=0)


@every_head
def test_the_logits_have_the_bits_of_the_training_head(
    make: Callable[..., GistClassifier], seed: int
) -> None:
    gist, bias, x = spread(make()), torch.randn(K), torch.randn(3, B, D)
    head = gist.export("both", bias)
    (balanced, slots), random = gist(x, return_slots=True), gist.random_logits(x)
    expected = balanced + (random + bias)
    assert torch.equal(head(x), expected)
    with torch.no_grad():
        assert torch.equal(head(x), expected)
        logits, both_slots = head(x, return_slots=True)
        assert torch.equal(logits, expected)
        assert torch.equal(both_slots[..., 0], slots)
        assert torch.equal(both_slots[..., 1], head.random(x, return_slots=True)[1])
        half = x.bfloat16()
        wide = head(half)
        assert torch.equal(head(half, logits_dtype=torch.bfloat16), wide.bfloat16())
        assert torch.equal(head(x[0, 0]), gist(x[0, 0]) + (gist.random_logits(x[0, 0]) + bias))
    without = gist.export("both")
    assert torch.equal(without(x), balanced + random)
    with torch.no_grad():
        for parameter in gist.parameters():
            parameter.add_(1)  # does not change the copy
        bias.add_(1)
    assert torch.equal(head(x), expected)


@every_head
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_predictions_are_those_of_the_logits(
    make: Callable[..., GistClassifier],
    frozen: bool,
    chunked: bool,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """In float64, in which no two classes or slots are equal up to rounding."""
    if chunked:
        small_chunks(monkeypatch)
    head = exported(make, dtype=F64)
    if frozen:
        head = head.freeze()
    x, more = torch.randn(3, B, D, dtype=F64), torch.randn(K)
    logits, slots = head(x, return_slots=True)
    for bias, scores in ((None, logits), (more, logits + more)):
        assert torch.equal(head.predict(x, class_bias=bias), scores.argmax(-1))
        for k in (1, 5, K):
            best = head.predict_topk(x, k, class_bias=bias)
            order = scores.argsort(-1, descending=True)[..., :k]
            assert torch.equal(best.classes, order)
            torch.testing.assert_close(best.probabilities, scores.softmax(-1).gather(-1, order))
            expected = slots.gather(-2, order[..., None].expand(*order.shape, 2))
            assert torch.equal(best.slots, expected)
            assert not best.probabilities.requires_grad
    single = head.predict_topk(x[0, 0], 5)
    assert torch.equal(single.classes, logits[0, 0].topk(5).indices)
    assert single.slots.shape == (5, 2)
    assert head.predict_topk(x[:0], 5).slots.shape == (0, B, 5, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_are_broken_by_the_lower_class(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    small_chunks(monkeypatch)
    bias = torch.zeros(K)
    bias[[60, 3, 40]] = 1.0
    head = GistClassifier(D, K, 3, dtype=dtype).export("both", bias)
    for x, classes in ((0.0, [3, 40, 60, 0, 1, 2, 4]), (torch.nan, list(range(7)))):
        best = head.predict_topk(torch.full((2, D), x, dtype=dtype), 7)
        assert best.classes.tolist() == [classes] * 2


def test_predictions_do_not_materialize_the_logits(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    class Largest(TorchDispatchMode):
        """The largest number of elements that an op returns."""

        largest = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            outputs = function(*args, **(kwargs or {}))
            sizes = (t.numel() for t in tree_leaves(outputs) if isinstance(t, Tensor))
            self.largest = max(self.largest, *sizes, 0)
            return outputs

    monkeypatch.setattr(two_heads, "CPU_CHUNK_ELEMENTS", 100 * 256)
    monkeypatch.setattr(two_heads, "CHUNK_ELEMENTS", 100 * 256)
    for make in (lambda head: head, lambda head: head.freeze()):
        head, x = make(GistClassifier(8, 3000, 2).export("both")), torch.randn(100, 8)
        with Largest() as recorded:
            best = head.predict_topk(x, 5)
        assert recorded.largest <= 100 * 256
        torch.testing.assert_close(best.probabilities, head(x).detach().softmax(1).topk(5).values)


def test_gradients_are_those_of_both_heads(seed: int) -> None:
    gist = spread(GistClassifier(D, K, 3, dtype=F64))
    gist.displacements.requires_grad_(False)
    head, x = gist.export("both", torch.randn(K)), torch.randn(B, D, dtype=F64, requires_grad=True)
    assert not head.training
    flags = {name: p.requires_grad for name, p in head.named_parameters()}
    assert flags == {
        f"{stream}.{name}": name != "displacements"
        for stream in ("balanced", "random")
        for name in ("centers", "displacements", "raw_tau")
    }
    weight = torch.randn(B, K, dtype=F64)
    expected = torch.autograd.grad(
        gist(x) + gist.random_logits(x), (x, gist.centers, gist.random_centers), weight
    )
    ours = torch.autograd.grad(head(x), (x, head.balanced.centers, head.random.centers), weight)
    torch.testing.assert_close(ours, expected)


@every_head
def test_a_frozen_copy_has_the_bits_of_the_head(make: Callable[..., GistClassifier], seed: int) -> None:
    for cast in (lambda head: head, lambda head: head.bfloat16()):
        head, x = cast(exported(make)), torch.randn(B, D)
        expected, best = head(x).detach(), head.predict_topk(x, 9)
        with torch.inference_mode():
            frozen = head.freeze()
        assert frozen.frozen
        assert not head.frozen
        assert frozen.freeze() is frozen
        assert isinstance(frozen.balanced, FrozenClassifier)
        assert not list(frozen.parameters())
        x.requires_grad_()
        assert torch.equal(frozen(x), expected)
        (gradient,) = torch.autograd.grad(frozen(x).sum(), x)
        assert torch.equal(gradient, torch.autograd.grad(head(x).sum(), x)[0])
        for ours, before in zip(frozen.predict_topk(x, 9), best, strict=True):
            assert torch.equal(ours, before)
        with torch.no_grad():
            for tensor in (*head.parameters(), head.class_bias):
                tensor.add_(1)
        assert torch.equal(frozen(x), expected)


@every_head
def test_copies_casts_and_state_dicts(make: Callable[..., GistClassifier], seed: int) -> None:
    head, x = exported(make), torch.randn(B, D)
    expected = head(x)
    for kind in (head, head.freeze()):
        for twin in (copy.deepcopy(kind), pickle.loads(pickle.dumps(kind))):
            assert torch.equal(twin(x), expected)
            assert repr(twin) == repr(kind)
            nn.init.constant_(twin.class_bias, 100)
            assert torch.equal(kind(x), expected)
            assert twin.double()(x).dtype == F64
        other = exported(make)
        for target in (other, other.freeze()):
            assert target.load_state_dict(kind.state_dict()).missing_keys == []
            assert torch.equal(target(x), expected)
    assert head.class_bias.dtype == torch.float32
    assert make(dtype=torch.bfloat16).export("both", torch.randn(K)).class_bias.dtype == torch.float32
    empty = copy.deepcopy(head).to("meta").to_empty(device=x.device)
    empty.load_state_dict(head.state_dict())
    assert torch.equal(empty(x), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_predictions_without_graph_breaks(
    frozen: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    small_chunks(monkeypatch)
    torch.compiler.reset()
    head, x = exported(HEADS["translation"], dtype=F64), torch.randn(B, D, dtype=F64)
    head = head.freeze() if frozen else head
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    top = torch.compile(lambda x: head.predict_topk(x, 5), fullgraph=True, backend="aot_eager")
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            torch.testing.assert_close(compiled(x), head(x))
            torch.testing.assert_close(tuple(top(x)), tuple(head.predict_topk(x, 5)))


def test_any_two_heads_of_the_same_sizes(seed: int) -> None:
    first, second = ConstellationClassifier(D, K, 2), SubcenterClassifier(D, K, 3)
    head, x = TwoHeadClassifier(first, second), torch.randn(B, D)
    assert torch.equal(head(x), first(x) + second(x))
    assert torch.equal(head.freeze().predict(x), head.predict(x))
    assert repr(head).startswith(f"TwoHeadClassifier(\n  in_features={D}, num_classes={K}\n  (balanced): Con")


@pytest.mark.parametrize("narrow", ["balanced", "random"])
def test_heads_of_two_dtypes_have_logits_of_the_wider_one(narrow: str, seed: int) -> None:
    dtypes = [torch.float32 if name == narrow else torch.float64 for name in ("balanced", "random")]
    head = TwoHeadClassifier(*(ConstellationClassifier(D, K, 4, dtype=dtype) for dtype in dtypes))
    x = torch.randn(B, D)
    with_gradients = head(x)
    with torch.no_grad():
        without = head(x)
        found = head.predict_topk(x, 3)
    assert with_gradients.dtype == without.dtype == found.probabilities.dtype == torch.float64
    assert torch.equal(with_gradients, without)
    assert torch.equal(found.classes, without.topk(3).indices)
    torch.testing.assert_close(found.probabilities, without.softmax(1).topk(3).values)


def test_a_model_per_sample_vmap_has_the_logits_of_the_batch(seed: int) -> None:
    head, x = exported(HEADS["translation"], dtype=F64), torch.randn(5, D, dtype=F64)
    biases = torch.randn(4, K, dtype=F64)

    def logits(bias: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"class_bias": bias}, (x,))

    with torch.no_grad():
        every = torch.vmap(logits)(biases)
        for ours, bias in zip(every, biases, strict=True):
            torch.testing.assert_close(ours, logits(bias))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: g.export("random"), ValueError, "heads: expected 'balanced' or 'both', got 'random'"),
        (lambda g: g.export(class_bias=torch.zeros(K)), ValueError, "class_bias: expected None"),
        (lambda g: g.export("both", torch.zeros(K + 1)), ValueError, rf"class_bias: expected shape \[{K}\]"),
        (lambda g: g.export("both", torch.zeros(K).int()), TypeError, "class_bias: expected"),
        (lambda g: g.export("both", [0.0] * K), TypeError, "class_bias: expected a"),
        (lambda g: TwoHeadClassifier(g, nn.Linear(D, K)), TypeError, "random: expected a head .* got Linear"),
        (
            lambda g: TwoHeadClassifier(g, GistClassifier(D, K - 1)),
            ValueError,
            "random: expected num_classes",
        ),
        (lambda g: g.export("both").predict_topk(torch.zeros(1, D), K + 1), ValueError, "k: expected"),
        (lambda g: g.export("both")([[1.0] * D]), TypeError, "input: expected a torch.Tensor, got list"),
        (lambda g: g.export("both").predict([[1.0] * D]), TypeError, "input: expected a torch.Tensor"),
        (
            lambda g: g.export("both")(torch.zeros(1, D), logits_dtype=F64),
            ValueError,
            "logits_dtype: expected",
        ),
        (
            lambda g: g.export("both").predict(torch.zeros(1, D), class_bias=torch.zeros(K - 1)),
            ValueError,
            "class_bias: expected shape",
        ),
    ],
)
def test_errors_name_the_argument(
    call: Callable[[GistClassifier], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(GistClassifier(D, K))
