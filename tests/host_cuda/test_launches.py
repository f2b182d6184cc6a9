"""Launches and scratch memory of a step of the CUDA loss. The ops run up to their launches, which are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .host_cross_entropy import HostLoss

B, DIMS, DISPLACEMENTS = 256, 512, 4
Counts = dict[str, int]


@pytest.fixture
def counting(module: Any) -> Iterator[None]:
    """Count launches and run none of them."""
    module.count_only(True)
    module.count()
    yield
    module.count_only(False)
    module.count()


def step(module: Any, classes: int, scores: str) -> tuple[Counts, Counts]:
    """Return what forward and backward request."""
    sizes = ((B, DIMS), (classes, DIMS), (DISPLACEMENTS, DIMS))
    tensors = [*(torch.empty(size, dtype=torch.bfloat16) for size in sizes), torch.ones(())]
    loss = HostLoss(module, tensors, torch.zeros(B, dtype=torch.int64), scores, margin=0.3)
    forward = module.count()
    loss.gradients(torch.ones(()), None)
    return forward, module.count()


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("scores", ["kept", "parked"])
def test_a_step_takes_at_most_12_launches_for_any_number_of_classes(scores: str, module: Any) -> None:
    steps = [step(module, classes, scores) for classes in (1000, 100_000)]
    launches = [forward["launches"] + backward["launches"] for forward, backward in steps]
    assert 0 < launches[0] <= 12
    assert launches[1] == launches[0]
    for forward, backward in steps:
        assert (forward["products"], backward["products"]) == (1, 1)


def vector_step(
    module: Any, form: str, classes: int, scores: str, rows: int = B, count: int = 3, dims: int = DIMS
) -> tuple[Counts, Counts]:
    """Return what forward and backward of a loss of `count` sub-centers per class, or of `count` rotations, request."""
    vectors = (classes, count, dims) if form == "subcenters" else (classes, dims)
    tensors = [*(torch.empty(size, dtype=torch.bfloat16) for size in ((rows, dims), vectors, (0, dims)))]
    coeffs: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if form == "rotation":
        coeffs = torch.empty(rows, count + 1), torch.empty(2, count + 1, classes)
    target = torch.zeros(rows, dtype=torch.int64)
    loss = HostLoss(module, [*tensors, torch.ones(())], target, scores, coeffs=coeffs, margin=0.3)
    forward = module.count()
    loss.gradients(torch.ones(()), None)
    return forward, module.count()


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("form", ["subcenters", "rotation"])
def test_launches_of_a_step_of_subcenters_and_rotations(form: str, module: Any) -> None:
    """At most 12 if the products of all sub-centers are one chunk, and 8 more for each chunk of 2^25 products."""
    (forward, backward), large = (vector_step(module, form, classes, "kept") for classes in (20_000, 100_000))
    assert 0 < forward["launches"] + backward["launches"] <= 12
    assert (forward["products"], backward["products"]) == (1, 1)
    chunks = 3 if form == "subcenters" else 1
    assert large[0]["products"] == large[1]["products"] == chunks
    assert sum(counts["launches"] for counts in large) <= 12 + 8 * (chunks - 1)


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("scores", ["kept", "recomputed"])
def test_a_loss_of_subcenters_has_no_memory_for_the_products_of_all_classes(scores: str, module: Any) -> None:
    for counts in vector_step(module, "subcenters", 400_000, scores):
        assert 0 < counts["bytes"] <= 0.5e9 < B * 400_000 * 3 * 4


@pytest.mark.usefixtures("counting")
def test_memory_of_many_subcenters_whose_scores_are_not_kept(module: Any) -> None:
    """Chunks of few classes have partials too: 20,000 classes have about 1000 per row, and not one each."""
    forward, _ = vector_step(module, "subcenters", 20_000, "recomputed", rows=8192, count=256, dims=8)
    assert 0 < forward["bytes"] <= 0.4 * 8192 * 20_000 * 4


@pytest.mark.usefixtures("counting")
def test_memory_of_the_gradients_of_many_rotations(module: Any) -> None:
    """Partials of the gradient of class_coeffs are those of a chunk, if the scores are kept too."""
    module.set_limits(1 << 22, 1 << 20)
    try:
        _, backward = vector_step(module, "rotation", 20_000, "kept", rows=2048, count=63, dims=8)
    finally:
        module.reset_limits()
    assert 0 < backward["bytes"] <= 0.4 * 2048 * 20_000 * 4


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("rows", [16, 256])
def test_partial_sums_of_a_short_last_chunk_have_memory(rows: int, module: Any) -> None:
    """Fewer tiles of classes can make more groups: 265 tiles make 133 groups of two, and 264 tiles 264 groups of one."""
    chunk = 265 * 128
    module.set_limits(1 << 22, (chunk - 1) * rows)
    try:
        for last in (264 * 128, 256 * 8, 255 * 8, 264 * 64, 1):
            sizes = ((rows, 16), (chunk + last, 16), (DISPLACEMENTS, 16))
            tensors = [*(torch.empty(size, dtype=torch.bfloat16) for size in sizes), torch.ones(())]
            loss = HostLoss(module, tensors, torch.zeros(rows, dtype=torch.int64), "recomputed")
            module.count()
            loss.gradients(torch.ones(()), None)  # raises an error before it exceeds its memory
            assert module.count()["products"] == 4  # scores and H W of two chunks
    finally:
        module.reset_limits()


@pytest.mark.usefixtures("counting")
def test_a_step_with_parked_scores_takes_little_memory(module: Any) -> None:
    """Scratch memory is at most 5 % of the logits."""
    classes = 100_000
    for counts in step(module, classes, "parked"):
        assert 0 < counts["bytes"] <= 0.05 * B * classes * 4
