"""One small forward and backward of each operator, for compute-sanitizer to watch: `python -m bench.gpu_case cuda 130x300x136`.

Larger than a tile in every dimension and a multiple of none. What it computes is not judged here.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import gistops

from .forms import Size, labels_of, tensors


def main() -> None:
    """Run it and say so."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_case", description=__doc__)
    parser.add_argument("backend", choices=gistops.backends.NAMES)
    parser.add_argument("size", type=Size.parse)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for dtype in (torch.bfloat16, torch.float32):
        arguments = tensors(options.size, dtype, options.device)
        logits = gistops.constellation_logits(*arguments, backend=options.backend)
        F.cross_entropy(logits, labels_of(arguments)).backward()
        labels, more = labels_of(arguments), {"backend": options.backend}
        x, w, _, tau = arguments
        for turn in ({}, {"transform": "rotation", "axis": x.detach()[0]}):
            gistops.constellation_cross_entropy(*arguments, labels, **turn, **more).backward()
            gistops.constellation_topk(*arguments, 10, **turn, **more)
        free = torch.stack([w, w.roll(1, 0)], dim=1)
        gistops.subcenter_cross_entropy(x, free, tau, labels, **more).backward()
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(f"{options.backend} {options.size} {dtype}: done")


if __name__ == "__main__":
    main()
