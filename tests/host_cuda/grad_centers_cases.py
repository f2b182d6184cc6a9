"""Cases of the two kernels for the gradient of the centers in half precision; run by test_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.ops.oracle import Sample, allowed, error, gradients, leaves, routed

from .host_cross_entropy import HostLoss
from .host_logits import HostLogits
from .logits_cases import assert_same_bits_in_any_order

half, bf16 = torch.float16, torch.bfloat16
#: The tile that is asked for, and the compute capability: the tiled kernel; the stationary one with tiles of 64 classes by
#: 256 dims and of 128 classes by 128 dims; by wgmma, of 64 classes by 128 dims and of 128 classes by 64 dims.
FORMS = {
    "tiled": (0, 80),
    "wide": (64, 80),
    "high": (128, 80),
    "wgmma wide": (64, 90),
    "wgmma high": (128, 90),
}
SIZES = [(37, 130, 296, 4), (172, 70, 40, 8), (129, 66, 136, 12), (5, 3, 264, 0), (16, 129, 8, 1)]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, module: Any) -> Iterator[str]:
    """Force a kernel and its tile."""
    asked, capability = FORMS[request.param]
    monkeypatch.setenv("GISTOPS_CUDA_CENTERS_TILE", str(asked))
    module.set_compute_capability(capability)
    yield str(request.param)
    module.set_compute_capability(90)


def check(tensors: list[torch.Tensor], module: Any, seed: int, terms: int) -> None:
    """Compare the gradients of the centers and of the displacements."""
    B, K = len(tensors[0]), len(tensors[1])
    grad = torch.randn(B, K, generator=torch.Generator().manual_seed(seed + 1))
    kernels = HostLogits(module, tensors)
    _, centers, displacements, _ = kernels.gradients(grad, (False, True, False, False))
    assert centers is not None
    values = module.logits_backward(
        kernels.type, grad.numpy(), *kernels.arrays, *kernels.saved, False, True, True, False, False
    )
    true = gradients(lambda *t: routed(*t, kernels.slots), leaves(tensors, torch.float64), grad)
    for part in (slice(0, None, 2), slice(1, None, 2)):
        assert error(centers[part], true[1][part]) <= allowed(0.0, true[1][part], tensors[1].dtype, terms)
    displacements = torch.from_numpy(values[2])
    assert error(displacements, true[2]) <= allowed(0.0, true[2], torch.float32, B * K * terms)
    alone = module.logits_backward(
        kernels.type, grad.numpy(), *kernels.arrays, *kernels.saved, False, False, True, False, False
    )
    assert torch.equal(torch.from_numpy(alone[2]), displacements)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("dtype", [bf16, half])
def test_gradients_of_centers_and_displacements(
    dtype: torch.dtype, size: tuple[int, int, int, int], form: str, module: Any, seed: int
) -> None:
    check(Sample(*size, dtype, dtype, dtype).tensors(seed), module, seed, size[0])


@pytest.mark.parametrize("dtype", [bf16, half])
@pytest.mark.parametrize("m", [3, 12])
def test_gradients_of_centers_that_a_displacement_nearly_cancels(
    m: int, dtype: torch.dtype, form: str, module: Any, seed: int
) -> None:
    tensors = Sample(37, 133, 264, m, dtype, dtype, dtype).tensors(seed)
    with torch.no_grad():
        tensors[1][[7, 90, 131, 132]] = -tensors[2][1] + 1e-1 * tensors[1][[7, 90, 131, 132]]
    assert (HostLogits(module, tensors).center_rnorms < 0).any()
    check(tensors, module, seed, 37 * 133)


@pytest.mark.parametrize("scales", [(1e-3, 1.0), (1e3, 1e3)])
def test_corrections_in_float16_for_norms_of_any_size(
    scales: tuple[float, float], form: str, module: Any, seed: int
) -> None:
    """T is as the square of the reciprocal norm of a center, beyond the range of float16."""
    tensors = Sample(37, 66, 40, 2, half, half, half).tensors(seed)
    with torch.no_grad():
        tensors[1][::2] *= scales[0]
        tensors[1][1::2] *= scales[1]
        tensors[2] *= min(scales)
        tensors[3].fill_(1)  # larger ones can exceed float16 in the gradient of a short center
    check(tensors, module, seed, 37)


def test_same_bits_of_each_form_in_any_order_of_threads(form: str, module: Any, seed: int) -> None:
    tensors = Sample(37, 133, 264, 4, bf16, bf16, bf16).tensors(seed)
    with torch.no_grad():
        tensors[1][70] = -tensors[2][1] + 1e-1 * tensors[1][70]
    grad = torch.randn(37, 133, generator=torch.Generator().manual_seed(seed))
    kernels = HostLogits(module, tensors)
    assert_same_bits_in_any_order(
        module, seed, lambda: kernels.gradients(grad, (False, True, True, False))[1:3]
    )


@pytest.mark.parametrize(
    ("capability", "rows", "parked", "plan"),
    [
        (90, 256, False, ("wgmma", 128, 4)),
        (90, 256, True, ("wgmma", 128, 1)),
        (90, 512, False, ("tiled", 128, 1)),  # one block of wgmma per multiprocessor is slower
        (90, 2048, True, ("tiled", 128, 1)),  # H does not fit
        (80, 256, False, ("tiled", 128, 1)),
        (100, 256, True, ("mma", 128, 1)),
    ],
)
def test_kernel_and_tile_by_sizes_and_device(
    capability: int,
    rows: int,
    parked: bool,
    plan: tuple[str, int, int],
    module: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GISTOPS_CUDA_CENTERS_TILE", raising=False)
    module.set_compute_capability(capability)
    try:
        assert module.grad_centers_plan(rows, 8142, 2048, 4, parked) == plan
    finally:
        module.set_compute_capability(90)


@pytest.mark.parametrize(("m", "shared_memory"), [(3, 227 << 10), (0, 90400)])
def test_parked_scores_with_every_form(m: int, shared_memory: int, form: str, module: Any, seed: int) -> None:
    """The form may change between a forward and its backward. In 90400 bytes the high tile fits, and the wide one does not."""
    tensors = Sample(20, 133, 64, m, bf16, bf16, bf16).tensors(seed)
    target = torch.randint(133, (20,), generator=torch.Generator().manual_seed(seed))
    module.set_shared_memory(shared_memory)
    try:
        assert HostLoss.parks(module, tensors)
        parked, kept = (HostLoss(module, tensors, target, scores=scores) for scores in ("parked", "kept"))
        made, expected = (loss.gradients(torch.ones(()), None)[1] for loss in (parked, kept))
    finally:
        module.set_shared_memory(227 << 10)
    assert made is not None
    assert expected is not None
    assert error(made, expected.double()) <= allowed(0.0, expected.double(), bf16, 20 * 133)


@pytest.mark.parametrize("form", list(FORMS)[1:], indirect=True)
@pytest.mark.parametrize("dtype", [bf16, half])
@pytest.mark.parametrize(("B", "cancelled"), [(37, [7, 90, 131]), (130, [])])
def test_weights_in_the_memory_of_the_gradient(
    B: int, cancelled: list[int], dtype: torch.dtype, form: str, module: Any, seed: int
) -> None:
    """H lies at the start of each row of the gradient that the kernel writes, and the scores are gone."""
    K, d, m = 133, 392, 3
    tensors = Sample(B, K, d, m, dtype, dtype, dtype).tensors(seed)
    with torch.no_grad():
        tensors[1][cancelled] = -tensors[2][1] + 1e-1 * tensors[1][cancelled]
    target = torch.randint(K, (B,), generator=torch.Generator().manual_seed(seed))
    loss = HostLoss(module, tensors, target, reduction="sum")
    saved = loss.saved
    z, slots, center_rnorms, input_rnorms = (
        torch.from_numpy(saved[name]) for name in ("scores", "slots", "center_rnorms", "input_rnorms")
    )
    z, slots = z[:, :B].double(), slots[:, :B].long()
    grad = z.softmax(dim=0) - torch.nn.functional.one_hot(target, K).T
    rnorms = center_rnorms.T.double().gather(1, slots)
    won = torch.nn.functional.one_hot(slots, m + 1)
    t = ((grad * z)[:, :, None] * won).sum(1) * center_rnorms.T.double() ** 2
    h = float(tensors[3].detach()) * grad * rnorms.clamp_min(0) * input_rnorms.double()
    assert bool((rnorms < 0).any()) == bool(cancelled), "a cancelled slot wins"
    memory = torch.full((K, d), float("nan"), dtype=dtype)
    memory[:, : (B + 15) // 16 * 16] = 0
    memory[:, :B] = h.to(dtype)
    parked = memory.view(torch.uint16).numpy()
    partials = module.grad_centers_parked(
        loss.type,
        *loss.arrays,
        loss.loss_arguments,
        saved,
        torch.ones(1).numpy(),
        t.float().numpy(),
        bool((center_rnorms < 0).any()),
        parked,
    )
    true = gradients(lambda *x: routed(*x, slots.T), leaves(tensors, torch.float64), grad.T)
    centers = torch.from_numpy(parked).view(dtype)
    assert error(centers, true[1]) <= allowed(0.0, true[1], dtype, B * K)
    routed_sums = torch.einsum("ki,kij,id->jd", h, won[:, :, 1:].double(), tensors[0].detach().double())
    displacements = routed_sums - torch.from_numpy(partials).double().sum(0)
    assert error(displacements, true[2]) <= allowed(0.0, true[2], torch.float32, B * K)
