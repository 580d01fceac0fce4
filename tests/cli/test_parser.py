"""Wrong usage is one line, a hint and exit status 1; operands and options come in any order."""

from __future__ import annotations

import argparse
import re

import pytest

from blocklayer.cli.parser import FailureError, Parser, number, size
from tests.helpers.command import blocklayer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64k", 65536),
        ("1.5M", 3 << 19),
        ("0x10", 16),
        ("0XfF", 255),
        ("1B", 1),
        ("2GiB", 2 << 30),
    ],
)
def test_sizes_are_decimal_with_suffixes_or_hexadecimal(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "x", "-1", "0x", "0x1k", "1e3", "9E", "1 2", "k", "9" * 5000])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError), match="size|digits"):
        size(text)


@pytest.mark.parametrize("text", ["", "-1", "1.0", "1k", "x", " 1"])
def test_what_is_no_number_is_told(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{re.escape(repr(text))} is not a whole number"):
        number(text)


def test_numbers_are_whole() -> None:
    assert (number("0"), number("17")) == (0, 17)


def test_a_usage_error_ends_nothing_by_itself() -> None:
    parser = Parser(prog="blocklayer thing")
    with pytest.raises(FailureError, match="unrecognized arguments: -x") as raised:
        parser.parse_args(["-x"])
    assert raised.value.status == 1
    assert str(raised.value).endswith("\nTry 'blocklayer thing --help' for more information")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["info"], "the following arguments are required: FILE"),
        (["info", "a", "b"], "unrecognized arguments: b"),
        (["info", "-f"], "argument -f/--format: expected one argument"),
        (["info", "-x", "a"], "unrecognized arguments: -x"),
        (["map", "-s", "1x", "a"], "argument -s/--start-offset: '1x' is not a size; write bytes or a number with k, M, G, T, P or E"),
        (["backup", "--max-workers", "many", "a", "b"], "argument --max-workers: 'many' is not a whole number"),
        (["check", "--output", "xml", "a"], "argument --output: invalid choice: 'xml' (choose from 'human', 'json')"),
    ],
)  # fmt: skip
def test_a_usage_error_says_what_is_wrong_and_where_to_read_on(arguments: list[str], line: str) -> None:
    outcome = blocklayer(*arguments)
    assert outcome == (1, "", f"blocklayer: {line}\nTry 'blocklayer {arguments[0]} --help' for more information\n")
