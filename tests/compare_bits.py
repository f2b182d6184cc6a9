"""Compare the bits of this checkout's results with those of another commit, on this machine's CPU.

    python tests/compare_bits.py --against ee8676f            # build and run that commit too; exit code 1 if any bit differs
    python tests/compare_bits.py --write before.json          # keep the digests of this checkout
    python tests/compare_bits.py --compare before.json        # compare with kept ones

The digests cover logits, slots, losses, gradients and best classes, for every transform and dtype, and the weights and
losses of three short training runs. Bits depend on the processor, on its libraries and on the number of threads, so
both sides are computed here. Only names that are public in both commits are used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
B, K, D, M, HIDDEN = 70, 1100, 130, 5, 24  # rows, classes, dimensions, slots, hidden units of the MLP
THREADS = 2
RUNS = {
    "gist": "--methods gist plain cos-balanced-softmax",
    "table 3": "--methods cos-cs-cb gist-combined gist-rotation gist-mlp --accumulate 2 --displacement-init residuals",
    "residuals": "--methods gist --displacement-update residuals --batch-norm split --schedule cosine --seed 3",
}


def main() -> int:
    """Run the comparison that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", metavar="COMMIT", help="build and run this commit, and compare with it")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with the digests in FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the digests to FILE")
    parser.add_argument("--no-runs", action="store_true", help="leave out the training runs")
    args = parser.parse_args()
    digests = dict(all_digests(runs=not args.no_runs))
    if args.write:
        args.write.write_text(json.dumps(digests, indent=1) + "\n")
    if args.against:
        return report(digests, digests_of(args.against, args.no_runs), args.against)
    if args.compare:
        return report(digests, json.loads(args.compare.read_text()), str(args.compare))
    if not args.write:
        print(json.dumps(digests, indent=1))
    return 0


def report(here: dict[str, str], there: dict[str, str], name: str) -> int:
    """Print the names of results that differ; return 1 if there are any."""
    common = here.keys() & there.keys()
    different = sorted(key for key in common if here[key] != there[key])
    for key in different:
        print(f"differs from {name}: {key}")
    print(f"{len(common) - len(different)} of {len(common)} results have the bits of {name}")
    return 1 if different or not common else 0


def digests_of(commit: str, no_runs: bool) -> dict[str, str]:
    """Return the digests of another commit, from a temporary work tree."""
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder, "tree"), Path(folder, "digests.json")
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", str(tree), commit], cwd=ROOT, check=True
        )
        try:
            Path(tree, "tests", "compare_bits.py").write_text(Path(__file__).read_text())
            words = [
                sys.executable,
                "tests/compare_bits.py",
                "--write",
                str(out),
                *(["--no-runs"] if no_runs else []),
            ]
            subprocess.run(words, cwd=tree, check=True)
            digests: dict[str, str] = json.loads(out.read_text())
            return digests
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


def all_digests(runs: bool) -> Iterator[tuple[str, str]]:
    """Yield (name, SHA-256) of every result of this checkout."""
    sys.path[0] = str(ROOT)  # not tests/, whose triton/ would hide the package
    import torch

    torch.set_num_threads(THREADS)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for name, outputs in operators(dtype).items():
            for i, output in enumerate(outputs):
                yield f"{name} {dtype} {i}", digest(output)
    for name, words in RUNS.items() if runs else ():
        for file, text in training_run(words):
            yield f"run {name}: {file}", text


def digest(x: object) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    import torch

    assert isinstance(x, torch.Tensor)
    data = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def operators(dtype: object) -> dict[str, list[object]]:
    """Return the outputs and gradients of every public operator on fixed inputs."""
    import torch

    import gistops

    generator = torch.Generator().manual_seed(20)

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return made.to(dtype).requires_grad_()  # type: ignore[call-overload, no-any-return]

    f, w, delta, axis = normal(B, D), normal(K, D), normal(M - 1, D), normal(D)
    subcenters, mlp = normal(K // 4, 3, D), (normal(HIDDEN, 2 * D), normal(D, HIDDEN))
    tau = torch.tensor(16.0, requires_grad=True)
    target = torch.randint(K // 4, (B,), generator=generator)
    target[3] = -100
    bias, margin = normal(K), torch.rand(K, generator=generator)
    weight = torch.rand(K, generator=generator)
    transforms = {
        "translation": {},
        "rotation": {"transform": "rotation", "axis": axis},
        "mlp": {"transform": "mlp", "mlp": mlp},
    }
    losses = {
        "plain": {},
        "every option": {
            "class_bias": bias, "weight": weight, "margin": margin, "margin_kind": "angle", "label_smoothing": 0.1,
        },
        "cosine margin, per row": {"margin": 0.2, "margin_kind": "cosine", "reduction": "none"},
    }  # fmt: skip
    leaves = [f, w, delta, axis, subcenters, *mlp, tau, bias]
    results: dict[str, list[object]] = {}

    def with_gradients(name: str, call: Callable[[], object]) -> None:
        made = call()
        outputs = list(made) if isinstance(made, tuple) else [made]
        results[name] = outputs
        first = outputs[0]
        ramp = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).reshape(first.shape)
        gradients = torch.autograd.grad(first, leaves, ramp, allow_unused=True)
        results[f"{name}, gradients"] = [g for g in gradients if g is not None]

    for kind, options in transforms.items():
        with_gradients(
            f"logits {kind}",
            lambda o=options: gistops.constellation_logits(f, w, delta, tau, return_slots=True, **o),
        )
        for loss, more in losses.items():
            with_gradients(
                f"loss {kind} {loss}",
                lambda o=options, m=more: gistops.constellation_cross_entropy(
                    f, w, delta, tau, target, return_lse=True, **o, **m
                ),
            )
        results[f"top k {kind}"] = list(
            gistops.constellation_topk(f, w, delta, tau, 7, return_lse=True, **options)
        )
    with_gradients(
        "logits sub-centers", lambda: gistops.subcenter_logits(f, subcenters, tau, return_slots=True)
    )
    with_gradients("loss sub-centers", lambda: gistops.subcenter_cross_entropy(f, subcenters, tau, target))
    results["top k sub-centers"] = list(gistops.subcenter_topk(f, subcenters, tau, 7))
    head = gistops.nn.ConstellationClassifier(D, K, M - 1)
    with torch.no_grad():
        head.centers.copy_(w), head.displacements.copy_(delta)
        head.eval().freeze()
        results["frozen head"] = [head(f)]
    return results


def training_run(words: str) -> Iterator[tuple[str, str]]:
    """Run the smoke recipe with these options; yield the digests of its weights and of its losses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "train",
            "--recipe",
            "smoke",
            "--device",
            "cpu",
            "--threads",
            str(THREADS),
        ]
        command += ["--runs", folder, "--name", "run", *words.split()]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        run = Path(folder, "run")
        import safetensors.torch

        for file in sorted(run.glob("model-*.safetensors")):
            weights = safetensors.torch.load_file(file)
            together = hashlib.sha256()
            for name in sorted(weights):
                together.update(f"{name} {digest(weights[name])}".encode())
            yield file.name, together.hexdigest()
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            if record["event"] == "epoch":
                losses = {name: value for name, value in sorted(record.items()) if name.startswith("loss")}
                yield f"{record['method']} {record['stage']}.{record['epoch']}", json.dumps(losses)


if __name__ == "__main__":
    sys.exit(main())
