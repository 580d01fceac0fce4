"""The command as a whole: finding subcommands, errors as one line, what is loaded, and how it ends."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import blocklayer as library
from blocklayer.cli.main import COMMANDS, command_parser, main
from tests.helpers.command import blocklayer

NEEDLESS = ("rich", "importlib.metadata", "email", "multiprocessing", "fractions")
"""What a command that only reads an image must not load."""


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A real process."""
    command = [sys.executable, "-m", "blocklayer", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


@pytest.fixture
def disk(here: Path) -> Path:
    assert blocklayer("create", "-q", "-f", "qcow2", "disk.qcow2", "1M").status == 0
    return here / "disk.qcow2"


def test_the_module_is_the_command(disk: Path) -> None:
    done = run("info", disk)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"image: {disk}\nfile format: qcow2\n")


def test_help_lists_every_command() -> None:
    outcome = blocklayer("--help")
    assert outcome.status == 0
    for name, text in COMMANDS.items():
        assert f"  {name:<10}{text}\n" in outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str) -> None:
    outcome = blocklayer(name, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(f"usage: blocklayer {name} ")
    assert command_parser(name).get_default("run") is importlib.import_module(f"blocklayer.cli.{name}").run


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_is_in_the_documentation(name: str) -> None:
    """Under one of its spellings."""
    page = (Path(__file__).parent.parent.parent / "docs/reference/command-line.md").read_text()
    actions = command_parser(name)._actions
    spellings = [action.option_strings for action in actions if action.option_strings and action.dest != "help"]
    assert [each for each in spellings if not any(f"{spelling}" in page for spelling in each)] == []


def test_version_is_that_of_the_package() -> None:
    assert blocklayer("--version").out == f"blocklayer {library.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "a command is needed; there are backup, create, info, map, compare, check, demo"),
        (["convert"], "there is no command 'convert'; there are backup, create, info, map, compare, check, demo"),
    ],
)
def test_a_command_is_needed(arguments: list[str], line: str) -> None:
    assert blocklayer(*arguments) == (1, "", f"blocklayer: {line}\nTry 'blocklayer --help' for more information\n")


def test_an_unknown_option_before_the_command() -> None:
    outcome = blocklayer("--verbose", "info", "a")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("blocklayer: ")


def test_an_error_is_one_line(here: Path) -> None:
    outcome = blocklayer("info", "nowhere")
    assert outcome == (1, "", "blocklayer: file 'nowhere': open failed: No such file or directory\n")


def test_debug_shows_where_an_error_came_from(here: Path) -> None:
    outcome = blocklayer("--debug", "info", "nowhere")
    assert outcome.status == 1
    assert outcome.err.startswith("Traceback (most recent call last):\n")
    assert outcome.err.endswith("\nblocklayer: file 'nowhere': open failed: No such file or directory\n")


def test_an_error_of_the_operating_system_is_one_line_too(here: Path) -> None:
    (here / "file").touch()
    outcome = blocklayer("demo", "--keep", "file/below")
    assert outcome == (1, "", "blocklayer: [Errno 20] Not a directory: 'file/below'\n")


def test_an_interrupt_from_the_keyboard_ends_quietly(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    def interrupt(command: object) -> int:
        command.close()
        raise KeyboardInterrupt

    monkeypatch.setattr("blocklayer.cli.main.run_loop", interrupt)
    assert blocklayer("info", "nowhere") == (128 + signal.SIGINT, "", "")


def test_a_reader_that_went_away_is_no_error_worth_a_word(disk: Path) -> None:
    """The output is short: it fails only when it is flushed at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "blocklayer", "info", str(disk)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_command_without_uvloop_runs_in_asyncio_s_own_loop(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert blocklayer("info", disk).status == 0


def test_arguments_are_those_of_the_process_unless_given(disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["blocklayer", "info", str(disk)])
    assert main() == 0
    assert capsys.readouterr().out.startswith(f"image: {disk}\n")


def test_a_command_loads_no_more_than_it_needs(disk: Path) -> None:
    """Start-up is most of the time that a small command takes."""
    code = "import sys; from blocklayer.cli.main import main; main(['info', sys.argv[1]]);"
    code += "sys.exit(' '.join(sorted(set(sys.argv[2:]) & set(sys.modules))))"
    command = [
        sys.executable,
        "-c",
        code,
        str(disk),
        *NEEDLESS,
        *(f"blocklayer.cli.{name}" for name in COMMANDS if name != "info"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.strip() == ""
