"""The logits and the rest of PyTorch: opcheck, gradcheck, compile, export, autocast, checkpointing."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gistops

from ..processes import in_group
from .oracle import IDS, SAMPLES, Sample, operators


@pytest.mark.parametrize("sample", SAMPLES, ids=IDS)
def test_opcheck(sample: Sample, fused: str, seed: int) -> None:
    tensors = sample.tensors(seed)
    forward, backward = operators(fused)
    torch.library.opcheck(forward, tuple(tensors))
    with torch.no_grad():
        saved = forward(*tensors)
        grad = torch.randn_like(saved[0])
    frozen = [t.detach() for t in tensors]
    for needs in ((True, True, True, True), (True, False, True, False), (False, True, False, True)):
        torch.library.opcheck(backward, (grad, *frozen, *saved, *needs))


def test_gradcheck(backend: str, seed: int) -> None:
    f64 = torch.float64
    tensors = Sample(3, 5, 4, 2, f64, f64, f64).tensors(seed)
    tensors[3] = tensors[3].detach().double().requires_grad_()

    def logits(*t: Tensor) -> Tensor:
        return gistops.constellation_logits(*t, backend=backend)

    assert torch.autograd.gradcheck(logits, tensors)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(logits, tensors)


class Head(nn.Module):
    def __init__(self, sample: Sample, seed: int, backend: str) -> None:
        super().__init__()
        _, *parameters = sample.tensors(seed, requires_grad=False)
        self.centers, self.displacements, self.tau = (nn.Parameter(p) for p in parameters)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return gistops.constellation_logits(
            x, self.centers, self.displacements, self.tau, backend=self.backend
        )


HEAD = Sample(37, 67, 20, 4)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(compiler: str, dynamic: bool, fused: str, seed: int) -> None:
    if compiler == "inductor" and dynamic:
        pytest.skip("aot_eager shows the dynamic shapes; inductor adds seconds and no new path of ours")
    torch._dynamo.reset()
    head = Head(HEAD, seed, fused)
    compiled = torch.compile(head, fullgraph=True, backend=compiler, dynamic=dynamic)
    for rows in (37, 12):
        x = torch.randn(rows, 20, requires_grad=True)
        grad = torch.randn(rows, 67)
        leaves = [x, *head.parameters()]
        expected = [head(x), *torch.autograd.grad(head(x), leaves, grad)]
        value = [compiled(x), *torch.autograd.grad(compiled(x), leaves, grad)]
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_compile_of_the_default_backend(seed: int) -> None:
    """The choice of a backend, which reads the file system, is not part of the graph."""
    torch._dynamo.reset()
    x, w, delta, tau = HEAD.tensors(seed, requires_grad=False)
    function = torch.compile(gistops.constellation_logits, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(x, w, delta, tau), gistops.constellation_logits(x, w, delta, tau))


def test_export(backend: str, seed: int) -> None:
    head = Head(HEAD, seed, backend).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(head, (torch.randn(37, 20),), dynamic_shapes={"x": {0: batch}})
    fused = any("gistops" in str(node.target) for node in program.graph.nodes)
    assert fused == (backend != "reference")
    x = torch.randn(11, 20)
    torch.testing.assert_close(program.module()(x), head(x))


def test_meta_tensors(backend: str) -> None:
    arguments = [t.to("meta").requires_grad_() for t in Sample(6, 9, 5, 2).tensors(0, requires_grad=False)]
    logits, slots = gistops.constellation_logits(*arguments, return_slots=True, backend=backend)
    assert logits.is_meta
    assert (logits.shape, logits.dtype) == ((6, 9), torch.float32)
    assert (slots.shape, slots.dtype) == ((6, 9), torch.uint8)
    logits.sum().backward()
    assert all(a.grad is not None and a.grad.shape == a.shape for a in arguments)


def test_gradient_checkpointing(fused: str, seed: int) -> None:
    head, body = Head(HEAD, seed, fused), nn.Linear(20, 20)
    x = torch.randn(37, 20)
    grad = torch.randn(37, 67)
    gradients = []
    for wrapped in (False, True):
        head.zero_grad()
        body.zero_grad()

        def both(x: Tensor) -> Tensor:
            return head(body(x))

        logits = checkpoint(both, x, use_reentrant=False) if wrapped else both(x)
        logits.backward(grad)
        gradients.append([p.grad.clone() for p in (*head.parameters(), *body.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.cpu  # GPUs multiply in the autocast dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu(dtype: torch.dtype, backend: str, seed: int) -> None:
    """Autocast layers give low-precision features; parameters, sums and logits stay in float32.

    Centers and displacements are rounded for the products if the processor has units for the dtype.
    """
    head, body = Head(HEAD, seed, backend), nn.Linear(20, 20)
    x = torch.randn(37, 20)
    with torch.autocast("cpu", dtype=dtype):
        features = body(x)
        logits = head(features)
    assert features.dtype == dtype
    assert logits.dtype == torch.float32
    rounds = backend == "cpu" and torch.ops.gistops.cpu_multiplies(dtype)
    operands = (x.to(dtype if rounds else torch.float32) for x in (head.centers, head.displacements))
    expected = gistops.constellation_logits(features.float(), *operands, head.tau, backend=backend)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert {p.grad.dtype for p in head.parameters()} == {torch.float32}


def test_autocast_is_registered_for_both_devices(fused: str) -> None:
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("gistops::logits_forward", key)


def refuse_a_distributed_tensor(rank: int, seed: int) -> None:
    distributed = importlib.import_module("torch.distributed.tensor")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    x, w, delta, tau = (t.cpu() for t in HEAD.tensors(seed, requires_grad=False))
    sharded = distributed.distribute_tensor(w, mesh, [distributed.Shard(0)])
    with pytest.raises(
        TypeError, match=r"centers: expected a local torch.Tensor, got a DTensor; call .to_local"
    ):
        gistops.constellation_logits(x, sharded, delta, tau)


@pytest.mark.cpu
def test_distributed_tensors_are_refused_in_words(fused: str, seed: int, tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.tensor")
    in_group(refuse_a_distributed_tensor, 1, tmp_path, seed)
