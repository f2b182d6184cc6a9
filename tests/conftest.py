from __future__ import annotations

import secrets
import zlib

import pytest
import torch

from gistops.backends import native

RUN_SEED = secrets.randbits(31)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=RUN_SEED, help="seed of the random inputs; random by default"
    )
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the operators are tested; cuda: with both GPU backends, `pytest tests/ops --device cuda`",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    status = native.load()
    return [
        f"gistops: random inputs of this run: --seed={config.getoption('--seed')}",
        f"gistops: compiled operators {'loaded' if status.loaded else 'NOT loaded'}, {status.reason}",
    ]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed for each test and each run, set again by --seed (printed in the header)."""
    value = zlib.crc32(f"{request.config.getoption('--seed')} {request.node.nodeid}".encode())
    torch.manual_seed(value)
    return value
