"""The argument parser of all commands: options and operands in any order, wrong usage told as qemu-img tells it.

A usage error is one line, a hint where to read on, and exit status 1 (argparse's own would be 2, which ``check`` and
``compare`` need for other things).
"""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from blocklayer.base.errors import OptionError
from blocklayer.base.units import parse_size

_HEX = re.compile(r"0x[0-9a-f]+", re.IGNORECASE)


class FailureError(Exception):
    """Ends the program with ``status`` and one line on standard error."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        """Keep both."""
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    """Raises ``FailureError`` instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Wrong usage."""
        raise FailureError(f"{message}\nTry '{self.prog} --help' for more information")


def size(text: str) -> int:
    """A size like ``64k`` or ``0x10000``, as the type of an argument."""
    try:
        return parse_size(int(text, 16) if _HEX.fullmatch(text) else text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def number(text: str) -> int:
    """A whole number from 0 on, as the type of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
