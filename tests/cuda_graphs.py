"""Functions captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")


def captured(
    function: Callable[[], Made], before: Callable[[], object] = lambda: None
) -> tuple[Callable[[], None], Made]:
    """A call that replays `function`, and what it returned when it was captured, which each replay overwrites.

    Args:
        function: runs three times first, so that nothing is loaded, compiled or tuned while it is captured.
        before: called between these and the capture.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function()
    return graph.replay, made
