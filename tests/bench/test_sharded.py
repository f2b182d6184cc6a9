"""Tests of `python -m bench.sharded`, and of its model against sizes and bytes that are counted by hand."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from bench.problem import Size
from bench.sharded import calibration, cli, gpus
from bench.sharded.collectives import bytes_sent
from bench.sharded.model import (
    Case,
    Collective,
    Link,
    Rates,
    Work,
    collectives,
    cpu_work,
    fit,
    fit_link,
    gpu_work,
    memory,
    optimizer_bytes,
    scores_on_gpu,
    sent,
    stashed_rows,
)


def test_two_processes_make_the_collectives_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sizes", "12x301x24", "--processes", "1,2", "--seconds", "0", "--rounds", "1"]
    assert cli.main([*options, "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "result.json").read_text())
    alone, together = document["cases"]
    assert (alone["ranks"], together["ranks"]) == (1, 2)
    assert alone["collectives"] == []
    expected = collectives(Case(Size(12, 301, 24), 2))
    assert together["collectives"] == [[c.kind, c.bytes] for c in expected]
    assert together["sent"] >= sent(Case(Size(12, 301, 24), 2))
    assert len(together["seconds"]) == len(together["transfer"]) == 2
    assert alone["transfer"] == []
    page = (tmp_path / "table.md").read_text()
    assert page == capsys.readouterr().out
    assert "| 12×301×24 | 2 |" in page
    assert "Not calibrated" in page


def test_bytes_and_messages_counted_by_hand() -> None:
    assert collectives(Case(Size(6, 10, 4, 2), 1)) == []
    case = Case(Size(6, 10, 4, 2), 3)
    assert case.classes == 4
    assert collectives(case) == [
        ("all_gather", 96, 1),  # three processes, four int64
        ("all_gather", 96, 1),  # 6 × 4 float32
        ("all_gather", 48, 1),  # 6 int64
        ("all_reduce", 24, 2),
        ("all_reduce", 48, 2),
        ("all_reduce", 4, 2),
        ("reduce_scatter", 96, 2),  # by gloo
        ("all_reduce", 36, 2),  # 2 × 4 displacements and tau
    ]
    assert sent(case) == pytest.approx((96 + 96 + 48 + 2 * (24 + 48 + 4 + 96 + 36)) * 2 / 3)
    assert Link(0.5, 4.0).seconds([Collective("all_gather", 96, 1)], 3) == 2 * 0.5 + 64 / 4.0
    assert Link(0.5, 4.0).seconds([Collective("all_reduce", 96, 2)], 3) == 4 * 0.5 + 128 / 4.0
    on_gpu = collectives(Case(Size(6, 10, 4, 2), 3, on_gpu=True))
    assert on_gpu[1] == ("all_gather", 48, 1)  # half precision
    assert on_gpu[4] == ("all_reduce", 72, 2)
    assert on_gpu[6] == ("reduce_scatter", 96, 1)  # sums of the gradients are float32


@pytest.mark.parametrize(
    ("rows", "dims", "expected"),
    [
        (64, 128, 64),
        (98, 128, 98),
        (99, 128, 0),
        (256, 128, 0),
        (256, 512, 256),
        (1024, 512, 256),
        (1024, 2048, 1024),
    ],
)
def test_rows_that_the_cpu_keeps(rows: int, dims: int, expected: int) -> None:
    """A class has dims floats, of which five are norms; a score and its slot take five bytes."""
    assert stashed_rows(Size(rows, 1000, dims)) == expected


def test_work_counted_by_hand() -> None:
    kept, recomputed = Size(64, 999, 128), Size(100, 999, 128)
    assert cpu_work(Case(kept, 2)) == (1, 2 * 3 * 64 * 500 * 128, 64 * 500, 16 * 500 * 128)
    assert cpu_work(Case(recomputed, 2)).flops == 2 * 4 * 100 * 500 * 128
    case = Case(Size(256, 80_000, 512), 2, on_gpu=True)
    assert gpu_work(case) == (1, 6 * 256 * 40_000 * 512, 256 * 40_000, 10 * 40_000 * 512 + 22 * 256 * 40_000)
    again = gpu_work(case, "recomputed")
    assert again.flops == 8 * 256 * 40_000 * 512
    assert again.bytes == 12 * 40_000 * 512 + 26 * 256 * 40_000


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (Size(256, 80_000, 512), "parked"),
        (Size(257, 80_000, 512), "kept"),
        (Size(256, 60_000, 512), "kept"),
        (Size(1024, 2_000_000, 512), "recomputed"),
    ],
)
def test_place_of_the_scores_on_gpus(size: Size, expected: str) -> None:
    assert scores_on_gpu(Case(size, 2, on_gpu=True)) == expected


def test_memory_counted_by_hand() -> None:
    """Ten million classes of 512 floats: 20.48 GB of parameters, of which each of eight GPUs has an eighth."""
    case = Case(Size(0, 10_000_000, 512), 8, on_gpu=True)
    assert memory(case) == (2_560_000_000, 2_560_000_000, 2_560_000_000, 2_560_000_000, 0)
    assert memory(case, states=2).optimizer == 5_120_000_000
    assert memory(Case(Size(0, 10, 4), 3)).total == 3 * 4 * 4 * 4  # the largest shard has four classes
    assert optimizer_bytes(Case(Size(0, 10, 4), 3)) == 5 * 4 * 4 * 4
    assert optimizer_bytes(Case(Size(0, 10, 4), 3), states=2) == 7 * 4 * 4 * 4


def test_fits_find_the_rates_that_made_the_times() -> None:
    rates = Rates(calls=1e-4, flops=2e-11, bytes=3e-10)
    cases = [
        Case(Size(b, k, d), 1)
        for b, k, d in ((32, 500, 64), (256, 9000, 96), (512, 700, 512), (64, 3000, 256))
    ]
    points = [(cpu_work(case), rates.seconds(cpu_work(case))) for case in cases]
    assert fit(points, ["calls", "flops", "bytes"]) == pytest.approx(rates, rel=1e-6)
    link = Link(2e-5, 3e9)
    halves = [Case(case.size, 2) for case in cases]
    assert fit_link([(c, link.seconds(collectives(c), 2)) for c in halves]) == pytest.approx(link, rel=1e-6)


def test_a_fitted_rate_is_never_negative() -> None:
    points = [(Work(1, 100, 0, 1), 1.0), (Work(1, 200, 0, 30), 1.9), (Work(1, 300, 0, 90), 2.7)]
    rates = fit(points, ["calls", "flops", "bytes"])
    assert min(rates) >= 0
    assert rates.bytes == 0


def test_the_model_predicts_the_points_that_calibrate_it() -> None:
    """Times made from rates, a link and an optimizer are found again, and predicted for other sizes and processes."""
    rates, link, bandwidth = Rates(calls=2e-3, flops=1e-11, pairs=5e-9, bytes=2e-10), Link(1e-4, 1e9), 5e9

    def result(case: Case) -> dict[str, object]:
        work, communication = rates.seconds(cpu_work(case)), link.seconds(collectives(case), case.ranks)
        together = case.ranks > 1
        return {
            "size": {"B": case.size.B, "K": case.size.K, "d": case.size.d, "m": case.size.m},
            "ranks": case.ranks,
            "seconds": [work + communication],
            "work": [work],
            "waiting": [0.0] * together,
            "transfer": [communication] * together,
            "optimizer": [optimizer_bytes(case) / bandwidth],
            "peak": memory(case).total,
            "sent": 0,
        }

    points = [Case(size, ranks) for size in calibration.CALIBRATING for ranks in (1, 2)]
    assert calibration.calibrate(map(result, points[:-1]), cores=2) is None
    model = calibration.calibrate(map(result, points), cores=2)
    assert model is not None
    other = Case(Size(300, 1_000_000, 128), 4)
    predicted = model.predict(other)
    work, communication = rates.seconds(cpu_work(other)), link.seconds(collectives(other), 4)
    assert predicted["work"] == pytest.approx(work)
    assert predicted["communication"] == pytest.approx(communication)
    assert predicted["seconds"] == pytest.approx(2 * work + communication)  # four processes on two cores
    busy = model.predict(other, others=1.2)
    assert busy["seconds"] == pytest.approx(5 * work + communication)
    assert predicted["optimizer"] == pytest.approx(optimizer_bytes(other) / bandwidth)
    assert predicted["peak"] == memory(other).total


def test_bytes_of_tcp_connections_are_counted() -> None:
    before = bytes_sent()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
        server.accept()[0] as receiver,
    ):
        sender.sendall(bytes(12_345))
        received = 0
        while received < 12_345:
            received += len(receiver.recv(12_345))
        assert bytes_sent() - before == 12_345


def test_predictions_for_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpus.main(["--sizes", "256x10000000x512", "--gpus", "8", "--links", "slow:0.001:0"]) == 0
    page = capsys.readouterr().out
    case = Case(Size(256, 10_000_000, 512), 8, on_gpu=True)
    milliseconds = sum(c.sent(8) for c in collectives(case)[1:]) / 1e6 * 1e3
    assert "| parked |" in page
    assert f"| {milliseconds:.2f} |" in page
    for file, size, variant, _ in gpus.MEASURED:
        assert gpus.seconds(file, size, variant) > 0
    with pytest.raises(ValueError, match="expected a step of the loss in bf16 at 1×2×3, found none"):
        gpus.seconds(gpus.MEASURED[0][0], Size(1, 2, 3), "cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "12x300"], "expected BxKxd"),
        (["--processes", "1,0"], "expected positive integers such as 1,2,4, got '1,0'"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_wrong_links_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpus.main(["--links", "NVLink:450"])
    assert "expected NAME:GB/s:µs, such as NVLink:450:2, got 'NVLink:450'" in capsys.readouterr().err
