"""Mistakes with a sharded head: each is an error in all processes, names its argument, and leaves the processes in step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import gistops
from gistops.distributed import shard_classes
from gistops.nn import ConstellationClassifier, GistClassifier, SubcenterClassifier

from ..processes import in_group

K, D, B = 11, 8, 5
SIZE = 3


class Mistakes:
    """Calls of which some have mistakes, in one of several processes."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.last = rank == SIZE - 1  # the process with the mistake
        self.mesh = init_device_mesh("cpu", (SIZE,))
        self.other_mesh = init_device_mesh("cpu", (SIZE,), mesh_dim_names=("other",))
        torch.manual_seed(3)
        self.head = shard_classes(ConstellationClassifier(D, K, 2, displacement_scale=1.0), self.mesh)
        self.x, self.y = torch.randn(B, D), torch.randint(K, (B,))
        self.vector = torch.rand(K)

    def expect(self, kind: type[Exception], match: str, call: Callable[[], object]) -> None:
        """Check that a call raises in all processes, and that the next call finds them in step.

        kind: of the error in the last process; the others may have a RuntimeError that quotes it.
        """
        match_here = (
            match
            if self.last
            else rf"({match})|rank {SIZE - 1} of the sharded classifier raised {kind.__name__}: {match}"
        )
        with pytest.raises(kind if self.last else (kind, RuntimeError), match=match_here):
            call()
        assert self.head.loss(self.x, self.y).isfinite()

    def check(self) -> None:
        for name in ("options", "inputs", "calls", "placements", "streams", "heads", "fsdp"):
            getattr(self, name)()

    def options(self) -> None:
        """Other options in one process."""
        first = {"return_lse": False, "reduction": "mean", "label_smoothing": 0.0, "ignore_index": -100}
        first |= {"margin": 0.1, "margin_kind": "logit", "class_bias": None, "weight": None, "backend": "cpu"}
        second = {"return_lse": True, "reduction": "sum", "label_smoothing": 0.1, "ignore_index": 3}
        second |= {"margin": 0.2, "margin_kind": "angle", "class_bias": self.vector, "weight": self.vector}
        second |= {"backend": "reference"}
        for name, value in second.items():
            options = {"margin": 0.1} if name == "margin_kind" else {}
            options |= {name: value if self.last else first[name]}
            self.expect(
                ValueError,
                f"{name}: expected the same on all ranks of the sharded classifier, got .* on rank 0 and .* on rank {SIZE - 1}",
                lambda options=options: self.functional_loss(**options),  # type: ignore[misc]
            )
        self.expect(
            ValueError,
            "reduction: expected one of",
            lambda: self.loss(reduction="max" if self.last else "mean"),
        )
        self.expect(
            ValueError,
            r"sample_negatives: expected the same",
            lambda: self.loss(sample_negatives=0.5 if self.last else None),
        )

    def loss(self, **options: Any) -> object:
        return self.head.loss(self.x, self.y, **options)

    def functional_loss(self, **tensors: Any) -> object:
        centers, displacements, tau = self.head._classifier()[:3]
        tensors = {"centers": centers, "displacements": displacements, "tau": tau} | tensors
        return gistops.constellation_cross_entropy(self.x, target=self.y, **tensors)

    def inputs(self) -> None:
        """Features and targets of another kind in one process."""
        x, y = self.x, self.y.clone()
        wide = x.double() if self.last else x
        self.expect(ValueError, "input's dtype: expected the same", lambda: self.head.loss(wide, self.y))
        meta = x.to("meta") if self.last else x
        self.expect(
            ValueError,
            "input: expected device type cpu, that of the mesh, got meta",
            lambda: self.head.loss(meta, self.y),
        )
        narrow = x[:, 1:] if self.last else x
        self.expect(ValueError, "centers: expected shape", lambda: self.head.loss(narrow, self.y))
        nothing: Any = None if self.last else x
        self.expect(TypeError, r"input: expected a torch\.Tensor", lambda: self.head.loss(nothing, self.y))
        y[2] = K if self.last else 0
        self.expect(
            IndexError,
            f"target: expected 0 to {K - 1} .*, got {K} at position 2",
            lambda: self.head.loss(x, y),
        )
        short = y[1:] if self.last else y
        self.expect(ValueError, r"target: expected shape \[5\]", lambda: self.head.loss(x, short))
        kind = y.float() if self.last else self.y
        self.expect(TypeError, "target: expected int64 or int32", lambda: self.head.loss(x, kind))
        rows = distribute_tensor(x, self.mesh, [Replicate()])
        self.expect(
            ValueError,
            "placement of input: expected the same",
            lambda: self.head.loss(rows if self.last else x, self.y),
        )
        rows = DTensor.from_local(x[: B - 1] if self.last else x, self.mesh, [Replicate()], run_check=False)
        local = self.y[: B - 1] if self.last else self.y
        self.expect(
            ValueError,
            f"number of rows: expected the same .* got {B} .* and {B - 1}",
            lambda: self.head.loss(rows, local),
        )

    def calls(self) -> None:
        """Another call, another k, or another state of autograd in one process."""
        self.expect(
            ValueError,
            "call: expected the same .*, got cross-entropy on rank 0 and top-k on rank 2",
            lambda: self.head.predict(self.x) if self.last else self.loss(),
        )
        self.expect(
            ValueError, "k: expected the same", lambda: self.head.predict_topk(self.x, 3 if self.last else 2)
        )
        self.expect(
            ValueError,
            "k: expected .* 1 to 11",
            lambda: self.head.predict_topk(self.x, 12 if self.last else 2),
        )
        bias = self.vector[1:] if self.last else self.vector
        self.expect(
            ValueError,
            r"class_bias: expected shape \[11\]",
            lambda: self.head.predict_topk(self.x, 1, class_bias=bias),
        )
        x, labels = self.x[:4].reshape(2, 2, D), self.y[:4].reshape(2, 2).clone()
        labels[1, 0] = K if self.last else 0
        words = "labels: expected 0 to 10, got 11 at position 1, 0"
        self.expect(IndexError, words, lambda: self.head.slot_usage(x, labels))
        for last in (True, False):
            with (
                torch.set_grad_enabled(self.last != last),
                pytest.raises(ValueError, match="gradients: expected"),
            ):
                self.loss()

    def placements(self) -> None:
        """Vectors and parameters with other placements or meshes, in all processes."""
        same, parts = ([distribute_tensor(self.vector, self.mesh, [p])] for p in (Replicate(), Shard(0)))
        elsewhere = distribute_tensor(self.vector, self.other_mesh, [Shard(0)])
        for name in ("class_bias", "weight", "margin"):
            self.expect(
                TypeError,
                rf"{name}: expected a DTensor with placement Shard\(dim=0\), got .*Replicate",
                lambda n=name: self.loss(**{n: same[0]}),
            )  # type: ignore[misc]
            self.expect(
                ValueError,
                f"{name}: expected the mesh of the centers",
                lambda n=name: self.loss(**{n: elsewhere}),
            )  # type: ignore[misc]
        assert self.head.loss(self.x, self.y, class_bias=parts[0]).isfinite()
        learned = self.vector.clone().requires_grad_()
        for name in ("class_bias", "margin"):
            self.expect(
                ValueError,
                rf"{name}: expected a DTensor like the centers where it needs a gradient",
                lambda n=name: self.loss(**{n: learned}),
            )  # type: ignore[misc]
        rows = distribute_tensor(self.x, self.other_mesh, [Replicate()])
        self.expect(
            ValueError, "input: expected the mesh of the centers", lambda: self.head.loss(rows, self.y)
        )
        divided = distribute_tensor(torch.zeros(SIZE, D), self.mesh, [Shard(0)])

        self.expect(
            TypeError,
            r"displacements: expected a DTensor with placement Replicate",
            lambda: self.functional_loss(displacements=divided),
        )
        elsewhere = distribute_tensor(torch.zeros(2, D), self.other_mesh, [Replicate()])
        self.expect(
            ValueError,
            "displacements: expected the mesh of the centers",
            lambda: self.functional_loss(displacements=elsewhere),
        )
        whole = distribute_tensor(torch.zeros(K, D), self.mesh, [Replicate()])
        self.expect(
            TypeError,
            r"centers: expected a DTensor with placement Shard\(0\).*shard_classes",
            lambda: self.functional_loss(centers=whole),
        )
        plane = init_device_mesh("cpu", (SIZE, 1))
        grid = distribute_tensor(torch.zeros(K, D), plane, [Shard(0), Replicate()])
        self.expect(
            TypeError,
            r"centers: expected .* one dimension, .* mesh of shape \(3, 1\)",
            lambda: self.functional_loss(centers=grid),
        )
        uneven = DTensor.from_local(
            torch.zeros(4 - self.last * 3, D),
            self.mesh,
            [Shard(0)],
            shape=torch.Size([K, D]),
            stride=(D, 1),
            run_check=False,
        )
        self.expect(
            ValueError,
            "centers: expected 3 classes on rank 2 of 3, as torch.chunk divides 11, got 1",
            lambda: self.functional_loss(centers=uneven),
        )

    def streams(self) -> None:
        """Mistakes in `GistClassifier.losses`."""
        head = shard_classes(GistClassifier(D, K, 2, displacement_scale=1.0), self.mesh)
        x, y = self.x, self.y
        outside = y + K if self.last else y
        self.expect(IndexError, "target: expected 0 to 10", lambda: head.losses(x, outside, x, y))
        short = y[1:] if self.last else y
        self.expect(
            ValueError, r"target: expected shape \[5\], got \[4\]", lambda: head.losses(x, short, x, y)
        )
        self.expect(
            ValueError, r"target: expected shape \[5\], got \[4\]", lambda: head.losses(x, y, x, short)
        )
        kind = y.double() if self.last else y
        self.expect(
            TypeError,
            "target: expected int64 or int32 classes, got torch.float64",
            lambda: head.losses(x, y, x, kind),
        )
        shares = torch.rand(B, K).softmax(1) if self.last else y
        self.expect(
            TypeError,
            "target: expected int64 or int32 .* probabilities",
            lambda: head.losses(x, y, x, shares),
        )
        bias = self.vector[1:] if self.last else self.vector
        self.expect(
            ValueError,
            r"class_bias: expected shape \[11\]",
            lambda: head.losses(x, y, x, y, balanced_bias=bias),
        )

    def heads(self) -> None:
        """Heads that cannot be sharded together, and heads that differ once they are."""
        last = self.last

        def shard(head: Any, mesh: Any = self.mesh) -> object:
            return shard_classes(head, mesh)

        self.expect(
            ValueError,
            "num_classes: expected the same .*, got 11 on rank 0 and 12",
            lambda: shard(ConstellationClassifier(D, K + last, 2)),
        )
        self.expect(
            ValueError,
            "displacements: expected the same",
            lambda: shard(ConstellationClassifier(D, K, 2 + last)),
        )
        self.expect(
            ValueError,
            "head: expected the same",
            lambda: shard(SubcenterClassifier(D, K) if last else ConstellationClassifier(D, K, 2)),
        )
        dtype = torch.float64 if last else torch.float32
        self.expect(
            ValueError,
            "centers: expected the same .*float32.* and .*float64",
            lambda: shard(ConstellationClassifier(D, K, 2, dtype=dtype)),
        )
        device = "meta" if last else "cpu"
        self.expect(
            ValueError,
            "meta device: expected the same",
            lambda: shard(ConstellationClassifier(D, K, 2, device=device)),
        )
        self.expect(
            ValueError,
            r"mesh: expected one dimension, got shape \(3, 1\)",
            lambda: shard(ConstellationClassifier(D, K, 2), init_device_mesh("cpu", (SIZE, 1))),
        )
        wrong: Any = nn.Linear(D, K)
        self.expect(TypeError, "head: expected a head of gistops.nn, got Linear", lambda: shard(wrong))
        grown = shard_classes(ConstellationClassifier(D, K, 0), self.mesh)
        grown.add_displacements(2)
        if last:
            grown.displacements = nn.Parameter(
                distribute_tensor(torch.zeros(3, D), self.mesh, [Replicate()], src_data_rank=None)
            )
        self.expect(ValueError, "displacements: expected the same", lambda: grown.loss(self.x, self.y))

    def fsdp(self) -> None:
        """A method of a module under FSDP2 that is not its forward: the error says how to register it."""
        advice = "register_fsdp_forward_method"
        for head in (
            ConstellationClassifier(D, K, 2),
            ConstellationClassifier(D, K, 0),
            SubcenterClassifier(D, K),
        ):
            fully_shard(head, mesh=self.mesh)
            for call in (lambda h=head: h.loss(self.x, self.y), lambda h=head: h.predict(self.x)):
                self.expect(TypeError, advice, call)


def check_mistakes(rank: int) -> None:
    Mistakes(rank).check()


def test_mistakes(tmp_path: Path) -> None:
    in_group(check_mistakes, SIZE, tmp_path)
