"""The table of all variants that `bench.gpu` can run. A new idea is a new row.

A row whose code, library or setting is missing is absent, with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from gistops import backends

from ..baselines import why_no_torch_linear_cross_entropy
from . import settings

#: The timed calls: the logits without gradients; logits, F.cross_entropy and backward; the variant's loss and backward; the
#: BEST classes of each row.
KINDS = ("forward", "step", "loss", "topk")
WITHOUT_TOPK = KINDS[:3]
BEST = 10
PRECISIONS = ("bf16", "float32", "tf32")
#: Family -> rank. Among variants of about the same time the selection rule prefers the lowest rank. "cublas": all matmuls
#: are torch's.
SIMPLICITY = {"cublas": 0, "triton": 1, "cuda": 2, "cpu": 3}

#: The variant whose logits stay in bf16.
NARROW = "linear, loss in bf16"


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    name: str
    family: str  # one of SIMPLICITY: ours; "torch" for plain PyTorch, "peer" for other libraries
    kinds: tuple[str, ...] = WITHOUT_TOPK
    backend: str = ""  # the backend of gistops; empty for other code
    settings: dict[str, Any] = field(default_factory=dict)  # see settings.py
    cosine: bool = False  # has no displacements: m = 0, or a linear layer
    vectors: str = ""  # instead of centers moved by displacements: "rotation" or "subcenters", see calls.py
    narrow: bool = False  # the logits are in the dtype of the input, and so is the loss of a step
    slots: bool = False  # the forward returns the slots
    compiled: bool = False  # by torch.compile, which takes seconds per size
    precisions: tuple[str, ...] = PRECISIONS
    sizes: int | None = None  # number of the first sizes at which it runs; None for all

    @property
    def ours(self) -> bool:
        """Return True for variants of gistops."""
        return bool(self.backend)


def _tiles(matmul: str, kind: str, *tiles: tuple[int, int, int, int, int]) -> list[Variant]:
    """Return variants with forced tiles: classes, rows, dims in bf16, warps, stages."""
    return [
        Variant(
            f"triton {matmul} {'x'.join(map(str, tile[:3]))} w{tile[3]} s{tile[4]}",
            "triton",
            (kind,),
            "triton",
            {f"{'forward' if kind == 'forward' else 'centers'} tile": tile},
            precisions=("bf16", "tf32"),
        )
        for tile in tiles
    ]


VARIANTS = (
    # The baseline: F.linear and F.cross_entropy of float32 logits, as under autocast, or topk; then of bf16 logits.
    Variant("linear", "torch", KINDS, cosine=True),
    Variant(NARROW, "torch", ("step", "loss"), cosine=True, narrow=True, precisions=("bf16",)),
    Variant("cuda", "cuda", KINDS, "cuda"),
    Variant("triton", "triton", KINDS, "triton"),
    Variant("cpu", "cpu", KINDS, "cpu"),  # for trials of the bench
    # Logits like those of F.linear in bf16; their step compares with "linear, loss in bf16". Slots, which a forward
    # without gradients does not write unless they are returned.
    *(
        Variant(f"{name}, bf16 logits", name, ("forward", "step"), name, narrow=True, precisions=("bf16",))
        for name in ("cuda", "triton", "cpu")
    ),
    *(Variant(f"{name}, slots", name, ("forward",), name, slots=True) for name in ("cuda", "triton", "cpu")),
    # The matmul: torch's between kernels of gistops, or one fused kernel.
    Variant("triton F cublas", "cublas", ("forward",), "triton", {"product": "cublas"}),
    Variant("triton F fused", "triton", ("forward",), "triton", {"product": "fused"}),
    Variant("triton dW cublas", "cublas", ("step", "loss"), "triton", {"centers product": "cublas"}),
    Variant("triton dW fused", "triton", ("step", "loss"), "triton", {"centers product": "fused"}),
    *_tiles(
        "F",
        "forward",
        (64, 128, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 4),
    ),
    *_tiles(
        "dW",
        "step",
        (64, 64, 128, 8, 3),
        (64, 64, 128, 4, 3),
        (64, 64, 64, 8, 3),
        (64, 64, 64, 4, 3),
        (64, 128, 128, 4, 2),
        (128, 64, 128, 8, 3),
        (128, 128, 128, 8, 2),
    ),
    # H of 0 (the tiled kernel), 64 or 128 classes stays in shared memory. The scores of a loss are parked where they fit,
    # except with "tiled".
    *(
        Variant(
            f"cuda dW {name}",
            "cuda",
            ("step", "loss"),
            "cuda",
            {"cuda centers tile": classes},
            precisions=("bf16",),
        )
        for name, classes in (("tiled", 0), ("64", 64), ("128", 128))
    ),
    # The logits of one kernel; without slots, as bf16 and with slots.
    *(
        Variant(
            f"cuda F fused{results}",
            "cuda",
            ("forward",) if results == ", slots" else ("forward", "step"),
            "cuda",
            {"cuda fused logits": 1},
            narrow=results == ", bf16 logits",
            slots=results == ", slots",
            precisions=("bf16",),
        )
        for results in ("", ", bf16 logits", ", slots")
    ),
    # The kernels around the matmuls.
    *(
        Variant(
            f"triton dW cublas {'x'.join(map(str, tile))}",
            "cublas",
            ("step", "loss"),
            "triton",
            {"centers tile": tile, "centers product": "cublas"},
            precisions=("bf16",),
        )
        for tile in ((64, 64, 128, 8, 3), (32, 32, 64, 4, 2))
    ),
    Variant(
        "triton dW cublas whole",
        "cublas",
        ("step", "loss"),
        "triton",
        {"centers product": "cublas", "dW step": 1 << 40},
    ),
    Variant("triton norms loop", "triton", ("forward", "loss"), "triton", {"norms": (0, 1)}),
    Variant("triton norms 2048 w1", "triton", ("forward", "loss"), "triton", {"norms": (2048, 1)}),
    Variant("triton norms 8192 w4", "triton", ("forward", "loss"), "triton", {"norms": (8192, 4)}),
    Variant("triton logits 64x32 w4", "triton", ("forward",), "triton", {"pool logits": (64, 32, 4)}),
    Variant("triton logits 128x64 w8", "triton", ("forward",), "triton", {"pool logits": (128, 64, 8)}),
    Variant("triton pool 32x64 w8", "triton", ("loss",), "triton", {"pool": (32, 64, 8)}),
    Variant("triton pool 16x64 w4 1056", "triton", ("loss",), "triton", {"loss programs": 1056}),
    Variant(
        "triton pool 16x128 w8 1056",
        "triton",
        ("loss",),
        "triton",
        {"pool": (16, 128, 8), "loss programs": 1056},
    ),
    Variant("triton few 0", "triton", backend="triton", settings={"triton few": 0}),
    Variant(
        "triton softmax 16x64 w8 few",
        "triton",
        ("loss",),
        "triton",
        {"softmax": (16, 64, 8), "softmax few": True},
    ),
    Variant(
        "triton softmax loop", "triton", ("loss",), "triton", {"softmax": (16, 64, 4), "softmax few": False}
    ),
    Variant(
        "triton softmax 32x32 w8 few",
        "triton",
        ("loss",),
        "triton",
        {"softmax": (32, 32, 8), "softmax few": True},
    ),
    Variant("triton softmax 64x64 w8", "triton", ("loss",), "triton", {"softmax": (64, 64, 8)}),
    Variant("triton route 64x32 w4", "triton", ("step",), "triton", {"route": (64, 32, 4)}),
    Variant("triton route 16x128 w8", "triton", ("step",), "triton", {"route": (16, 128, 8)}),
    # Where the scores of a loss are from the forward to the backward: in memory of their own, or nowhere. By default they
    # are kept, or parked in the gradient of the centers with many classes; "cuda dW 128" parks them wherever they fit.
    *(
        Variant(f"{name} loss {mode}", name, ("loss",), name, {"parked": False, "held bytes": most})
        for name in ("cuda", "triton")
        for mode, most in (("kept", 1 << 40), ("recomputed", 0))
    ),
    Variant(
        "triton loss chunk 2^22", "triton", ("loss",), "triton", {"held bytes": 0, "triton chunk": 1 << 22}
    ),
    # At m = 0 gistops is a cosine classifier. Other libraries have the losses of linear layers and cosine classifiers.
    Variant("cuda, m=0", "cuda", backend="cuda", cosine=True),
    Variant("triton, m=0", "triton", backend="triton", cosine=True),
    # The losses of other vectors. Half as many classes have two sub-centers each, so that the products are as large.
    *(
        Variant(f"{name}, {vectors}", name, ("loss",), name, cosine=vectors == "subcenters", vectors=vectors)
        for name in ("cuda", "triton", "cpu")
        for vectors in ("rotation", "subcenters")
    ),
    *(
        Variant(f"{name}{head}", "peer", ("loss",), cosine=True)
        for name in ("torch linear_cross_entropy", "CCE", "Liger")
        for head in ("", ", cosine")
    ),
    Variant("direct", "torch", ("forward", "step")),
    Variant("split compiled", "torch", ("forward", "step"), compiled=True, sizes=2),
    Variant("direct compiled", "torch", ("forward", "step"), compiled=True, sizes=2),
)
TABLE = {variant.name: variant for variant in VARIANTS}
#: The candidates of the selection rule: gistops with displacements, with the results that every backend returns by default.
CANDIDATES = tuple(v for v in VARIANTS if v.ours and not (v.cosine or v.vectors or v.narrow or v.slots))


def chosen(patterns: Sequence[str] | None) -> list[str]:
    """Return the names that match a list of patterns, in the table's order. `linear` is always included.

    Args:
        patterns: shell patterns such as `triton*`; None for all variants.

    Raises:
        ValueError: a pattern matches no variant.
    """
    if patterns is None:
        return list(TABLE)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in TABLE):
            raise ValueError(f"no variant is named {pattern!r}; there are {', '.join(TABLE)}")
    return [n for n in TABLE if n == "linear" or any(fnmatchcase(n, pattern) for pattern in patterns)]


def why_not(name: str, device: str) -> str | None:
    """Return the reason why a variant cannot run on a device, or None."""
    variant = TABLE[name]
    if variant.ours:
        if (variant.backend == "cpu") != (device == "cpu") and variant.backend != "triton":
            return f"backend {variant.backend!r} serves no tensors on {device!r}"
        return backends.why_not(variant.backend, device) or settings.why_not(variant.settings)
    if name.startswith("torch linear_cross_entropy"):
        return why_no_torch_linear_cross_entropy()
    for start, module in (("CCE", "cut_cross_entropy"), ("Liger", "liger_kernel")):
        if name.startswith(start) and importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None
