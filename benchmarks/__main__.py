"""All benchmarks: ``python -m benchmarks``, or ``make bench``. Results go to ``benchmarks/results/`` and to stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import (
    backup_full,
    backup_sparse,
    engine,
    guest_writes,
    io_qcow2,
    io_raw,
    peak_memory,
)
from benchmarks.command_line import parser, settings_of
from benchmarks.environment import environment
from benchmarks.harness import run_scenario
from benchmarks.report import page, put_between, summary, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness import Result

SCENARIOS = tuple(
    module.SCENARIO for module in (backup_full, backup_sparse, guest_writes, io_raw, io_qcow2, peak_memory, engine)
)
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Run every scenario; the files are rewritten after each, so that an interrupted run leaves what it had."""
    options = parser("benchmarks", "All benchmarks, side by side with their peers.")
    options.add_argument("--readme", type=Path, metavar="FILE", help="put the summary between the marks of FILE")
    arguments = options.parse_args(argv)
    settings = settings_of(arguments)
    around = environment(settings.directory, settings.loops)
    json_path = arguments.json or RESULTS / "results.json"
    results: list[Result] = []
    for scenario in SCENARIOS:
        results += run_scenario(scenario, settings)
        write_json(json_path, results, around)
        json_path.with_suffix(".md").write_text(page(results, around), encoding="utf-8")
    sys.stdout.write(page(results, around))
    if arguments.readme is not None:
        text = arguments.readme.read_text(encoding="utf-8")
        arguments.readme.write_text(put_between(text, summary(results, around)), encoding="utf-8")


if __name__ == "__main__":
    main()
