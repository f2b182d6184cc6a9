"""Rules of CONTRIBUTING that a program can check: file length, direction of imports, docstrings, spelling."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 350
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
TEXT = CODE | {".md", ".toml", ".html"}

#: Folders and modules of each package, lowest layer first. A module may import its own layer and the layers before it.
LAYERS = {
    "gistops": [
        "_toolchain", "_build", "_dtensor", "_classifier", "_functorch", "_numbers", "_checks", "operators", "backends", "functional", "optim", "export", "nn", "distributed",
        "sampling", "info",
    ],
    "train": [
        "files", "console", "shot_groups", "options", "distributed", "surroundings", "data_options", "tuning_options", "method_options", "config", "recipes", "data", "model", "evaluation",
        "methods", "trained", "evaluated", "classifier", "cli", "unused_options", "training", "footprint", "checks", "report", "run", "commands", "__main__",
    ],
}  # fmt: skip

#: The first word of a docstring that is a clause or a fragment, not a statement.
CLAUSES = {
    "What",
    "Which",
    "Whether",
    "Where",
    "When",
    "How",
    "Why",
    "Of",
    "As",
    "That",
    "Those",
    "By",
    "So",
    "With",
}

BRITISH = re.compile(
    r"\b(\w*(?:centre|colour|behaviour|neighbour|favour|grey|licence|artefact|catalogue)\w*"
    r"|\w*(?:ormalis|ptimis|nitialis|ecognis|rganis|eneralis|inimis|aximis|pecialis|ynchronis|arallelis|ummaris"
    r"|erialis|uantis|egularis|isualis|ategoris|emoris|tilis)(?:e|es|ed|er|ers|ing|ation|ations)\b"
    r"|labelled|labelling|modelled|modelling|cancelling|travelling|analyse[sd]?)\b"
)


def tracked(suffixes: set[str]) -> Iterator[Path]:
    """Yield the tracked files with these suffixes."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in suffixes and path.is_file():
            yield path


def modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the dotted name and the syntax tree of every module of a package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts), ast.parse(path.read_text())


def imports(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names that a module imports, relative imports resolved; for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = [*base, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*prefix, alias.name]) for alias in node.names)


def test_no_file_is_longer_than_the_limit() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in tracked(CODE)}
    assert lines
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MAX_LINES} == {}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_down(package: str) -> None:
    layers = LAYERS[package]
    upward = []
    for module, tree in modules(package):
        own = module.split(".")[1]
        if own == "__init__":  # the package's public names, above all layers
            continue
        assert own in layers, f"{module}: add it to LAYERS"
        for name in imports(module, tree):
            target = name.split(".")
            if target[0] != package or len(target) < 2 or target[1] not in layers:
                continue
            if layers.index(target[1]) > layers.index(own):
                upward.append(f"{module} -> {name}")
    assert upward == []


def test_the_library_does_not_import_the_driver() -> None:
    upward = [
        f"{module} -> {name}"
        for module, tree in modules("gistops")
        for name in imports(module, tree)
        if name.split(".")[0] == "train" or name.startswith("gistops.train")
    ]
    assert upward == []


@pytest.mark.parametrize("package", ["gistops", "train", "bench", "tests"])
def test_docstrings_begin_with_a_statement(package: str) -> None:
    clauses = []
    for module, tree in modules(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                body = node.body if isinstance(node, ast.Module | ast.ClassDef) else []
                fields = [
                    x.value.value
                    for x in body
                    if isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant)
                ]
                for said in (text, *map(str, fields)):  # a field's docstring is a string below it
                    if said.split() and said.split()[0].rstrip(",") in CLAUSES:
                        clauses.append(f"{module}: {said.splitlines()[0]}")
    assert clauses == []


@pytest.mark.parametrize("package", ["gistops", "train", "bench"])
def test_text_files_name_their_encoding(package: str) -> None:
    """The default encoding depends on the machine."""
    found = []
    for module, tree in modules(package):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
                continue
            call = ast.unparse(node.func)
            mode = "".join(map(ast.unparse, node.args[1:2]))
            if (call == "open" and "b" not in mode) or call.endswith((".read_text", ".write_text")):
                found.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


def test_limits_in_time_of_tests_are_long() -> None:
    """A machine that is slow, or busy with other tests, does not reach them."""
    found = [
        f"{module}:{node.lineno}: timeout={node.value.value}"
        for module, tree in modules("tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "timeout"
        if isinstance(node.value, ast.Constant) and node.value.value < 300
    ]
    assert found == []


def test_spelling_is_american() -> None:
    words = [
        f"{path.relative_to(ROOT)}:{i}: {found.group(0)}"
        for path in tracked(TEXT)
        if path.name != Path(__file__).name and path.parent.name != "results"
        for i, line in enumerate(path.read_text().splitlines(), 1)
        for found in BRITISH.finditer(
            line.replace('"centres alone"', "")
        )  # a key in records of early versions
    ]
    assert words == []
