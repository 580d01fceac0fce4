"""The command ``blocklayer``: finds the subcommand, runs it in an event loop, turns errors into one line."""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback
from typing import TYPE_CHECKING, Any

import blocklayer
from blocklayer.cli import backup, check, compare, create, demo, info, map
from blocklayer.cli.common import FailureError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

COMMANDS = (backup, create, info, map, compare, check, demo)
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
"""What shells report for a program that SIGINT ended."""


def make_parser() -> argparse.ArgumentParser:
    """The whole argument tree."""
    parser = argparse.ArgumentParser(
        prog="blocklayer", description="Disk images, backing chains and backups of live disks."
    )
    parser.add_argument("--version", action="version", version=f"blocklayer {blocklayer.__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; answers the exit status."""
    args = make_parser().parse_args(argv)
    try:
        return run_loop(args.run(args))
    except FailureError as failure:
        print(f"blocklayer: {failure}", file=sys.stderr)
        return failure.status
    except blocklayer.BlockError as error:
        if args.debug:
            traceback.print_exc()
        print(f"blocklayer: {error}", file=sys.stderr)
        return int(getattr(args, "error_status", EXIT_FAILURE))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_FAILURE


def run_loop(command: Coroutine[Any, Any, int]) -> int:
    """Run in uvloop where it is installed."""
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        return asyncio.run(command)
    return uvloop.run(command)
