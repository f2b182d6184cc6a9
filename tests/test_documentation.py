"""The Python and shell blocks of README and docs/ run, and figures, links to errors and citations are those of the code.

Blocks of a page run in order, in one folder and one namespace. `<!-- not run: reason -->` above a block leaves it out, and
`<!-- needs: package -->` where the package is not installed or does not fit.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Example, Sybil
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser

import bench.gpu.cli
import bench.gpu_train.cli
import bench.sharded.cli
import bench.sharded.gpus
import bench.training
import gistops
from train.__main__ import main
from train.cli import parse as parse_options
from train.commands.ablation import Ablation
from train.config import Config
from train.methods import METHODS
from train.report.paper import TABLES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^\n]+) -->\n\Z")
NEEDS = re.compile(r"<!-- needs: (?P<package>\w+) -->\n\Z")

#: Pages whose Python blocks are one program of several processes, and the test that runs it.
PROGRAMS = {"docs/distributed.md": "tests/distributed/test_guide.py"}

#: How many blocks do not run, by language. A new one must be counted here.
LEFT_OUT = {"python": 5, "bash": 28}


def name(page: Path) -> str:
    """Return the path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def reason(example: Example) -> str | None:
    """Return why a block does not run, or None if it does."""
    found = NOT_RUN.search(example.document.text[: example.region.start])
    return found["reason"] if found else None


def lacks_package(example: Example) -> bool:
    """Return whether a block needs a package that cannot be imported."""
    found = NEEDS.search(example.document.text[: example.region.start])
    try:
        importlib.import_module(found["package"] if found else "gistops")
    except (
        ImportError,
        RuntimeError,
    ):  # RuntimeError: timm imports torchvision, which may not fit this torch
        return True
    return False


def run_python(example: Example) -> None:
    """Run a block in the namespace of its page."""
    if reason(example) or name(Path(example.document.path)) in PROGRAMS or lacks_package(example):
        return
    code = "\n" * (example.line + example.parsed.line_offset) + str(
        example.parsed
    )  # line numbers of the page
    exec(compile(code, example.path, "exec"), example.namespace)


