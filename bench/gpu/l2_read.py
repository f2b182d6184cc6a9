"""A Triton kernel that only reads, to measure the bandwidth of the L2."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def read_kernel(source, out, BLOCKS, TURNS, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program reads all blocks, from a different start, so that programs do not share blocks in an L1."""
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for turn in range(TURNS):
        block = (turn + program * 37) % BLOCKS
        total += tl.load(source + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + program, tl.sum(total))


def make_l2_reader(size: int) -> tuple[Callable[[], object], int]:
    """Return a call that reads `size` bytes many times, and the total number of bytes."""
    blocks = size // 4 // BLOCK
    source = torch.randn(blocks * BLOCK, device="cuda")
    programs = 4 * torch.cuda.get_device_properties().multi_processor_count
    out = torch.empty(programs, device="cuda")
    turns = blocks

    def run() -> None:
        read_kernel[(programs,)](source, out, blocks, turns, BLOCK=BLOCK, num_warps=8)

    return run, programs * turns * BLOCK * 4
