"""``blocklayer map``: where the data of a chain lie; output as qemu-img map's, human and JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import blocklayer
from blocklayer.base.units import parse_size
from blocklayer.cli.common import FailureError, add_output_argument, add_source_arguments, open_image

if TYPE_CHECKING:
    import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Arguments."""
    parser = commands.add_parser("map", help="where the data of an image lie")
    add_source_arguments(parser)
    add_output_argument(parser)
    parser.add_argument("-s", "--start-offset", type=parse_size, default=0, metavar="OFFSET")
    parser.add_argument("-l", "--max-length", type=parse_size, default=None, metavar="LENGTH")
    parser.add_argument("file")
    parser.set_defaults(run=run)


async def run(args: argparse.Namespace) -> int:
    """Print it."""
    async with blocklayer.Graph() as graph:
        node = await open_image(graph, args.file, args, format=args.source_format)
        length = max(0, node.size - args.start_offset)
        if args.max_length is not None:
            length = min(length, args.max_length)
        extents = [extent async for extent in node.extents(args.start_offset, length)] if length else []
        names = {name: each.filename or name for name, each in graph.nodes.items()}
    if args.output == "json":
        print("[" + ",\n".join("{ " + json.dumps(as_record(extent))[1:] for extent in extents) + "]")
        return 0
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}{'File'}")
    for extent in extents:
        if extent.kind is not blocklayer.ExtentKind.DATA:
            continue
        if extent.host_offset is None:
            raise FailureError("File contains external, encrypted or compressed clusters; use --output json")
        file = names.get(extent.host_node or "", "")
        numbers = (extent.offset, extent.length, extent.host_offset)
        print("".join(f"{as_hex(number):<16}" for number in numbers) + file)
    return 0


def as_hex(number: int) -> str:
    """As C's %#x prints: zero has no prefix."""
    return hex(number) if number else "0"


def as_record(extent: blocklayer.Extent) -> dict[str, object]:
    """Keys and order as in qemu-img's JSON."""
    is_data = extent.kind is blocklayer.ExtentKind.DATA
    has_room = extent.host_offset is not None
    record: dict[str, object] = {
        "start": extent.offset,
        "length": extent.length,
        "depth": extent.depth,
        "present": extent.present,
        "zero": not is_data,
        "data": is_data,
    }
    if has_room:
        record["offset"] = extent.host_offset
    return record
