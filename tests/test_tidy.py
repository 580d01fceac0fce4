"""The house rules that no linter knows: how long things may get, what a file opens with, where its test is."""

from __future__ import annotations

import ast
import os
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "blocklayer").rglob("*.py"))
PROGRAMS = sorted([*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
FUNCTION_LINES_MEDIAN = 10
TYPE_IGNORES_MAX = 10

TESTED_ELSEWHERE = {
    "blocklayer/__main__.py": "tests/cli/test_main.py",
    "blocklayer/cli/progress_bar.py": "tests/cli/test_backup.py",
    "blocklayer/drivers/filter.py": "tests/drivers/test_throttle.py",
}
"""Sources whose behaviour is tested in a file that does not have their name."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code: neither the decorators nor the docstring count."""
    assert node.end_lineno is not None
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    text = 0 if docstring is None else docstring.end_lineno - docstring.lineno + 1
    return node.end_lineno - node.lineno + 1 - text


@pytest.mark.parametrize("path", PROGRAMS, ids=name)
def test_a_file_opens_with_what_it_is_and_is_not_too_long(path: Path) -> None:
    text = path.read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "a file opens with what it is"
    assert text.count("\n") <= FILE_LINES_MAX


@pytest.mark.parametrize("path", PROGRAMS, ids=name)
def test_no_function_is_longer_than_a_screen(path: Path) -> None:
    assert {node.name: length(node) for node in functions(path) if length(node) > FUNCTION_LINES_MAX} == {}


def test_functions_are_short_at_the_median() -> None:
    assert statistics.median(length(node) for path in SOURCES for node in functions(path)) <= FUNCTION_LINES_MEDIAN


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=name)
def test_a_source_file_has_a_test_file(path: Path) -> None:
    inside = path.relative_to(ROOT / "blocklayer")
    mirror = f"tests/{inside.parent / f'test_{inside.name}'}".replace("/./", "/")
    expected = TESTED_ELSEWHERE.get(name(path), mirror)
    assert (ROOT / expected).is_file(), f"{expected} is missing"


def test_every_type_ignore_has_a_reason_and_there_are_few() -> None:
    ignores = [line for path in SOURCES for line in path.read_text().splitlines() if "type: ignore" in line]
    assert len(ignores) <= TYPE_IGNORES_MAX
    assert [line for line in ignores if not re.search(r"type: ignore\[[a-z-]+\]  # \S", line)] == []


def test_every_skip_of_a_rule_has_a_reason() -> None:
    lines = [line for path in SOURCES for line in path.read_text().splitlines() if "# noqa" in line]
    assert [line for line in lines if not re.search(r"# noqa: [A-Z0-9, ]+ - \S", line)] == []


def test_a_link_in_the_documentation_leads_somewhere() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not os.path.exists(page.parent / target):
                broken.append(f"{name(page)}: {target}")
    assert broken == []
