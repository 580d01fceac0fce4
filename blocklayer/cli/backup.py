"""``blocklayer backup``: a copy of an image, with a progress bar or JSON lines.

With ``--sync none`` the command creates TARGET on top of SOURCE and holds the point in time until SIGINT or SIGTERM,
which is its success. It holds the image itself, so this is of use to those who read TARGET while it runs; who writes to
the disk takes the backup in the writing process (``Graph.backup``).

SIGINT and SIGTERM cancel the other modes: the exit status is 128 and the signal's number, and a target that was being created is gone
(a file that it was to replace is as it was). SIGCONT goes on after an error that an error policy stopped for.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import anyio

import blocklayer
from blocklayer.base.units import format_size
from blocklayer.cli.common import (
    add_cache_argument,
    add_output_argument,
    add_source_arguments,
    open_image,
    parse_create_options,
)
from blocklayer.cli.parser import number, size
from blocklayer.jobs.events import BlockJobFailing

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Callable

    from blocklayer.jobs.events import JobEvent

ERROR_POLICIES = ("report", "ignore", "enospc", "stop")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_SIGNALLED = 128
REPORT_INTERVAL_S = 0.2
"""Between two JSON lines of progress."""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add_source_arguments(parser, "--source-format")
    add_output_argument(parser)
    add_cache_argument(parser, "--cache")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument(
        "--sync",
        choices=("full", "top", "none"),
        default="full",
        help="full (default): the whole chain; top: what the image itself holds, on top of the same backing file;"
        " none: nothing but what is overwritten from now on, until SIGINT; TARGET shows the disk as it was",
    )
    parser.add_argument("--format", metavar="FMT", help="of the target (default: by its name, else as the source)")
    parser.add_argument(
        "--mode",
        choices=("absolute-paths", "existing"),
        default="absolute-paths",
        help="create the target, in the place of what has its name (default), or write into the one that is there",
    )
    parser.add_argument(
        "-o",
        "--options",
        action="append",
        default=[],
        metavar="OPT=VAL,...",
        help="options of the new target, as 'blocklayer create -o' takes them",
    )
    parser.add_argument("--compress", action="store_true", help="write compressed clusters")
    parser.add_argument("--speed", type=size, default=0, metavar="RATE", help="bytes per second (default: no limit)")
    parser.add_argument("--max-workers", type=number, default=64, metavar="N", help="copies in flight (default: 64)")
    parser.add_argument("--max-chunk", type=size, default=0, metavar="SIZE", help="longest single copy")
    parser.add_argument("--min-cluster-size", type=size, default=0, metavar="SIZE", help="least unit of copying")
    parser.add_argument("--use-copy-range", action="store_true", help="let the storage copy, file to file")
    for side, verb in (("source", "reading"), ("target", "writing")):
        parser.add_argument(
            f"--on-{side}-error",
            choices=ERROR_POLICIES,
            default="report",
            help=f"when {verb} fails: report (default) and fail; ignore: try for ever; stop until SIGCONT;"
            " enospc: stop if space is lacking, else report",
        )
    parser.add_argument("--retry", type=number, default=0, metavar="N", help="attempts before that (default: 0)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print errors only (and JSON, if asked to)")
    parser.set_defaults(run=run)


_PASSED_ON = (
    "sync", "format", "mode", "compress", "speed", "max_workers", "max_chunk", "min_cluster_size", "use_copy_range",
    "on_source_error", "on_target_error", "retry",
)  # fmt: skip


class Interruption:
    """The first SIGINT or SIGTERM ends what is under way, at first the task itself; ``number`` tells which it was."""

    def __init__(self) -> None:
        """Listen; must be made in the task that is to end."""
        self.number = 0
        task = asyncio.current_task()
        self.end: Callable[[], object] = lambda: task and task.cancel()
        for signum in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(signum, self._interrupt, signum)

    def _interrupt(self, signum: int) -> None:
        if not self.number:
            self.number = signum
            self.end()


async def run(args: argparse.Namespace) -> int:
    """Back up."""
    interruption, name = Interruption(), ""
    try:
        async with blocklayer.Graph() as graph:
            events = graph.events()
            job = await _start(graph, args)
            name = job.id
            interruption.end = partial(job.end, force=False)
            await _follow(job, events, args)
            result = await job.wait()
    except (asyncio.CancelledError, blocklayer.JobCancelledError):
        if not interruption.number:
            raise
        made = "is incomplete" if args.mode == "existing" else "was not made"
        _report(args, {"event": "cancelled", "job": name}, f"cancelled; {args.target} {made}")
        return EXIT_SIGNALLED + interruption.number
    except blocklayer.BlockError as error:
        if args.output == "json":
            _report(args, {"event": "failed", "job": name, "error": str(error)}, "")
        raise
    record = {key: getattr(value, "value", value) for key, value in asdict(result).items()}
    record |= {"started": result.started.isoformat(), "ended": result.ended.isoformat()}
    _report(args, {"event": "completed", "job": name, "result": record}, _summary(args, result))
    return 0


async def _start(graph: blocklayer.Graph, args: argparse.Namespace) -> blocklayer.BackupJob:
    source = await open_image(graph, args.source, args, format=args.source_format)
    options: dict[str, object] = {key: getattr(args, key) for key in _PASSED_ON}
    if args.options:
        options["target_options"] = parse_create_options(args.options)
    (job,) = await graph.backup_group([blocklayer.BackupRequest.build(source, args.target, **options)])
    return job


async def _follow(job: blocklayer.BackupJob, events: AsyncIterator[JobEvent], args: argparse.Namespace) -> None:
    """Show how the job goes until it has ended."""
    loop = asyncio.get_running_loop()
    try:
        async with anyio.create_task_group() as tasks:
            loop.add_signal_handler(signal.SIGCONT, lambda: tasks.start_soon(_resume, job))
            tasks.start_soon(_tell_errors, job, events, args)
            await _show(job, args)
            loop.remove_signal_handler(signal.SIGCONT)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:  # nobody reads what we print any more
        raise group.exceptions[0] from None


async def _resume(job: blocklayer.BackupJob) -> None:
    try:
        await job.resume()
    except blocklayer.StateError:
        return  # it was not stopped


async def _tell_errors(job: blocklayer.BackupJob, events: AsyncIterator[JobEvent], args: argparse.Namespace) -> None:
    """One line for each request that failed."""
    async for event in events:
        if isinstance(event, BlockJobFailing):
            side = args.source if event.operation == "read" else args.target
            what = f"{event.operation} error of {side}"
            if event.action == "stop":
                what += f"; stopped: put it right, then continue with kill -CONT {os.getpid()}"
            print(f"blocklayer: {what}", file=sys.stderr, flush=True)
            if args.output == "json":
                record = {"event": "error", "job": job.id, "operation": event.operation, "action": event.action}
                print(json.dumps(record), flush=True)


async def _show(job: blocklayer.BackupJob, args: argparse.Namespace) -> None:
    """Progress as JSON lines, or on a terminal, until the job has ended."""
    if args.sync == "none":
        text = f"{args.target} shows {args.source} as it was, as long as this runs; Ctrl-C ends it"
        _report(args, {"event": "holding", "job": job.id, "target": args.target}, text)
    if args.output == "json":
        await _show_lines(job)
    elif args.quiet or args.sync == "none" or not sys.stderr.isatty():
        async for _ in job.progress():
            pass
    else:
        from blocklayer.cli.progress_bar import show_bar  # noqa: PLC0415 - loads rich, which takes its time

        await show_bar(job, f"{args.sync} backup")


async def _show_lines(job: blocklayer.BackupJob) -> None:
    loop, shown = asyncio.get_running_loop(), float("-inf")
    async for progress in job.progress():
        now = loop.time()
        if now - shown >= REPORT_INTERVAL_S or progress.current >= progress.total:
            shown = now
            print(json.dumps({"event": "progress", "job": job.id, **asdict(progress)}), flush=True)


def _report(args: argparse.Namespace, record: dict[str, object], text: str) -> None:
    if args.output == "json":
        print(json.dumps(record), flush=True)
    elif not args.quiet:
        print(text, flush=True)


def _summary(args: argparse.Namespace, result: blocklayer.BackupResult) -> str:
    seconds = (result.ended - result.started).total_seconds()
    reason = f" ({result.reason})" if result.reason else ""
    parts = [f"{format_size(result.background_bytes)} copied in {seconds:.2f} s"]
    parts += [f"{format_size(result.zero_bytes)} of zeroes"] if result.zero_bytes else []
    parts += [f"{format_size(result.skipped_bytes)} left to the backing file"] if result.skipped_bytes else []
    text = f"{args.source} -> {args.target}: {result.sync.value}{reason}, {', '.join(parts)}"
    return "\n".join([text, *(f"warning: {warning}" for warning in result.warnings)])
