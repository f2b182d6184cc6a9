"""Run the forward and the backward of each op on small tensors, under compute-sanitizer.

`python -m bench.gpu.sanitizer_case cuda 300x200x136`. The results are not checked here.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import gistops

from ..problem import Size, make_labels, make_tensors
from .measure import precision

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32, "float16": torch.float16}


def main() -> None:
    """Run the functions at each size and in each dtype."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.sanitizer_case", description=__doc__)
    parser.add_argument("backend", choices=gistops.backends.NAMES)
    parser.add_argument("sizes", type=Size.parse, nargs="+")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    for size in options.sizes:
        for name, dtype in DTYPES.items():
            with precision(name):
                run(size, dtype, options.backend, options.device, everything=name in ("bf16", "float32"))
            if options.device == "cuda":
                torch.cuda.synchronize()
            print(f"{options.backend} {size} {name}: done", flush=True)


def run(size: Size, dtype: torch.dtype, backend: str, device: str, everything: bool) -> None:
    """Run logits and losses; with `everything` also top-k, rotations and sub-centers."""
    arguments = make_tensors(size, dtype, device)
    labels = make_labels(arguments)
    x, w, _, tau = arguments
    F.cross_entropy(gistops.constellation_logits(*arguments, backend=backend).float(), labels).backward()
    gistops.constellation_cross_entropy(*arguments, labels, backend=backend).backward()  # type: ignore[union-attr]
    if not everything:
        return
    gistops.constellation_topk(*arguments, 10, backend=backend)
    rotation = {"transform": "rotation", "axis": x.detach()[0], "backend": backend}
    gistops.constellation_cross_entropy(*arguments, labels, **rotation).backward()
    gistops.constellation_topk(*arguments, 10, **rotation)
    subcenters = torch.stack([w, w.roll(1, 0)], dim=1)
    gistops.subcenter_cross_entropy(x, subcenters, tau, labels, backend=backend).backward()


if __name__ == "__main__":
    main()
