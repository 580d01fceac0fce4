"""``blocklayer backup``: a point-in-time copy of an image, with a progress bar or JSON lines.

SIGINT and SIGTERM cancel: with ``--sync none`` that is how the job ends well; otherwise the half-made target is removed
and the exit status is 130.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

import blocklayer
from blocklayer.base.units import format_size, parse_size
from blocklayer.cli.common import add_output_argument, add_source_arguments, open_image
from blocklayer.cli.parser import FailureError

if TYPE_CHECKING:
    import argparse

ERROR_POLICIES = ("report", "ignore", "enospc", "stop", "auto")
EXIT_CANCELLED = 130


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add_source_arguments(parser, "--source-format")
    add_output_argument(parser)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--sync", choices=("full", "top", "none"), default="full", help="what to copy (default: full)")
    parser.add_argument(
        "--format", metavar="FMT", help="format of the target (default: by its name, else as the source)"
    )
    parser.add_argument(
        "--mode", choices=("absolute-paths", "existing"), default="absolute-paths", help="create the target, or use one"
    )
    parser.add_argument("--speed", type=parse_size, default=0, metavar="RATE", help="bytes per second; 0: no limit")
    parser.add_argument("--compress", action="store_true", help="write compressed clusters")
    parser.add_argument("--max-workers", type=int, default=64, metavar="N", help="copies in flight")
    parser.add_argument("--max-chunk", type=parse_size, default=0, metavar="SIZE", help="longest single copy")
    parser.add_argument("--min-cluster-size", type=parse_size, default=0, metavar="SIZE", help="least unit of copying")
    parser.add_argument("--use-copy-range", action="store_true", help="let the storage copy, file to file")
    parser.add_argument("--on-source-error", choices=ERROR_POLICIES, default="report")
    parser.add_argument("--on-target-error", choices=ERROR_POLICIES, default="report")
    parser.add_argument("--on-cbw-error", choices=("break-guest-write", "break-snapshot"), default="break-guest-write")
    parser.add_argument("--cbw-timeout", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--retry", type=int, default=0, metavar="N", help="attempts before an error policy applies")
    parser.add_argument("--cache", choices=[mode.value for mode in blocklayer.CacheMode], default="writeback")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.set_defaults(run=run)


_PASSED_ON = [
    "format",
    "mode",
    "speed",
    "compress",
    "max_workers",
    "max_chunk",
    "min_cluster_size",
    "use_copy_range",
    "on_source_error",
    "on_target_error",
    "on_cbw_error",
    "cbw_timeout",
    "retry",
]


async def run(args: argparse.Namespace) -> int:
    """Back up."""
    options = {name: getattr(args, name) for name in _PASSED_ON}
    async with blocklayer.Graph() as graph:
        source = await open_image(graph, args.source, args, format=args.source_format, cache=args.cache)
        job = await graph.backup(source, args.target, sync=args.sync, **options)
        interrupted = _cancel_on_signals(job)
        await _show(job, args)
        try:
            result = await job.wait()
        except blocklayer.JobCancelledError:
            _report(args, {"event": "cancelled", "job": job.id}, "cancelled; no target was left behind")
            return EXIT_CANCELLED
        if interrupted.is_set() and args.sync != "none":
            return EXIT_CANCELLED
    _report(args, {"event": "completed", "job": job.id, "result": asdict(result)}, _summary(args, result))
    return 0


def _cancel_on_signals(job: blocklayer.BackupJob) -> asyncio.Event:
    loop = asyncio.get_running_loop()
    interrupted = asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    def interrupt() -> None:
        if not interrupted.is_set():
            interrupted.set()
            tasks.add(loop.create_task(job.cancel()))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    return interrupted


async def _show(job: blocklayer.BackupJob, args: argparse.Namespace) -> None:
    """Follow the job until it ends."""
    if args.output == "json":
        async for progress in job.progress():
            print(json.dumps({"event": "progress", "job": job.id, **asdict(progress)}), flush=True)
        return
    if args.quiet or not sys.stderr.isatty():
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{args.sync} backup", total=None)
        async for progress in job.progress():
            bar.update(task, completed=progress.current, total=progress.total)


def _report(args: argparse.Namespace, record: dict[str, object], text: str) -> None:
    if args.output == "json":
        print(json.dumps(record, default=_plain), flush=True)
    elif not args.quiet:
        print(text)


def _plain(value: object) -> object:
    plain = getattr(value, "value", None)
    return plain if plain is not None else str(value)


def _summary(args: argparse.Namespace, result: blocklayer.BackupResult) -> str:
    if not isinstance(result, blocklayer.BackupResult):
        raise FailureError("the job ended without a result")
    copied = result.background_bytes + result.before_write_bytes
    seconds = (result.ended - result.started).total_seconds()
    reason = f" ({result.reason})" if result.reason else ""
    return (
        f"{args.source} -> {args.target}: {result.sync.value}{reason}, {format_size(copied)} copied in {seconds:.2f} s, "
        f"{format_size(result.zero_bytes)} of zeroes, {format_size(result.skipped_bytes)} left to the backing file"
    )
