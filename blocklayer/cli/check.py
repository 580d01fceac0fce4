"""``blocklayer check``: whether an image's metadata are sound; options, output and exit statuses as qemu-img check's.

0 clean (or repaired), 1 the check could not be done, 2 corruptions, 3 leaked clusters only, 63 the format has no check.
What was found is told on standard error, one line each.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import blocklayer
from blocklayer.cli.common import (
    add_cache_argument,
    add_output_argument,
    add_source_arguments,
    dump_json,
    open_image,
)
from blocklayer.cli.parser import FailureError
from blocklayer.drivers.qcow2 import Qcow2Driver

if TYPE_CHECKING:
    import argparse

    from blocklayer.codec.qcow2.check_result import CheckResult, Findings

EXIT_CORRUPT, EXIT_LEAKS, EXIT_UNSUPPORTED = 2, 3, 63


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add_source_arguments(parser, "--format")
    add_output_argument(parser)
    add_cache_argument(parser, "-T", "--cache")
    parser.add_argument(
        "-r",
        "--repair",
        choices=("leaks", "all"),
        help="repair: 'leaks' frees leaked clusters; 'all' also makes reference counts and COPIED flags right",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit status tells")
    parser.add_argument("file", metavar="FILE")
    parser.set_defaults(run=run)


async def run(args: argparse.Namespace) -> int:
    """Check, repair, check again."""
    async with blocklayer.Graph() as graph:
        read_only = args.repair is None
        repairing = {} if read_only else {"repairing": True}
        node = await _open(graph, args, read_only=read_only, **repairing)
        driver = node.driver
        if not isinstance(driver, Qcow2Driver):
            raise FailureError("This image format does not support checks", status=EXIT_UNSUPPORTED)
        result, fixed = await driver.check(), (0, 0)
        _describe(result)
        if args.repair is not None:
            fixed = await _repair(driver, result, args)
            if any(fixed):
                result = await driver.check()
    if not args.quiet:
        print(dump_json(_facts(args.file, result, fixed)) if args.output == "json" else _as_text(result))
    return EXIT_CORRUPT if result.corruptions else EXIT_LEAKS if result.leaks.count else 0


async def _open(
    graph: blocklayer.Graph, args: argparse.Namespace, *, read_only: bool, **options: object
) -> blocklayer.Node:
    """The image alone, without its backing file."""
    try:
        return await open_image(
            graph, args.file, args, format=args.source_format, read_only=read_only, backing=None, **options
        )
    except blocklayer.OptionError:
        if not options:
            raise
        return await _open(graph, args, read_only=read_only)  # a format that knows no repair


def _describe(result: CheckResult) -> None:
    def tell(findings: Findings, word: str) -> None:
        for finding in findings.described:
            cluster = finding.offset >> result.header.cluster_bits
            print(f"{word} cluster {cluster} (at {finding.offset:#x}): {finding.text}", file=sys.stderr)
        if hidden := findings.count - len(findings.described):
            print(f"{word}: {hidden} more", file=sys.stderr)

    tell(result.broken, "ERROR")
    tell(result.counts, "ERROR")
    tell(result.leaks, "Leaked")


async def _repair(driver: Qcow2Driver, result: CheckResult, args: argparse.Namespace) -> tuple[int, int]:
    """Leaks and corruptions that were repaired."""
    try:
        fixed = await driver.repair(result, leaks_only=args.repair == "leaks")
    except blocklayer.CorruptImageError as error:
        print(f"blocklayer: nothing was repaired: {error}", file=sys.stderr)
        return 0, 0
    if any(fixed) and args.output == "human" and not args.quiet:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {fixed[0]} leaked clusters\n    {fixed[1]} corruptions\n")
        print("Double checking the fixed image now...")
    return fixed


def _facts(name: str, result: CheckResult, fixed: tuple[int, int]) -> dict[str, object]:
    """Keys as in QEMU's ImageCheck: counts only where there is something."""
    counts = {
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
        "corruptions": result.corruptions,
        "leaks": result.leaks.count,
        "corruptions-fixed": fixed[1],
        "leaks-fixed": fixed[0],
    }
    used = {key: count for key, count in counts.items() if count}
    return {"filename": name, "format": "qcow2", "check-errors": 0, **used}


def _as_text(result: CheckResult) -> str:
    lines = []
    if result.corruptions:
        lines += ["", f"{result.corruptions} errors were found on the image."]
        lines += ["Data may be corrupted, or further writes to the image may corrupt it."]
    if result.leaks.count:
        lines += ["", f"{result.leaks.count} leaked clusters were found on the image."]
        lines += ["This means waste of disk space, but no harm to data."]
    if result.is_clean:
        lines.append("No errors were found on the image.")
    total, used = result.total_clusters, result.allocated_clusters
    if total and used:
        lines.append(
            f"{used}/{total} = {used * 100 / total:.2f}% allocated, {result.fragmented_clusters * 100 / used:.2f}% fragmented,"
            f" {result.compressed_clusters * 100 / used:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    return "\n".join(lines)
