from __future__ import annotations

import secrets
import zlib

import pytest
import torch

from gistops import backends
from gistops.backends import native

RUN_SEED = secrets.randbits(31)

#: Device -> fused backends under test. They must be available, because a run without them would prove little.
FUSED = {"cpu": ["cpu"], "cuda": ["cuda", "triton"]}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=RUN_SEED, help="seed of the random inputs; default: random")
    parser.addoption(
        "--device",
        choices=tuple(FUSED),
        default="cpu",
        help="device of the tests of ops and modules; cuda: `pytest tests/ops tests/nn --device cuda`",
    )
    parser.addoption(
        "--backend",
        choices=FUSED["cuda"],
        help="with --device cuda: test this backend alone; modules choose it too. One run per backend, so that a failing "
        "backend does not hide the other",
    )
    parser.addoption("--cases", type=int, help="random cases per test of tests/fuzz; default: 40 fixed ones")


def pytest_configure(config: pytest.Config) -> None:
    device, backend = config.getoption("--device"), config.getoption("--backend")
    if device == "cpu":
        if backend:
            raise pytest.UsageError("--backend needs --device cuda")
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch {torch.__version__} finds no GPU")
    torch.set_default_device(device)
    if backend:
        backends._PREFERRED |= {device: (backend,), "meta": (backend,)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests that are marked for the other device; put first the one that takes minutes, for runs in parallel."""
    items.sort(key=lambda item: "test_interpreter.py" not in item.nodeid)
    other = "cpu" if config.getoption("--device") == "cuda" else "cuda"
    deselected = [item for item in items if item.get_closest_marker(other)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not item.get_closest_marker(other)]


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"gistops: random inputs of this run: --seed={config.getoption('--seed')}"]
    if config.getoption("--backend") == "triton":
        return lines  # Triton needs no compiled ops
    status = native.load()
    return [
        *lines,
        f"gistops: compiled operators {'loaded' if status.loaded else 'NOT loaded'}, {status.reason}",
    ]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A new seed per test and run. --seed, printed in the header, repeats a run."""
    value = zlib.crc32(f"{request.config.getoption('--seed')} {request.node.nodeid}".encode())
    torch.manual_seed(value)
    return value


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device under test: "cpu" or "cuda"."""
    return str(request.config.getoption("--device"))
