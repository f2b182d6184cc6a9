"""Functions captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Output = TypeVar("Output")


def captured(
    function: Callable[[], Output], before: Callable[[], object] = lambda: None
) -> tuple[Callable[[], None], Output]:
    """Capture `function` and return its replay and its output, which each replay overwrites.

    Args:
        function: runs three times first, so that the capture loads, compiles and tunes nothing.
        before: called between the warm-up and the capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph.replay, output
