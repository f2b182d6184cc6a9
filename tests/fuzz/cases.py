"""Strategies that draw cases: sizes, dtypes, layouts, scales, special values, and the options of the losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")
#: Special values in the tensors. A case holds at most two.
SPECIALS = (
    "zero input",
    "zero center",
    "zero displacement",
    "equal displacements",
    "equal centers",
    "opposite",  # w_0 + δ_0 = 0
    "nearly opposite",  # |w_0 + δ_0| = 1e-6 |w_0| before rounding
    "aligned",  # an input that points along w_0 + δ_0
    "nan input",
    "inf input",
    "nan center",
    "inf center",
    "nan displacement",
)


@dataclass(frozen=True)
class Case:
    """The arguments of `constellation_logits` or `subcenter_logits`. Its repr reproduces it."""

    classifier: str  # "translation", "rotation", "mlp" or "subcenters"
    B: int
    K: int
    d: int
    m: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # of input, centers, displacements
    layouts: tuple[str, str, str]
    scales: tuple[float, float, float]
    tau: float
    tau_form: str  # "number", "scalar" or "vector"
    specials: tuple[str, ...]
    frozen: tuple[bool, bool, bool]  # the tensors that need no gradient
    seed: int

    def tensors(self) -> dict[str, Tensor]:
        """Return input, centers, displacements, tau, and what the transform takes, by name."""
        source = torch.Generator().manual_seed(self.seed)
        shapes = ((self.B, self.d), (self.K, self.d), (self.m, self.d))
        if self.classifier == "subcenters":
            shapes = ((self.B, self.d), (self.K, self.m + 1, self.d), (0, self.d))
        values = [
            torch.randn(*shape, generator=source, dtype=torch.float64) * scale
            for shape, scale in zip(shapes, self.scales, strict=True)
        ]
        values = [v.to(dtype) for v, dtype in zip(values, self.dtypes, strict=True)]
        for special in self.specials:
            _insert(special, *values)
        values = [_laid_out(v, layout) for v, layout in zip(values, self.layouts, strict=True)]
        tensors = dict(zip(("input", "centers", "displacements"), values, strict=True))
        tensors["tau"] = torch.full((1,) if self.tau_form == "vector" else (), self.tau)
        if self.classifier == "rotation":
            tensors["axis"] = torch.randn(self.d, generator=source)
        if self.classifier == "mlp":
            hidden = 1 + self.seed % 9
            tensors["mlp0"] = torch.randn(hidden, 2 * self.d, generator=source) / self.d
            tensors["mlp1"] = torch.randn(self.d, hidden, generator=source) * self.scales[1] / hidden
        for name, frozen in zip(("input", "centers", "displacements"), self.frozen, strict=True):
            tensors[name].requires_grad_(not frozen)
        for name in tensors.keys() - {"input", "centers", "displacements"}:
            tensors[name].requires_grad_(name != "tau" or self.tau_form != "number")
        return tensors


def _insert(special: str, input: Tensor, centers: Tensor, displacements: Tensor) -> None:
    """Write special values into the tensors that have room for them."""
    first_word, _, name = special.partition(" ")
    vectors = {"input": input, "center": centers, "displacement": displacements}
    if name in vectors:
        if vectors[name].shape[0]:
            value = {"zero": 0.0, "nan": float("nan"), "inf": float("inf")}[first_word]
            flat = vectors[name][0].reshape(-1, vectors[name].shape[-1])[0]
            flat[: None if first_word == "zero" else 1] = value
    elif special == "equal centers":
        centers[-1:] = centers[:1]
    elif special == "equal displacements":
        displacements[-1:] = displacements[:1]
    elif centers.shape[0] and displacements.shape[0]:
        if special == "opposite":
            centers[0] = -displacements[0]
        elif special == "nearly opposite":
            centers[0] = -displacements[0].double() * (1 + 1e-6)
        elif input.shape[0]:
            total = centers[0].double() + displacements[0].double()
            input[0] = total / total.norm() * input[0].double().norm()


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """Return the values, or their first row repeated, in another memory layout."""
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([values, values], dim=-1)[..., 0]
    if layout == "expanded" and values.shape[0]:
        return values[:1].expand(values.shape)
    return values


def _sizes(low: int, high: int) -> st.SearchStrategy[int]:
    """Return sizes of which half are small."""
    return st.integers(low, min(8, high)) | st.integers(low, high)


_scales = st.sampled_from((1.0, 1.0, 1e-3, 1e3))
_dtype_triples = st.sampled_from([(dtype,) * 3 for dtype in DTYPES]) | st.tuples(
    *[st.sampled_from(DTYPES)] * 3
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a case."""
    classifier = draw(st.sampled_from(("translation", "translation", "subcenters", "rotation", "mlp")))
    many_slots = classifier in ("translation", "subcenters")
    return Case(
        classifier,
        B=draw(_sizes(0, 130)),
        K=draw(_sizes(0, 130)),
        d=draw(_sizes(1, 130)),
        m=draw(st.sampled_from((0, 1, 2, 3, 4)) | _sizes(0, 255 if many_slots else 12)),
        dtypes=draw(_dtype_triples),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        scales=draw(st.tuples(*[_scales] * 3)),
        tau=draw(st.sampled_from((1.0, 16.0, 64.0)) | st.floats(0.0625, 64, width=32)),
        tau_form=draw(st.sampled_from(("number", "scalar", "vector"))),
        specials=tuple(draw(st.lists(st.sampled_from(SPECIALS), max_size=2))),
        frozen=draw(st.sampled_from([(False,) * 3]) | st.tuples(*[st.booleans()] * 3)),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


@dataclass(frozen=True)
class LossCase:
    """The options of `constellation_cross_entropy`."""

    bias: str  # "none", the name of a dtype, or the value of the bias of the first target's class
    weight: bool
    margin: str  # "none", "number", "scalar" or "vector"
    margin_kind: str
    margin_size: float
    reduction: str
    ignored: float  # fraction of the rows
    ignore_index: int
    label_smoothing: float
    target_dtype: torch.dtype
    seed: int

    def tensors(self, B: int, K: int) -> dict[str, Tensor]:
        """Return target, class_bias, weight and a margin tensor, by name; those that the options leave out are absent."""
        source = torch.Generator().manual_seed(self.seed)
        target = torch.randint(0, K, (B,), generator=source)
        tensors = {}
        if self.bias != "none":
            bias = torch.randn(K, generator=source)
            if self.bias in ("float64", "bfloat16", "float16"):
                bias = bias.to(getattr(torch, self.bias))
            elif self.bias != "float32" and B:
                bias[target[0]] = float(self.bias)
            tensors["class_bias"] = bias.requires_grad_()
        if self.weight:
            weight = torch.rand(K, generator=source)
            weight[torch.rand(K, generator=source) < 0.1] = 0
            tensors["weight"] = weight
        if self.margin in ("scalar", "vector"):
            margin = torch.rand((K,) if self.margin == "vector" else (), generator=source) * self.margin_size
            tensors["margin"] = margin.requires_grad_()
        target[torch.rand(B, generator=source) < self.ignored] = self.ignore_index
        tensors["target"] = target.to(self.target_dtype)
        return tensors


@st.composite
def loss_cases(draw: st.DrawFn) -> LossCase:
    """Draw the options of a loss."""
    smoothing = draw(st.sampled_from((0.0, 0.0, 0.1, 1.0)))
    extreme_biases = ("-1e9", "-inf", "1e9") if smoothing == 0 else ("-1e9", "1e9")
    return LossCase(
        bias=draw(st.sampled_from(("none", "float32", "float64", "bfloat16", "float16", *extreme_biases))),
        weight=draw(st.booleans()),
        margin=draw(st.sampled_from(("none", "none", "number", "scalar", "vector"))),
        margin_kind=draw(st.sampled_from(("logit", "cosine", "angle"))),
        margin_size=draw(st.sampled_from((0.0, 0.3, 1.5))),
        reduction=draw(st.sampled_from(("mean", "sum", "none"))),
        ignored=draw(st.sampled_from((0.0, 0.3, 1.0))),
        ignore_index=draw(st.sampled_from((-100, -1, 0, 1000))),
        label_smoothing=smoothing,
        target_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )
