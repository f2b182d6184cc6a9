"""Tests of ClassBalancedBatchSampler: balance, distinctness, replicas, resuming, cost."""

from __future__ import annotations

import io
import itertools
import sys
from collections import Counter
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from gistops.sampling import ClassBalancedBatchSampler


def long_tailed(classes: int, largest: int, seed: int, smallest: int = 1) -> np.ndarray:
    """Draw shuffled labels [N] of `classes` classes (ids with gaps) with `largest` to `smallest` images."""
    rng = np.random.default_rng(seed)
    counts = np.geomspace(largest, smallest, classes).round().astype(int)
    ids = np.sort(rng.choice(3 * classes, classes, replace=False))
    return rng.permutation(np.repeat(ids, counts))


def draw(sampler: ClassBalancedBatchSampler, batches: int) -> list[list[int]]:
    return list(itertools.islice(sampler, batches))


# classes, classes_per_batch, samples_per_class: windows that divide the cycles, do not, or fill them
SIZES = [(37, 10, 4), (40, 8, 4), (33, 32, 4), (32, 32, 3), (7, 5, 4), (5, 3, 7), (1, 1, 4), (3, 1, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_visits_differ_by_at_most_one_at_every_moment(sizes: tuple[int, int, int], seed: int) -> None:
    classes, per_batch, samples = sizes
    labels = long_tailed(classes, 60, seed)
    members = {c: np.flatnonzero(labels == c).tolist() for c in np.unique(labels).tolist()}
    sampler = ClassBalancedBatchSampler(labels, per_batch, samples, seed=seed)
    class_visits: Counter[int] = Counter(dict.fromkeys(members, 0))
    image_visits: Counter[int] = Counter(dict.fromkeys(range(len(labels)), 0))
    for batch in draw(sampler, 61 * classes // per_batch + 3):
        assert len(batch) == per_batch * samples
        chosen = [batch[i : i + samples] for i in range(0, len(batch), samples)]
        names = [int(labels[part[0]]) for part in chosen]
        assert len(set(names)) == per_batch, "classes of a batch are distinct"
        for name, part in zip(names, chosen, strict=True):
            assert {int(labels[image]) for image in part} == {name}
            assert len(set(part)) == min(samples, len(members[name])) or len(members[name]) < samples
            class_visits[name] += 1
            assert max(class_visits.values()) - min(class_visits.values()) <= 1
            for image in part:
                image_visits[image] += 1
                visits = [image_visits[other] for other in members[name]]
                assert max(visits) - min(visits) <= 1
    assert min(image_visits.values()) > 0


@pytest.mark.parametrize("sizes", [(37, 3, 4, 5), (40, 8, 5, 4), (11, 4, 3, 2), (6, 5, 4, 4)], ids=str)
def test_replicas_share_one_sequence(sizes: tuple[int, int, int, int], seed: int) -> None:
    classes, per_batch, replicas, samples = sizes
    labels = long_tailed(classes, 50, seed)
    ranks = [
        draw(ClassBalancedBatchSampler(labels, per_batch, samples, seed, replicas, rank), 60)
        for rank in range(replicas)
    ]
    class_visits: Counter[int] = Counter(dict.fromkeys(np.unique(labels).tolist(), 0))
    image_visits: Counter[int] = Counter(dict.fromkeys(range(len(labels)), 0))
    for group in zip(*ranks, strict=True):
        names = [int(labels[batch[i]]) for batch in group for i in range(0, len(batch), samples)]
        if classes >= replicas * per_batch:
            assert len(set(names)) == replicas * per_batch, "no class in two batches of a group"
        class_visits.update(names)
        image_visits.update(image for batch in group for image in batch)
        assert max(class_visits.values()) - min(class_visits.values()) <= 1
    for name in class_visits:
        visits = [image_visits[i] for i in np.flatnonzero(labels == name).tolist()]
        assert max(visits) - min(visits) <= 1


def test_cycles_are_uniformly_shuffled(seed: int) -> None:
    """At every position of a cycle all classes are equally likely, also across windows."""
    classes, cycles = 7, 6000
    sampler = ClassBalancedBatchSampler(np.arange(classes), 5, 1, seed=seed)
    drawn = np.array(draw(sampler, classes * cycles // 5)).reshape(cycles, classes)
    expected, deviation = cycles / classes, (cycles / classes * (1 - 1 / classes)) ** 0.5
    for place in range(classes):
        counts = np.bincount(drawn[:, place], minlength=classes)
        assert np.abs(counts - expected).max() < 6 * deviation, (place, counts)
    assert len({tuple(cycle) for cycle in drawn[:50].tolist()}) > 45  # of 5040 permutations
    # Cycles 2, 7, 12, .. begin with one position of a window whose other positions are the last 4 of the previous cycle.
    # These items are uniformly distributed over all positions but the first.
    pairs = [(drawn[i - 1, 3:], drawn[i]) for i in range(2, cycles, 5)]
    places = np.array([[cycle.tolist().index(item) for item in last] for last, cycle in pairs])
    expected, deviation = len(pairs) / 6, (len(pairs) / 6 * (1 - 1 / 6)) ** 0.5
    for column in places.T:
        counts = np.bincount(column, minlength=classes)
        assert counts[0] == 0
        assert np.abs(counts[1:] - expected).max() < 6 * deviation, counts
    other = ClassBalancedBatchSampler(np.arange(classes), 5, 1, seed=seed + 1)
    assert draw(other, 20) != drawn.reshape(-1, 5)[:20].tolist()


def test_images_of_two_classes_are_shuffled_independently(seed: int) -> None:
    sampler = ClassBalancedBatchSampler(np.repeat([0, 1], 50), 2, 50, seed=seed)
    orders = {tuple(image % 50 for image in batch[i : i + 50]) for batch in draw(sampler, 3) for i in (0, 50)}
    assert len(orders) == 6


def test_the_sequence_is_the_same_on_every_machine() -> None:
    """A run that resumes under other versions of numpy and torch must continue with the same batches."""
    labels = [0, 0, 0, 2, 2, 2, 2, 2, 5, 7, 7]
    batches = draw(ClassBalancedBatchSampler(labels, 3, 2, seed=11), 5)
    assert batches == RECORDED


RECORDED = [
    [2, 0, 8, 8, 7, 3],
    [10, 9, 8, 8, 6, 4],
    [1, 0, 9, 10, 8, 8],
    [2, 1, 9, 10, 5, 3],
    [4, 6, 10, 9, 8, 8],
]


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 7, 23, 50])
def test_resumes_with_the_same_batches(at: int, replicas: int, seed: int) -> None:
    labels = long_tailed(31, 40, seed)
    arguments: dict[str, Any] = {"classes_per_batch": 9, "seed": seed, "num_replicas": replicas}
    first = ClassBalancedBatchSampler(labels, rank=replicas - 1, **arguments)
    draw(first, at)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    expected = draw(first, 30)
    file.seek(0)
    second = ClassBalancedBatchSampler(torch.from_numpy(labels), rank=replicas - 1, **arguments)
    iterator = iter(second)  # created before the state is loaded, and follows it
    draw(second, 3)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert list(itertools.islice(iterator, 30)) == expected
    second.load_state_dict(
        {**first.state_dict(), "batches": at + 4}
    )  # the position of training, not of prefetching
    assert draw(second, 26) == expected[4:]


def test_another_number_of_replicas_continues_at_the_same_position(seed: int) -> None:
    labels = long_tailed(31, 40, seed)
    state = draw_state(ClassBalancedBatchSampler(labels, 3, seed=seed, num_replicas=4), 25)
    sampler = ClassBalancedBatchSampler(labels, 3, seed=seed, num_replicas=3)
    sampler.load_state_dict(state)
    assert sampler.state_dict()["batches"] == 34  # 100 batches in all: 33 groups of 3 are 99
    assert set(map(type, state.values())) == {int}


def draw_state(sampler: ClassBalancedBatchSampler, batches: int) -> dict[str, int]:
    draw(sampler, batches)
    return sampler.state_dict()


def test_a_new_iterator_continues(seed: int) -> None:
    labels = long_tailed(20, 30, seed)
    whole = draw(ClassBalancedBatchSampler(labels, 6, seed=seed), 10)
    sampler = ClassBalancedBatchSampler(labels, 6, seed=seed)
    assert draw(sampler, 4) + draw(sampler, 6) == whole


@pytest.mark.parametrize("kind", ["list", "int16", "uint8", "tensor"])
def test_labels_of_any_integer_type_give_the_same_batches(kind: str, seed: int) -> None:
    labels = long_tailed(20, 30, seed)
    same = {"list": labels.tolist(), "tensor": torch.from_numpy(labels)}.get(kind)
    same = labels.astype(kind) if same is None else same
    expected = draw(ClassBalancedBatchSampler(labels, 6, seed=seed), 10)
    batches = draw(ClassBalancedBatchSampler(same, 6, seed=seed), 10)
    assert batches == expected
    assert {type(image) for batch in batches for image in batch} == {int}


class LabeledDataset(Dataset[tuple[int, int]]):
    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, int(self.labels[index])


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers: int, seed: int) -> None:
    labels = long_tailed(20, 30, seed)
    sampler = ClassBalancedBatchSampler(labels, 6, 3, seed=seed)
    loader = DataLoader(
        LabeledDataset(labels), batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )
    expected = draw(ClassBalancedBatchSampler(labels, 6, 3, seed=seed), 12)
    batches = [images.tolist() for images, _ in itertools.islice(loader, 12)]
    assert batches == expected
    again = [images.tolist() for images, _ in itertools.islice(loader, 12)]  # another iterator, same workers
    assert not any(batch in expected for batch in again)


def count_lines(classes: int, largest: int) -> tuple[int, list[int], int]:
    """Count the lines that run in the constructor, in each of ten batches, and in one batch far ahead.

    Lines, because Python 3.12.0 and 3.12.1 do not trace the bytecodes of a frame that begins during the trace.
    """
    labels = long_tailed(classes, largest, 0, smallest=2)
    executed = 0

    def trace(_frame: FrameType, event: str, _: Any) -> Any:
        nonlocal executed
        executed += event == "line"
        return trace

    def count(function: Any) -> int:
        nonlocal executed
        executed, before = 0, sys.gettrace()
        sys.settrace(trace)
        try:
            function()
        finally:
            sys.settrace(before)
        return executed

    made: list[ClassBalancedBatchSampler] = []
    setup = count(lambda: made.append(ClassBalancedBatchSampler(labels)))
    iterator = iter(made[0])
    batches = [count(lambda: next(iterator)) for _ in range(10)]
    assert len(made[0]._images) <= 10 * 32  # no state for classes that were not drawn
    made[0].load_state_dict({**made[0].state_dict(), "batches": 1_000_003})
    return setup, batches, count(lambda: next(iterator))


def test_cost_is_independent_of_the_numbers_of_classes_and_images() -> None:
    """8,142 classes need as many lines as 100: no Python loop runs over classes or images."""
    small, large = count_lines(100, 40), count_lines(8142, 300)
    assert large[0] < 1.1 * small[0] + 100
    assert max(large[1]) < 1.5 * max(small[1])
    assert large[2] < 4 * max(large[1])  # earlier batches are not computed


GOOD: dict[str, Any] = {"labels": [0, 0, 1, 2], "classes_per_batch": 2}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"labels": []}, ValueError, r"labels: expected one class .* \[N\] with N >= 1, got \[0\]"),
    ({"labels": [[0, 1], [1, 2]]}, ValueError, r"labels: expected one class .*, got \[2, 2\]"),
    ({"labels": [[0, 1], [1]]}, ValueError, "labels: expected one class .* rows that differ"),
    ({"labels": 3}, ValueError, r"labels: expected one class .*, got \[\]"),
    ({"labels": [0.0, 1.0]}, TypeError, "labels: expected integers, got float64"),
    ({"labels": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "labels: .* got torch.bfloat16"),
    ({"labels": ["a", "b"]}, TypeError, "labels: expected integers, got <U1"),
    ({"labels": [True, False]}, TypeError, "labels: expected integers, got bool"),
    ({"labels": [0, 1, -1]}, ValueError, "labels: expected classes of at least 0, got -1"),
    (
        {"labels": np.array([0, 2**63], np.uint64)},
        ValueError,
        r"labels: expected classes of at most 2\*\*63 - 1, got 9223372036854775808",
    ),
    ({"classes_per_batch": 4}, ValueError, "classes_per_batch: expected at most 3, .* got 4"),
    ({"classes_per_batch": 0}, ValueError, "classes_per_batch: expected an integer of at least 1, got 0"),
    ({"classes_per_batch": 2.0}, TypeError, "classes_per_batch: .* got 2.0 of type float"),
    ({"samples_per_class": 0}, ValueError, "samples_per_class: expected an integer of at least 1, got 0"),
    ({"samples_per_class": True}, TypeError, "samples_per_class: .* got True of type bool"),
    ({"seed": -1}, ValueError, "seed: expected an integer of at least 0, got -1"),
    ({"num_replicas": 0}, ValueError, "num_replicas: expected an integer of at least 1, got 0"),
    ({"num_replicas": 2, "rank": 2}, ValueError, "rank: expected an integer from 0 to 1, got 2"),
    ({"rank": "0"}, TypeError, "rank: .* got '0' of type str"),
]