def run_bash(example: Example) -> None:
    """Run a block in the current folder, with this interpreter and this checkout."""
    if reason(example):
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    source = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PATH": path, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", str(example.parsed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{example.path}:{example.line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def parse(page: Path) -> Document:
    """Return a page with its blocks of Python and bash."""
    parsers = [CodeBlockParser("python", run_python), CodeBlockParser("bash", run_bash)]
    return Sybil(parsers=parsers, path=str(ROOT)).parse(page)


@pytest.mark.cpu
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name(page) == "docs/frameworks.md":  # as torchrun sets them for one process
        for variable, value in {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }.items():
            monkeypatch.setenv(variable, value)
    try:
        for example in parse(page).examples():
            example.evaluate()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 720


def test_every_block_has_a_language_that_runs() -> None:
    """A block of commands or of Python without its language would be left out without a word."""
    known = {*LANGUAGES, "bibtex", "text"}
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        opened = re.findall(r"^```(\w*)$", text, re.MULTILINE)[::2]
        found += [f"{name(page)}: {language!r}" for language in opened if language not in known]
        commands = re.findall(
            r"^    (?:python|pip|pytest|torchrun|\$) .*$",
            re.sub(r"(?ms)^```.*?^```$", "", text),
            re.MULTILINE,
        )
        found += [f"{name(page)}: {command}" for command in commands]
    assert found == []


def test_the_blocks_that_do_not_run_are_counted() -> None:
    counts: Counter[str] = Counter()
    for page in PAGES:
        for language in LANGUAGES:
            blocks = Sybil(parsers=[CodeBlockParser(language, run_python)], path=str(ROOT)).parse(page)
            counts[language] += sum(reason(example) is not None for example in blocks.examples())
        markers = page.read_text(encoding="utf-8").count("<!-- not run:")
        counts[name(page)] = markers
    assert {language: counts[language] for language in LANGUAGES} == LEFT_OUT, "count them in LEFT_OUT"
    assert sum(LEFT_OUT.values()) == sum(counts[name(page)] for page in PAGES), (
        "a marker stands above no block"
    )


def commands_left_out() -> Iterator[tuple[str, list[str]]]:
    """Yield the page and the words after `-m train` of each command of the driver that does not run."""
    for page in PAGES:
        document = Sybil(parsers=[CodeBlockParser("bash", run_bash)], path=str(ROOT)).parse(page)
        for example in filter(reason, document.examples()):
            for line in str(example.parsed).replace("\\\n", "").splitlines():
                _, found, words = line.partition(" -m train")
                if found and words[:1] in ("", " ") and "…" not in line:
                    yield name(page), shlex.split(words, comments=True)


COMMANDS = list(commands_left_out())


@pytest.mark.cpu
@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_commands_that_do_not_run_have_options_that_exist(
    page: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such a command ends at the file that it lacks, or at the GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if not words or ("--recipe" in words and words[words.index("--recipe") + 1] in ("smoke", "glyphs")):
        words = [*words, "--data", "missing.npz"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(r"does not exist|No such file|a GPU|is not installed", error), (page, error)


def test_commands_that_do_not_run_are_found() -> None:
    assert {words[0] for _, words in COMMANDS if words} >= {
        "ablation",
        "predict",
        "evaluate",
        "features",
        "--recipe",
    }


#: Programs of bench/ and the functions that read their command lines.
BENCH: dict[str, Callable[[list[str]], Any]] = {
    "bench.gpu": bench.gpu.cli.arguments,
    "bench.gpu_train": bench.gpu_train.cli.parse,
    "bench.sharded": bench.sharded.cli.arguments,
    "bench.sharded.gpus": bench.sharded.gpus.arguments,
    "bench.training": lambda words: parse_options(words, bench.training.Measured, "bench.training"),
}
BENCH_PAGES = [*PAGES, ROOT / "bench" / "README.md", ROOT / "csrc" / "README.md", ROOT / "CONTRIBUTING.md"]


def bench_commands() -> Iterator[tuple[str, str, list[str]]]:
    """Yield the page, the program and the words of each command of `BENCH`, in blocks and in sentences."""
    for page in BENCH_PAGES:
        text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))
        for program, words in re.findall(r"python -m (bench(?:\.\w+)*)([^`\n…]*)", text):
            if program in BENCH and "<" not in words:
                yield name(page), program, shlex.split(words, comments=True)


@pytest.mark.parametrize(("page", "program", "words"), list(bench_commands()))
def test_commands_of_bench_have_options_that_exist(page: str, program: str, words: list[str]) -> None:
    if program == "bench.gpu_train" and "--folder" not in words:
        words = ["--folder", "runs/x", *words]  # left out in sentences
    options = BENCH[program](words)
    if program == "bench.gpu_train":
        parse_options(["--recipe", "cifar100-lt", "--data", "x.npz", *options.options], Config, page)


def test_abbreviated_commands_have_options_that_exist() -> None:
    """A line with `…` repeats a command above it, with the options that differ."""
    known = {option.replace("_", "-") for option in Ablation.fields()}
    known |= {"seeds", "vary", "epochs", "folder", "at-once", "mps"}
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line.startswith("… --")]
    assert len(lines) > 3
    given = {option for line in lines for option in re.findall(r"--([a-z][a-z0-9-]*)", line)}
    assert given <= known


def test_the_commands_of_the_results_write_to_different_folders() -> None:
    """A run refuses a folder of other options, so that the second of two commands for it would fail."""
    text = re.sub(r"\\\n *", "", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    names = [
        max(re.findall(r"--(?:name|recipe) \S+", line), key=lambda option: option.startswith("--name"))
        for line in re.findall(r"^python -m train .*$", text, re.MULTILINE)
    ]
    assert len(names) > 5
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_the_table_of_memory_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    command = re.search(r"`python -m bench\.sharded\.gpus (--gpus [\d,]+)` prints this table", page)
    assert command
    bench.sharded.gpus.main(command[1].split())
    printed = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(printed) if line.startswith("| K | d | centers | 1 GPU"))
    assert len(printed[start:]) > 5
    assert "\n".join(printed[start:]).strip() in page


def test_the_table_of_methods_names_the_tables_of_the_paper() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text[text.index("| method | what it is |") :].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        names, _, use = line.strip("| ").split(" | ")
        numbers = [int(digit) for digit in re.findall(r"\bT(\d)", use)]
        every = range(numbers[0], numbers[-1] + 1) if " to T" in use else numbers
        found.update({method: set(every) for method in re.findall(r"`([a-z-]+)`", names)})
    rows = {number: {row.method for row in paper.rows} for number, paper in TABLES.items()}
    assert found == {method: {n for n in rows if method in rows[n]} for method in METHODS}


@pytest.mark.parametrize("page", PROGRAMS)
def test_programs_of_several_processes_are_run_elsewhere(page: str) -> None:
    assert (ROOT / page).name in (ROOT / PROGRAMS[page]).read_text(encoding="utf-8")


def figures_of(text: str) -> tuple[str, list[float]]:
    """Split a drawing into its text without numbers and its numbers, which other processors round differently."""
    numbers = re.findall(r"-?\d+\.\d+", text)
    return re.sub(r"-?\d+\.\d+", "#", text), [float(x) for x in numbers]


def test_the_figures_are_those_of_the_script(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    subprocess.run(
        [sys.executable, str(ROOT / "docs" / "figures.py"), str(tmp_path)], check=True, timeout=600
    )
    committed = {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "figures").glob("*.svg")
    }
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert drawn.keys() == committed.keys()
    for figure, text in drawn.items():
        versions = [re.search(r"Matplotlib v[\w.]+", t) for t in (text, committed[figure])]
        assert versions[0]
        assert versions[1]
        if versions[0][0] != versions[1][0]:
            continue  # other versions may draw differently
        (skeleton, numbers), (old_skeleton, old_numbers) = figures_of(text), figures_of(committed[figure])
        assert skeleton == old_skeleton, f"{figure}: run python docs/figures.py"
        assert numbers == pytest.approx(old_numbers, abs=1e-3), f"{figure}: run python docs/figures.py"


def messages() -> Iterator[tuple[str, str]]:
    """Yield the parts of each error of docs/troubleshooting.md that are the same in every such error."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for message in re.findall(r"^\*\*`([^`]+)`\*\*", text, re.MULTILINE):
        for part in re.split(r"…|\[|\]|: expected |, got |--[a-z-]+", message):
            if len(part.strip(" ,.:")) > 7:
                yield message, part.strip(" ,.:")


def test_the_errors_of_the_troubleshooting_page_exist() -> None:
    sources = "\n".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for package in ("gistops", "train")
        for path in (ROOT / package).rglob("*.py")
    )
    found = list(messages())
    assert len(found) > 15
    assert [(message, part) for message, part in found if part not in sources] == []


def test_the_citations_have_the_version_of_the_package() -> None:
    for page, line in (("CITATION.cff", "version: {}"), ("docs/cite.md", "  version = {{{}}},")):
        assert line.format(gistops.__version__) in (ROOT / page).read_text(encoding="utf-8").splitlines()
