"""Tests of the heads within PyTorch: export, compile, copies, state dicts, casts, autocast, optimizers, DDP."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gistops import backends
from gistops.nn import ConstellationClassifier, GistClassifier

from ..processes import in_group
from .samples import KINDS, B, D, K, M


def make(kind: type[Any], m: int = M, **arguments: Any) -> Any:
    """Create a head whose displacements are so long that every slot wins for some pair."""
    head = kind(D, K, m, displacement_scale=0.9, **arguments)
    nn.init.uniform_(head.raw_tau, 8, 20)
    return head


@pytest.fixture
def fused_backend() -> None:
    """Fail if the reference backend is chosen, which does not support these tests."""
    assert backends.choose(torch.get_default_device().type, None) != "reference"


def streams() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(B, D), torch.randint(K, (B,)), torch.randn(B + 6, D), torch.randint(K, (B + 6,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [0, M])
def test_export_returns_the_inference_head_alone(m: int, dtype: torch.dtype, seed: int) -> None:
    head = make(GistClassifier, m, dtype=dtype, backend="reference").train()
    state = torch.get_rng_state()
    exported = head.export()
    assert torch.equal(torch.get_rng_state(), state), "export draws no random numbers"
    assert type(exported) is ConstellationClassifier
    assert exported.backend == "reference"
    assert set(exported.state_dict()) == {"centers", "displacements", "raw_tau"}
    x = torch.randn(B, D)
    expected = head(x)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1)  # does not change the copy
    assert torch.equal(exported(x), expected)
    fresh = ConstellationClassifier(D, K, m, dtype=dtype)
    fresh.load_state_dict(exported.state_dict())
    torch.testing.assert_close(fresh(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("m", [0, M])
@pytest.mark.usefixtures("fused_backend")
def test_torch_export_with_any_batch(m: int, seed: int) -> None:
    head = make(GistClassifier, m).export()
    program = torch.export.export(
        head, (torch.randn(B, D),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (1, 2, B, 300):
        x = torch.randn(size, D)
        assert torch.equal(loaded(x), head(x))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_forward_without_graph_breaks(kind: type[Any], seed: int) -> None:
    torch.compiler.reset()
    head = make(kind)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, D, requires_grad=True)
    logits, expected = compiled(x), head(x)
    torch.testing.assert_close(logits, expected)
    weight = torch.randn_like(logits)
    inputs = [x, head.centers, head.displacements, head.raw_tau]
    ours = torch.autograd.grad(logits, inputs, weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, inputs, weight))
    slots = torch.compile(lambda x: head(x, return_slots=True)[1], fullgraph=True, backend="aot_eager")
    assert torch.equal(slots(x), head(x, return_slots=True)[1])


def test_compiled_losses_without_graph_breaks_in_both_stages(seed: int) -> None:
    torch.compiler.reset()
    head = make(GistClassifier, 0)
    compiled = torch.compile(head.losses, fullgraph=True, backend="aot_eager")
    for stage in (1, 2):
        arguments = streams()
        ours, expected = compiled(*arguments), head.losses(*arguments)
        torch.testing.assert_close(ours, expected)
        for loss, same in zip(ours, expected, strict=True):
            # The compiled losses are one graph, which returns zeros if eager autograd returns None.
            parameters = [p for p in head.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
            wanted = torch.autograd.grad(same, parameters, allow_unused=True)
            for a, b in zip(gradients, wanted, strict=True):
                if b is None:
                    assert a is None or not a.any()
                else:
                    torch.testing.assert_close(a, b)
        if stage == 1:
            head.add_displacements(scale=0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_independent(kind: type[Any], seed: int) -> None:
    head, x = make(kind), torch.randn(B, D)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin(x), head(x))
        nn.init.zeros_(twin.centers)
        assert head.centers.all()
        assert repr(twin) == repr(head)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_of_the_second_stage(kind: type[Any], seed: int) -> None:
    head = make(kind, 0)
    head.add_displacements(3)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = kind(D, K, 3)
    fresh.load_state_dict(state)
    x = torch.randn(B, D)
    assert torch.equal(fresh(x), head(x))
    late = kind(D, K, 0)
    late.load_state_dict(state)
    assert torch.equal(late(x), head(x))
    materialized = kind(D, K, 3, device="meta").to_empty(device=torch.get_default_device())
    materialized.load_state_dict(state, assign=True)
    assert torch.equal(materialized(x), head(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_accumulates_in_float32(dtype: torch.dtype, seed: int) -> None:
    head = make(GistClassifier).to(dtype)
    exact = copy.deepcopy(head).double()
    xb, yb, xr, yr = streams()
    xb, xr = xb.to(dtype), xr.to(dtype)
    logits = head(xb)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact(xb), atol=1e-4, rtol=1e-5)  # sums are in float32
    losses = head.losses(xb, yb, xr, yr)
    torch.testing.assert_close(
        [x.double() for x in losses], list(exact.losses(xb, yb, xr, yr)), rtol=1e-5, atol=1e-5
    )
    sum(losses).backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.any() for p in head.parameters())


def test_features_of_autocast_are_accepted(device: str, seed: int) -> None:
    """Under autocast a backbone returns bfloat16 features. The head is in float32; on a GPU its matmul is in bfloat16."""
    head = make(GistClassifier)
    backbone = nn.Linear(D, D)
    xb, yb, xr, yr = streams()
    with torch.autocast(device, torch.bfloat16):
        features = backbone(xb)
        assert features.dtype == torch.bfloat16
        logits = head(features)
        losses = head.losses(features, yb, backbone(xr), yr)
    assert logits.dtype == losses[0].dtype == losses[1].dtype == torch.float32
    exact = copy.deepcopy(head).double()
    if device == "cuda":
        with torch.no_grad():
            for parameter in (exact.centers, exact.displacements):
                parameter.copy_(parameter.bfloat16())
    torch.testing.assert_close(logits.double(), exact(features.double()), atol=1e-4, rtol=1e-5)
    sum(losses).backward()
    for parameter in (*head.parameters(), *backbone.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


@pytest.mark.usefixtures("fused_backend")
def test_a_meta_module_has_meta_losses() -> None:
    head = GistClassifier(D, K, device="meta")
    assert {p.device.type for p in head.parameters()} == {"meta"}
    losses = head.losses(*(x.to("meta") for x in streams()))
    assert losses[0].is_meta


def test_two_stages_of_training(seed: int) -> None:
    """In twenty steps per stage with a new optimizer all parameters change and both losses fall."""
    prototypes = torch.randn(K, D)
    balanced, random = torch.randint(K, (200,)), torch.randint(K, (200,))
    data = [
        prototypes[balanced] + torch.randn(200, D),
        balanced,
        prototypes[random] + torch.randn(200, D),
        random,
    ]
    head = GistClassifier(D, K, 0)
    for stage in (1, 2):
        if stage == 2:
            head.add_displacements()
        before = {name: p.detach().clone() for name, p in head.named_parameters()}
        first = head.losses(*data)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9, weight_decay=5e-4)
        for _ in range(20):
            losses = head.losses(*data)
            optimizer.zero_grad()
            (losses[1] + 0.5 * losses[0]).backward()
            optimizer.step()
        for name, parameter in head.named_parameters():
            assert not torch.equal(parameter, before[name]) or not parameter.numel(), name
        assert losses[0] < first[0]
        assert losses[1] < first[1]


class Trained(nn.Module):
    """A backbone and the head. `forward` returns the losses, because DDP synchronizes calls to `forward` alone."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(D, D), make(GistClassifier, m)

    def forward(self, xb: Tensor, yb: Tensor, xr: Tensor, yr: Tensor) -> tuple[Tensor, Tensor]:
        losses: tuple[Tensor, Tensor] = self.head.losses(self.backbone(xb), yb, self.backbone(xr), yr)
        return losses


def each_half(rank: int, m: int, seed: int) -> None:
    """Train on half of each batch. Three steps, because DDP raises in the second if a parameter is unused."""
    torch.manual_seed(seed)
    model = Trained(m)
    alone, wrapped = copy.deepcopy(model), nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        arguments = [
            t[: len(t) // 2 * 2] for t in streams()
        ]  # equal halves, because DDP averages the gradients
        own = [t.tensor_split(2)[rank] for t in arguments]
        for module, data in ((alone, arguments), (wrapped, own)):
            balanced, random = module(*data)
            (random + 0.5 * balanced).backward()
    for (name, expected), parameter in zip(alone.named_parameters(), model.parameters(), strict=True):
        if expected.requires_grad:
            assert expected.grad is not None
            torch.testing.assert_close(
                parameter.grad,
                expected.grad,
                atol=1e-6,
                rtol=1e-4,
                msg=lambda said, name=name: f"{name}: {said}",
            )


@pytest.mark.cpu
@pytest.mark.parametrize("m", [0, M])
def test_distributed_data_parallel(m: int, seed: int, tmp_path: Path) -> None:
    """The gradients of two processes are those of one process with both halves."""
    in_group(each_half, 2, tmp_path, m, seed)
