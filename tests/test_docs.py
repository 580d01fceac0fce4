"""The examples of the documentation run: a page is one program, from its first block to its last, in an empty folder.

``python`` blocks share one namespace and may await. ``console`` blocks run their ``$ blocklayer`` lines; lines below one
are the output that it has to print, ``...`` standing for any text.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import CodeType, ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)

PROGRAMS = [page for page in PAGES if BLOCK.search(page.read_text())]


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """Line number, language and text of each example."""
    text = page.read_text()
    return [(text[: found.start()].count("\n") + 2, found[1], found[2]) for found in BLOCK.finditer(text)]


def compiled(page: Path, line: int, source: str) -> CodeType:
    """The block with the page's line numbers, so that a traceback points into the page."""
    tree = ast.increment_lineno(ast.parse(source), line - 1)
    return compile(tree, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def run_commands(text: str, folder: Path) -> None:
    steps = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    assert steps, "a console block has commands"
    for step in steps:
        command, _, expected = step.partition("\n")
        arguments = shlex.split(command)
        if arguments[0] == "blocklayer":
            arguments[0:1] = [sys.executable, "-m", "blocklayer"]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        if expected.strip():
            pattern = re.escape(expected.strip()).replace(re.escape("..."), ".*")
            assert re.fullmatch(pattern, done.stdout.strip(), re.DOTALL), f"{command} printed:\n{done.stdout}"


async def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    for line, language, text in blocks(page):
        if language == "console":
            await asyncio.to_thread(run_commands, text, folder)
            continue
        code = compiled(page, line, text)
        result = eval(code, vars(module))
        if inspect.iscoroutine(result):
            await result


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: str(page.relative_to(ROOT)))
async def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    await run_page(page, tmp_path, monkeypatch)


def test_every_page_is_reached_from_the_index() -> None:
    docs = ROOT / "docs"
    linked = {(docs / target).resolve() for target in re.findall(r"\]\(([^)#:]+\.md)", (docs / "index.md").read_text())}
    assert {page.resolve() for page in docs.rglob("*.md")} - linked == {(docs / "index.md").resolve()}


def test_the_driver_of_the_tutorial_has_no_more_lines_than_its_title_says() -> None:
    _, _, text = blocks(ROOT / "docs" / "tutorial" / "driver.md")[0]
    assert text.count("\n") <= 40
