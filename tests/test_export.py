"""Tests of torch.export and ONNX: the exported programs are run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import gistops.export
from gistops.nn import ConstellationClassifier, GistClassifier, MaxCosineHead, SubcenterClassifier

HEADS = {
    "constellation": lambda: ConstellationClassifier(24, 53),
    "no displacements": lambda: ConstellationClassifier(24, 53, 0),
    "frozen": lambda: ConstellationClassifier(24, 53).freeze(),
    "rotation": lambda: ConstellationClassifier(24, 53, transform="rotation"),
    "mlp": lambda: ConstellationClassifier(24, 53, transform="mlp"),
    "subcenters": lambda: SubcenterClassifier(24, 53),
    "frozen subcenters": lambda: SubcenterClassifier(24, 53).freeze(),
    "two heads": lambda: GistClassifier(24, 53).export("both", torch.randn(53)),
    "frozen two heads": lambda: GistClassifier(24, 53).export("both", torch.randn(53)).freeze(),
}


def program(head: MaxCosineHead) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(head.eval(), (torch.randn(7, 24),), dynamic_shapes=shapes)


@pytest.mark.parametrize("name", HEADS)
def test_decompositions_remove_all_ops_of_gistops(name: str, seed: int) -> None:
    head = HEADS[name]()
    exported = program(head)
    assert "gistops" in str(exported.graph)
    plain = exported.run_decompositions(gistops.export.decompositions())
    assert "gistops" not in str(plain.graph)
    for batch in (1, 30):
        x = torch.randn(batch, 24)
        assert torch.equal(exported.module()(x), head(x))
        torch.testing.assert_close(plain.module()(x), head(x), atol=1e-5, rtol=1e-5)


class TopClasses(torch.nn.Module):
    """The three best classes of a head, with their slots, in float64: no two are equal up to rounding."""

    def __init__(self, head: MaxCosineHead) -> None:
        super().__init__()
        self.head = head.double()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.head.predict_topk(x.double(), 3)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("wrap", [lambda head: head, TopClasses], ids=["logits", "top classes"])
def test_a_plain_onnx_export_has_the_results_of_the_head(
    name: str, wrap: Any, seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    caplog.set_level(logging.ERROR)
    model = wrap(HEADS[name]()).eval()
    path = tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(model, (torch.randn(7, 24),), path, dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 30):
        x = torch.randn(batch, 24)
        expected = model(x)
        values = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for value, truth in zip(values, expected if isinstance(expected, tuple) else [expected], strict=True):
            torch.testing.assert_close(torch.from_numpy(value), truth.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_decomposed_top_classes(name: str, seed: int) -> None:
    model = TopClasses(HEADS[name]()).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (torch.randn(7, 24),), dynamic_shapes=shapes)
    plain = exported.run_decompositions(gistops.export.decompositions())
    assert "gistops" not in str(plain.graph)
    x = torch.randn(30, 24)
    for value, truth in zip(plain.module()(x), model(x), strict=True):
        torch.testing.assert_close(value, truth, atol=1e-5, rtol=1e-5)


def test_onnx_runtime_has_the_logits_of_a_decomposed_head(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    caplog.set_level(logging.ERROR)
    head = HEADS["constellation"]()
    plain = program(head).run_decompositions(gistops.export.decompositions())
    path = tmp_path / "head.onnx"
    torch.onnx.export(plain, f=path, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (7, 1, 30):
        x = torch.randn(batch, 24)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), head(x).detach(), atol=1e-5, rtol=1e-5)
