"""`residual_directions`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from train.methods.residual_directions import residual_directions


def test_residual_directions_are_those_in_which_classes_spread(seed: int) -> None:
    """Two opposite directions in which all classes spread around their means are found."""
    spread = F.normalize(torch.randn(32), dim=0)
    means = F.normalize(torch.randn(6, 32), dim=1)
    means = F.normalize(means - (means @ spread)[:, None] * spread, dim=1)
    counts = torch.tensor([200, 200, 200, 200, 5, 5])
    y = torch.repeat_interleave(torch.arange(6), counts)
    sign = torch.randint(2, (len(y), 1)) * 2.0 - 1
    x = 3 * (means[y] + 0.5 * sign * spread + 0.01 * torch.randn(len(y), 32))
    directions = residual_directions(x, y, counts, 2, seed=0)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2))
    cosines = directions @ spread
    assert cosines.abs().min() > 0.95
    assert cosines[0] * cosines[1] < 0
    few = residual_directions(x[-10:], torch.zeros(10, dtype=torch.int64), torch.tensor([10]), 2, 0)
    assert few.shape == (2, 32)
    with pytest.raises(ValueError, match=r"--transfer-directions: expected at most 10, .* got 11"):
        residual_directions(x[-10:], torch.zeros(10, dtype=torch.int64), torch.tensor([10]), 11, 0)
