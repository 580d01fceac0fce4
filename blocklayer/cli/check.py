"""``blocklayer check``: whether an image's metadata are sound; exit statuses as qemu-img check's.

0 clean, 1 the check could not be done, 2 corruptions, 3 leaked clusters only, 63 the format has no check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import blocklayer
from blocklayer.cli.common import FailureError, add_output_argument, add_source_arguments, dump_json, open_image

if TYPE_CHECKING:
    import argparse

EXIT_CORRUPT, EXIT_LEAKS, EXIT_UNSUPPORTED = 2, 3, 63


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Arguments."""
    parser = commands.add_parser("check", help="whether an image's metadata are sound")
    add_source_arguments(parser)
    add_output_argument(parser)
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("file")
    parser.set_defaults(run=run)


async def run(args: argparse.Namespace) -> int:
    """Check."""
    async with blocklayer.Graph() as graph:
        node = await open_image(graph, args.file, args, format=args.source_format, backing=None)
        run_check = getattr(node.driver, "check", None)
        if run_check is None:
            raise FailureError("This image format does not support checks", status=EXIT_UNSUPPORTED)
        result = await run_check()
    corruptions, leaks = result.corruptions, result.leaks.count
    if args.output == "json":
        facts = {
            "filename": args.file,
            "format": "qcow2",
            "check-errors": 0,
            "image-end-offset": result.image_end_offset,
        }
        facts |= {"total-clusters": result.total_clusters, "allocated-clusters": result.allocated_clusters}
        facts |= {"fragmented-clusters": result.fragmented_clusters, "compressed-clusters": result.compressed_clusters}
        facts |= {key: count for key, count in (("corruptions", corruptions), ("leaks", leaks)) if count}
        print(dump_json(facts))
    elif not args.quiet:
        if corruptions:
            print(
                f"{corruptions} errors were found on the image.\nData may be corrupted, or further writes may corrupt it."
            )
        if leaks:
            print(
                f"{leaks} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data."
            )
        if result.is_clean:
            print("No errors were found on the image.")
    return EXIT_CORRUPT if corruptions else EXIT_LEAKS if leaks else 0
