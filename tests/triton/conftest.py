from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["small", "large"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set tiles of 16 and 32, which small samples exceed in every dimension, or keep those shipped for the interpreter."""
    from gistops.backends.triton import configs, tile_tables

    if request.param == "small":  # sizes differ, so that a mix-up of two shows
        forward = tile_tables.Config(classes=32, rows=16, dims=16, warps=4, stages=1)
        centers = tile_tables.Config(classes=16, rows=16, dims=32, warps=4, stages=1)
        monkeypatch.setattr(configs, "INTERPRETER", {"forward": forward, "centers": centers})

        def small_sizes(device: torch.device, kind: tile_tables.Kind) -> tile_tables.TileSizes:
            return replace(
                tile_tables.tile_sizes("interpreter", kind), norms=(16, 32), norms_in_registers=(1024, 1),
                max_over_slots=(16, 32, 4), rescore=(16, 32, 16), route_logits_grad=(16, 32, 4),
                route_logits_grad_many=(16, 32, 4), lse=(16, 32, 4), subcenters=(32, 16, 4), route_loss_grad=(32, 16, 4),
                route_loss_grad_many=(32, 16, 4), grad_input_epilogue=(16, 16), grad_displacements_epilogue=(16, 32),
            )  # fmt: skip

        monkeypatch.setattr(configs, "tile_sizes", small_sizes)
        monkeypatch.setattr(configs, "ROUTE_GROUPS", 2)  # several class tiles per group
        monkeypatch.setattr(configs, "LOSS_PROGRAMS", 4)
    return str(request.param)
