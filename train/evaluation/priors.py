"""Adjustment of logits to another class prior than that of training."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import torch
from torch import Tensor

from ..config import ConfigError
from ..data.errors import DataError
from ..data.labeled import ClassMatcher, listed
from ..files import TextError, read_text
from ..model.prior import log_prior

NAMED = ("uniform", "training")
HEADER = ["class", "count"]


def class_bias(
    target: str, assumed: str | None, exponent: float | None, counts: Tensor, matcher: ClassMatcher
) -> Tensor:
    """Return what is added to logits for another prior: log(target prior) - log(assumed prior), [K] float32.

    This is the post-hoc logit adjustment of Menon et al. (ICLR 2021) with their strength τ = 1, for which the adjusted
    logits are those of the Bayes classifier under the target prior, if the softmax of the logits estimates the probabilities of
    the classes under the assumed prior. A class with the target prior 0 has the bias -∞.

    Args:
        target: "uniform", "training" for the frequencies of the training samples, or the path of a CSV file with the
            columns class and count.
        assumed: the prior that the logits assume: "uniform", "training", or None for the one that `exponent` says.
        exponent: `Method.prior_exponent`; None if the method does not know it.
        counts: the number of training samples of each class, [K].
        matcher: finds the classes of the model that the file names.

    Raises:
        ConfigError: the file cannot be used, or `assumed` is None and the method does not know the prior.
    """
    if assumed is None and exponent is None:
        raise ConfigError(
            "assumed_prior",
            "uniform or training with --adjust, as the scores of this model's method estimate no probabilities under a prior that is known",
            "none",
        )
    if assumed is not None:
        exponent = {"uniform": 0.0, "training": 1.0}[assumed]
    assert exponent is not None
    source = torch.zeros(len(counts)) if exponent == 0 else (exponent * log_prior(counts)).log_softmax(0)
    return _target_log_prior(target, counts, matcher) - source


def _target_log_prior(target: str, counts: Tensor, matcher: ClassMatcher) -> Tensor:
    if target == "uniform":
        return torch.zeros(len(counts))
    return log_prior(counts if target == "training" else _read_counts(Path(target), len(counts), matcher))


def _read_counts(path: Path, num_classes: int, matcher: ClassMatcher) -> Tensor:
    """Read the count of each class from a CSV file, [K] float64."""
    expected = f"{', '.join(NAMED)}, or a CSV file with the columns {', '.join(HEADER)}"
    try:
        header, *rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    except (OSError, TextError, csv.Error, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError("adjust", expected, f"{path} ({why})") from None
    if [name.strip().lower() for name in header] != HEADER:
        raise ConfigError("adjust", expected, f"{path} with the first line {','.join(header)!r}")
    counts: dict[int, float] = {}
    for number, row in enumerate((row for row in rows if row), 2):
        where = f"{path}, row {number}"
        if len(row) != 2:
            raise ConfigError("adjust", "a class and a count in each row", f"{row} ({where})")
        try:
            found = matcher.find(row[0])
        except DataError as error:
            raise ConfigError("adjust", "classes of the model", f"{where} ({error})") from None
        if found is None or found in counts:
            got = f"{row[0]!r} {'again' if found is not None else ''}".rstrip()
            raise ConfigError("adjust", "each class of the model once", f"{got} ({where})")
        try:
            counts[found] = float(row[1])
        except ValueError:
            counts[found] = math.nan
        if not 0 <= counts[found] < math.inf:
            raise ConfigError("adjust", "counts of at least 0", f"{row[1]!r} ({where})")
    if missing := [matcher.names[k] for k in range(num_classes) if k not in counts]:
        got = f"{path} without {len(missing):,} of {num_classes:,}: {listed(missing)}"
        raise ConfigError("adjust", "a count of each class of the model", got)
    if not sum(counts.values()):
        raise ConfigError("adjust", "a class with a count above 0", str(path))
    return torch.tensor([counts[k] for k in range(num_classes)], dtype=torch.float64)
