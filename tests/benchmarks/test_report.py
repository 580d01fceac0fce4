"""Results as JSON and as a table."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks.harness import Result, Rounds, requests_per_second, seconds
from benchmarks.report import amount, describe, notes, page, table, write_json

if TYPE_CHECKING:
    from pathlib import Path

ENVIRONMENT = {
    "python": "CPython 3.11.7",
    "kernel": "Linux 6.1",
    "cpu_count": 2,
    "file_system": "ext4",
    "versions": {"fio": "fio-3.33", "uvloop": None},
}
RESULT = Result(
    "io_raw",
    "read",
    "stock",
    requests_per_second(3.0, 5.0),
    "qemu-img bench",
    Rounds((9.0, 12.0)),
    Rounds((3.0,)),
    "warm",
)
PEERLESS = Result("io_raw", "write", "stock", seconds(), "qemu-img bench", Rounds((1.0,)), Rounds(()))


def test_the_table_has_a_line_for_each_result() -> None:
    assert table([RESULT, PEERLESS]).splitlines()[2:] == [
        "| io_raw | read | stock | requests/s | 10.5 | 3 | 3.50 (bar) | 3.0 / 5.0 | qemu-img bench |",
        "| io_raw | write | stock | s | 1 | - |  |  | qemu-img bench |",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (1234567.8, "1,234,568"), (99.94, "99.9"), (0.123456, "0.123"), (100.2, "100")]
)
def test_amounts_keep_three_digits(value: float | None, text: str) -> None:
    assert amount(value) == text


def test_a_note_is_told_once() -> None:
    assert notes([RESULT, RESULT, PEERLESS]) == "- io_raw: warm\n"


def test_programs_that_are_not_installed_are_not_named() -> None:
    assert describe(ENVIRONMENT) == "CPython 3.11.7, Linux 6.1, 2 CPUs, ext4; fio fio-3.33.\n"


def test_the_page_holds_table_environment_and_notes() -> None:
    text = page([RESULT], ENVIRONMENT)
    assert text.startswith("| scenario |")
    assert "2 CPUs" in text
    assert text.endswith("- io_raw: warm\n")


def test_the_json_file_holds_environment_and_results(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_json(path, [RESULT], ENVIRONMENT)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "environment": ENVIRONMENT,
        "results": [json.loads(json.dumps(RESULT.to_json()))],
    }
