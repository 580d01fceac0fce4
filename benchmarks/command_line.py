"""The options that every benchmark takes, and the way from them to a report."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import loops
from benchmarks.environment import environment
from benchmarks.harness import Settings, run_scenario
from benchmarks.report import page, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness import Result, Scenario

ROUNDS = 5
SIZE = 1 << 30
REQUESTS = 100_000
ENGINES = ("threads",)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes from "512M", "1G"; ``ValueError`` if it is none."""
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    if unit not in UNITS:
        raise ValueError(f"{text!r} is not a size")
    return int(text[: len(text) - len(unit)]) * UNITS[unit]


def parser(program: str, summary: str) -> argparse.ArgumentParser:
    """The parser of one benchmark, or of all."""
    made = argparse.ArgumentParser(prog=f"python -m {program}", description=summary)
    made.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each side runs (default {ROUNDS})")
    made.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there")
    made.add_argument("--size", type=parse_size, default=SIZE, help="of the disks, like 512M (default 1G)")
    made.add_argument("--requests", type=int, default=REQUESTS, help=f"small requests a round (default {REQUESTS})")
    made.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="the I/O engine of our side")
    made.add_argument("--loop", choices=loops.available(), action="append", help="our event loop (default: all)")
    made.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the disks are made")
    made.add_argument("--only", default="", metavar="TEXT", help="only cases whose names hold TEXT")
    return made


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The parsed options as a record."""
    return Settings(
        directory=arguments.directory,
        rounds=arguments.rounds,
        size=arguments.size,
        requests=arguments.requests,
        engine=arguments.engine,
        loops=tuple(arguments.loop or loops.available()),
        only=arguments.only,
    )


def main(scenario: Scenario, argv: Sequence[str] | None = None) -> list[Result]:
    """Run one benchmark from the command line; the table goes to stdout, progress to stderr."""
    arguments = parser(f"benchmarks.{scenario.name}", scenario.summary).parse_args(argv)
    settings = settings_of(arguments)
    results = list(run_scenario(scenario, settings))
    around = environment(settings.directory, settings.loops)
    if arguments.json is not None:
        write_json(arguments.json, results, around)
    sys.stdout.write(page(results, around))
    return results
