"""`FeatureTransfer`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from train.model.feature_transfer import FeatureTransfer


def test_the_balanced_stream_alone_is_displaced(seed: int) -> None:
    directions = F.normalize(torch.randn(7, 33), dim=1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        features = (3 * torch.randn(50, 33)).to(dtype)
        uniforms = torch.rand(50)
        uniforms[:2] = torch.tensor([0.0, 1 - 2**-24])
        transfer = FeatureTransfer(7, 33, 0.8)
        transfer.directions.copy_(directions)
        found = transfer.to(dtype)(features, 30, uniforms)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wide = features.to(found.dtype)
        assert torch.equal(found[30:], wide[30:])
        moved = found[:30] - wide[:30] / wide[:30].norm(dim=1, keepdim=True)
        nearest = F.cosine_similarity(moved[:, None], directions, dim=2).argmax(1)
        assert torch.equal(nearest, (7 * uniforms[:30]).long())
        torch.testing.assert_close(moved, 0.8 * directions[nearest].to(moved), atol=5e-3, rtol=0)
        assert nearest[:2].tolist() == [0, 6]