@pytest.mark.parametrize(("bad", "error", "words"), BAD, ids=[str(b[0]) for b in BAD])
def test_bad_arguments_raise(bad: dict[str, Any], error: type[Exception], words: str) -> None:
    ClassBalancedBatchSampler(**GOOD)
    with pytest.raises(error, match=f"^{words}"):
        ClassBalancedBatchSampler(**{**GOOD, **bad})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "seed: expected 0, as in the state, got 1"),
        ({"classes_per_batch": 3}, "classes_per_batch: expected 2, as in the state, got 3"),
        ({"samples_per_class": 3}, "samples_per_class: expected 4, as in the state, got 3"),
        ({"labels": [0, 1, 0, 2]}, r"labels: expected a checksum of \d+, as in the state, got \d+"),
    ],
)
def test_the_state_of_another_sampler_raises(other: dict[str, Any], words: str) -> None:
    state = ClassBalancedBatchSampler(**GOOD).state_dict()
    with pytest.raises(ValueError, match=f"^{words}$"):
        ClassBalancedBatchSampler(**{**GOOD, **other}).load_state_dict(state)
    del state["seed"]
    with pytest.raises(KeyError, match=r"state: expected entries batches, .* got none for seed"):
        ClassBalancedBatchSampler(**GOOD).load_state_dict(state)


def test_positions_are_checked() -> None:
    sampler = ClassBalancedBatchSampler(**GOOD, num_batches=3)
    state, largest = sampler.state_dict(), 2**62 // (2 * 4)
    for wrong in (None, [1], 3):
        with pytest.raises(TypeError, match=f"^state: expected a mapping, .* got {type(wrong).__name__}$"):
            sampler.load_state_dict(wrong)  # type: ignore[arg-type]
    for epoch in (-1, largest // 3 + 1, 2**63):
        with pytest.raises(ValueError, match=f"^epoch: expected an integer from 0 to .*, got {epoch}$"):
            sampler.set_epoch(epoch)
    with pytest.raises(ValueError, match=r"^state\['batches'\]: expected an integer from 0 to .*, got"):
        sampler.load_state_dict({**state, "batches": largest + 1})
    assert sampler.state_dict() == state
    sampler.set_epoch(largest // 3)
    assert [len(batch) for batch in sampler] == [8, 8, 8]
    sampler.load_state_dict({**state, "batches": largest})
    assert len(next(iter(sampler))) == 8
    with pytest.raises(ValueError, match=f"^epoch: .* got {2**63}$"):
        ClassBalancedBatchSampler(**GOOD).set_epoch(2**63)
