"""The tables of the paper (Liu, Li, Kang, Hua, Vasconcelos, GistNet, ICCV 2021): their rows, and their figures.

A figure that is missing here is one whose text was not at hand. The figures are printed beside those of a run only if the
training data is that of the paper, as its number of samples per class shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import Config, MethodName
from ..methods import TITLES

#: Accuracy in %: overall, or overall and on many-, medium- and few-shot classes.
Figures = tuple[float, ...]

#: The paper's datasets by their training split: the number of classes, of samples, and of the largest and smallest class.
DATASETS = {
    (1_000, 115_846, 1_280, 5): "ImageNet-LT",
    (365, 62_500, 4_980, 5): "Places-LT",
    (8_142, 437_513, 1_000, 2): "iNaturalist 2018",
}

#: The paper's networks.
NETWORKS = {"ImageNet-LT": "ResNet-10", "Places-LT": "ResNet-152", "iNaturalist 2018": "ResNet-50"}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        method: the method; None for a row of the paper whose variants are the rows below it.
        figures: the paper's figures by dataset.
        options: options that the row sets, beside the method.
        title: the row's title; that of the method if empty.
    """

    method: MethodName | None
    figures: Mapping[str, Figures] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""

    def shown_title(self) -> str:
        """Return the row's title, or that of its method."""
        return self.title or TITLES[str(self.method)]

    def variant(self, base: Config) -> dict[str, Any]:
        """Return the options that the row sets and whose values differ from those of `base`."""
        values = base.options()
        return {name: value for name, value in self.options.items() if value != values[name]}


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Args:
        number: its number in the paper.
        rows: its rows in the paper's order.
        split: the samples that the paper's figures are measured on.
        note: a sentence on the rows.
    """

    number: int
    rows: tuple[Row, ...]
    split: str = "test"
    note: str = ""

    def datasets(self) -> list[str]:
        """Return the names of the table's datasets."""
        return list(dict.fromkeys(name for row in self.rows for name in row.figures))

    def source(self, dataset: str) -> str:
        """Return a sentence on the figures' source and conditions."""
        return (
            f"Paper: Table {self.number} of Liu et al., GistNet, ICCV 2021, for {dataset} with {NETWORKS[dataset]} on its {self.split} "
            "samples: overall, or overall / many / medium / few with the groups of --split-rule paper_text."
        )


def dataset_of(train_counts: Sequence[int]) -> str | None:
    """Return the dataset of the paper with this training split, or None.

    Args:
        train_counts: the number of training samples of each class.
    """
    if not train_counts:
        return None
    key = (len(train_counts), sum(train_counts), max(train_counts), min(train_counts))
    return DATASETS.get(key)


def _imagenet(*figures: float) -> dict[str, Figures]:
    return {"ImageNet-LT": figures}


def _inaturalist(overall: float) -> dict[str, Figures]:
    return {"iNaturalist 2018": (overall,)}


def _decoupling(figures: dict[str, Figures]) -> tuple[Row, ...]:
    """Return the rows of Decoupling (Kang et al., ICLR 2020): the paper's figures, and the four classifiers of that method.

    The figures do not tell the classifiers apart. That of Places-LT equals the published one of the τ-normalized classifier.
    """
    heading = Row(None, figures, title="Decoupling, one of the next four")
    return heading, Row("ncm"), Row("crt"), Row("tau-norm"), Row("lws")


TABLE_1 = PaperTable(
    1,
    (
        Row("plain", _imagenet(23.5, 41.1, 14.9, 3.6)),
        Row("lifted", _imagenet(30.8)),
        Row("focal", _imagenet(30.5)),
        Row("range", _imagenet(30.7)),
        Row("fslwf", _imagenet(28.4)),
        Row("oltr", _imagenet(35.6)),
        *_decoupling(_imagenet(41.4, 51.8, 38.8, 21.5) | {"Places-LT": (37.9,)}),
        Row("lfme", _imagenet(38.8), title="Distill (LFME)"),
        Row("gist", _imagenet(42.2, 52.8, 39.8, 21.7) | {"Places-LT": (39.6, 42.5, 40.8, 32.1)}),
    ),
)

TABLE_2 = PaperTable(
    2,
    (
        Row("cb-focal", _inaturalist(61.1)),
        Row("ldam-drw", _inaturalist(68.0)),
        *_decoupling(_inaturalist(69.5)),
        Row("gist", _inaturalist(70.8)),
    ),
)

_FOUR = {"num_displacements": 4}  # the paper's m: four displacements, and the center

TABLE_3 = PaperTable(
    3,
    (
        Row("plain", _imagenet(25.1)),
        Row("cos-cb", _imagenet(37.6, 49.4, 34.8, 14.7)),
        Row("cos-cs-cb", _imagenet(39.5, 52.6, 36.3, 14.5), _FOUR),
        Row("gist", _imagenet(43.5, 54.8, 41.0, 21.4), _FOUR),
        Row("cos-gist", _imagenet(40.2, 51.4, 37.4, 19.0)),
        Row("gist-combined", _imagenet(40.9, 58.2, 34.6, 14.8), _FOUR),
        Row("gist-rotation", _imagenet(43.6, 55.1, 40.8, 21.7), _FOUR),
        Row("gist-mlp", _imagenet(43.4, 54.2, 41.1, 21.5), _FOUR),
        *(
            Row("gist", options={"num_displacements": m}, title=f"{TITLES['gist']}, m = {m}")
            for m in (2, 8, 16)
        ),
    ),
    split="validation",
    note="m is the number of displacements: 4 where the row names none.",
)

TABLES = {1: TABLE_1, 2: TABLE_2, 3: TABLE_3}
