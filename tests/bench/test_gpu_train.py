"""Tests of `python -m bench.gpu_train` on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu_train import cli, environment, jobs, pool
from bench.gpu_train.jobs import Job
from train.cli import parse_run

from ..train.conftest import REPOSITORY

SMALL = "--recipe smoke --device cpu --threads 1 --precision float32 --no-graph"
OPTIONS = "--num-classes 5 --classes-per-batch 4"


def run_command(
    folder: Path, data: Path, words: str, options: str = OPTIONS
) -> tuple[int, list[dict[str, Any]]]:
    """Run the command in a new process and return its exit code and its records."""
    command = [sys.executable, "-m", "bench.gpu_train", "--data", str(data), "--folder", str(folder)]
    done = subprocess.run(
        [*command, *SMALL.split(), *words.split(), "--", *options.split()],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=1000,
    )  # fmt: skip
    assert not done.stderr, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines == [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return done.returncode, lines


def test_methods_that_share_a_first_stage_are_one_job() -> None:
    methods = ("plain", "gist", "cos-balanced-softmax", "cos-gist")
    families = [("plain",), ("gist", "cos-gist"), ("cos-balanced-softmax",)]
    assert jobs.make_jobs(methods, [4, 7]) == [Job(seed, family) for family in families for seed in (4, 7)]


def test_command_of_a_job_is_accepted_by_train() -> None:
    words = "--data some.npz --folder runs --epochs 101 --compile --device cpu -- --num-displacements 3"
    args = cli.parse(words.split())
    config = parse_run(jobs.train_command(Job(4, ("gist", "cos-gist")), args.data, args)[3:])
    assert (config.run.recipe, config.data.data, config.data.imbalance_ratio) == (
        "cifar100-lt",
        "some.npz",
        1,
    )
    assert (config.method.methods, config.run.seed, config.run.resume) == (("gist", "cos-gist"), 4, True)
    assert (config.optim.stage1_epochs, config.optim.stage2_epochs, config.method.num_displacements) == (
        50,
        51,
        3,
    )
    assert (config.runtime.precision, config.runtime.cuda_graph, config.runtime.compile) == (
        "bf16",
        True,
        True,
    )
    without = jobs.train_command(Job(0, ("plain",)), None, cli.parse(["--folder", "runs", "--no-graph"]))
    assert not {"--data", "--compile", "--cuda-graph"} & set(without)


def test_a_stopped_pool_resumes(image_file: Path, tmp_path: Path) -> None:
    words = ["--data", str(image_file), "--folder", str(tmp_path), "--epochs", "400", "--at-once", "0"]
    args = cli.parse([*words, *SMALL.split(), "--", *OPTIONS.split()])
    both = [Job(seed, ("gist", "cos-gist")) for seed in (0, 1)]

    def epochs() -> list[int]:
        return [jobs.unfinished(tmp_path, job, None)["epochs"] for job in both]

    for _ in range(2):
        before = epochs()  # while no process runs: one may have finished an epoch before it stopped
        running = pool.Pool(both, image_file, args, dict(os.environ))
        while not all(now > then for now, then in zip(epochs(), before, strict=True)):
            running.poll()
            assert len(running.running) == 2, [jobs.read_log(tmp_path, job) for job in both]
            time.sleep(0.1)
        running.stop(time.monotonic() + 600)
        assert list(running.codes.values()) == [143, 143]
        for job in both:
            assert "stopped by SIGTERM in gist, after " in jobs.read_log(tmp_path, job)
            assert (tmp_path / job.name / "checkpoint.pt").exists()
    assert all("resuming after gist" in jobs.read_log(tmp_path, job) for job in both)


def test_a_time_limit_below_the_first_epoch(image_file: Path, tmp_path: Path) -> None:
    words = "--seeds 0 1 2 --methods plain --epochs 400 --at-once 2 --seconds 4"
    code, lines = run_command(tmp_path / "runs", image_file, words)
    assert code == 0
    assert [(line["event"], line["seed"], line["epochs"]) for line in lines] == [
        ("unfinished", seed, 0) for seed in range(3)
    ]


def test_finished_models_are_reported_by_every_call(image_file: Path, tmp_path: Path) -> None:
    words = "--seeds 3 --methods gist,plain --epochs 2 --at-once 0 --seconds 900"
    code, lines = run_command(tmp_path / "runs", image_file, words)
    assert code == 0
    assert {(line["event"], line["method"], line["epochs"]) for line in lines} == {
        ("result", "gist", 2),
        ("result", "plain", 2),
    }
    assert all(line["accuracy"].keys() == {"overall", "many", "medium", "few"} for line in lines)
    assert all(line["images_per_second"] > 0 for line in lines)
    code, again = run_command(tmp_path / "runs", image_file, words)
    assert (code, len(again)) == (0, 2)
    assert all(line in lines for line in again)  # in the order of methods, not of their ends


def test_a_failed_process_is_reported(image_file: Path, tmp_path: Path) -> None:
    words = "--seeds 0 --methods plain --epochs 2 --seconds 900"
    code, (line,) = run_command(tmp_path / "runs", image_file, words, "--num-classes 6")
    assert code == 1
    assert (line["event"], line["code"]) == ("failed", 2)
    assert "expected 6 classes" in line["said"]


def test_packed_data_is_unpacked_once(tmp_path: Path) -> None:
    tool, packed = tmp_path / "cifar_packed.py", tmp_path / "some.packed"
    tool.write_text(
        "import sys, numpy\nassert sys.argv[1] == 'unpack'\n"
        "numpy.savez(sys.argv[3], x=numpy.frombuffer(open(sys.argv[2], 'rb').read(), numpy.uint8))\n"
    )
    packed.write_bytes(b"abc")
    made = jobs.unpack(packed, tmp_path, None)
    assert np.load(made)["x"].tobytes() == b"abc"
    tool.unlink()
    assert jobs.unpack(packed, tmp_path, None) == made
    made.unlink()
    with pytest.raises(SystemExit, match="--unpacker: expected the script"):
        jobs.unpack(packed, tmp_path, None)
    assert jobs.unpack(Path("other.npz"), tmp_path, None) == Path("other.npz")


def test_the_probe_measures_every_launch_mode(image_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "probe"
    command = [
        sys.executable,
        "-m",
        "bench.gpu_train",
        "--probe",
        "--data",
        str(image_file),
        "--seconds",
        "900",
        "--ways",
        "eager,graph",
    ]
    command += ["--folder", str(folder), "--methods", "gist", *SMALL.split(), "--", *OPTIONS.split()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {line["way"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert lines["eager"]["ms_per_step"] > 0
    assert lines["graph"]["losses"] == lines["eager"]["losses"]
    assert "CUDA graphs are not available on cpu" in lines["graph"]["warned"][0]


def test_one_process_compiles_and_the_others_reuse_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool waits for one compilation. With an archive of the cache another machine does not compile again."""
    monkeypatch.setattr(environment, "CACHE", tmp_path / "compiled")
    archive = tmp_path / "compiled.tgz"
    assert environment.compile_cache_env(archive)["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    program = "import time\ntime.sleep(1000)"
    monkeypatch.setattr(pool, "train_command", lambda *_: [sys.executable, "-c", program])
    args = cli.parse(["--folder", str(tmp_path), "--compile", "--at-once", "2"])
    three = [Job(seed, ("plain",)) for seed in range(3)]

    def running(processes: pool.Pool) -> int:
        processes.poll()
        return len(processes.running)

    cold = pool.Pool(three, None, args, dict(os.environ))
    assert [running(cold), running(cold)] == [1, 1]
    (tmp_path / three[0].name).mkdir()
    (tmp_path / three[0].name / "metrics.jsonl").write_text('{"event": "epoch", "method": "plain"}\n')
    assert running(cold) == 2
    cold.stop(time.monotonic() + 600)
    made = tmp_path / "compiled" / "fxgraph" / "ab" / "graph"
    made.parent.mkdir(parents=True)
    made.write_bytes(b"code")
    environment.save_compile_cache(archive)
    shutil.rmtree(tmp_path / "compiled")
    environment.compile_cache_env(archive)
    assert made.read_bytes() == b"code"
    warm = pool.Pool(three, None, args, dict(os.environ))
    assert running(warm) == 2
    warm.stop(time.monotonic() + 600)
