"""The command ``blocklayer``: finds the subcommand, runs it in an event loop, turns errors into one line.

Only the module of the command that was asked for is imported.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, Protocol, cast

import blocklayer
from blocklayer.cli.parser import FailureError, Parser

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

COMMANDS = {
    "backup": "copy an image as it is at one instant",
    "create": "make an image",
    "info": "what an image is",
    "map": "where the data of an image lie",
    "compare": "whether two images hold the same",
    "check": "whether an image's metadata are sound; repair them",
    "demo": "back up a disk that is being written to, and prove it",
}
"""What there is, each a module of this package with ``add(parser)``, which also sets ``run``."""

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE = 128 + signal.SIGPIPE
"""What shells report for a program that the signal ended."""


class Command(Protocol):
    """The module of a command."""

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add its arguments, and ``run`` as a default."""


def make_parser() -> Parser:
    """The options before the command's name."""
    listing = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="blocklayer",
        usage="%(prog)s [--version] [--debug] COMMAND ...",
        description="Disk images, backing chains and backups of live disks.",
        epilog=f"commands:\n{listing}\n\n'blocklayer COMMAND --help' tells about one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"blocklayer {blocklayer.__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    parser.add_argument("command", nargs="?", default="", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def command_parser(name: str) -> Parser:
    """The arguments of one command; imports its module. Raises ``FailureError`` for an unknown one."""
    if name not in COMMANDS:
        wrong = f"there is no command {name!r}" if name else "a command is needed"
        raise FailureError(f"{wrong}; there are {', '.join(COMMANDS)}\nTry 'blocklayer --help' for more information")
    parser = Parser(prog=f"blocklayer {name}", description=f"{COMMANDS[name].capitalize()}.")
    cast("Command", importlib.import_module(f"blocklayer.cli.{name}")).add(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; answers the exit status."""
    status, debug = EXIT_FAILURE, False
    try:
        outer = make_parser().parse_args(argv)
        debug = outer.debug
        args = command_parser(outer.command).parse_intermixed_args(outer.rest)
        status = getattr(args, "error_status", EXIT_FAILURE)
        _names_are_bytes()
        answer = run_loop(args.run(args))
        sys.stdout.flush()
    except FailureError as failure:
        print(f"blocklayer: {failure}", file=sys.stderr)
        return failure.status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return EXIT_PIPE
    except (blocklayer.BlockError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"blocklayer: {error}", file=sys.stderr)
        return status
    return answer


def _names_are_bytes() -> None:
    """Print file names that are not UTF-8 as the bytes that they are."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="surrogateescape")


def run_loop(command: Coroutine[Any, Any, int]) -> int:
    """Run in uvloop where it is installed."""
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        return asyncio.run(command)
    return uvloop.run(command)
