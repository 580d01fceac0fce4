"""``blocklayer map``: where the data of a chain lie; output as qemu-img map's, human and JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import blocklayer
from blocklayer.cli.common import add_output_argument, add_source_arguments, open_image, virtual_size
from blocklayer.cli.parser import FailureError, size

if TYPE_CHECKING:
    import argparse


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add_source_arguments(parser, "--format")
    add_output_argument(parser)
    parser.add_argument("-s", "--start-offset", type=size, default=0, metavar="OFFSET", help="where to start")
    parser.add_argument("-l", "--max-length", type=size, default=None, metavar="LENGTH", help="how far to go")
    parser.add_argument("file", metavar="FILE")
    parser.set_defaults(run=run)


async def run(args: argparse.Namespace) -> int:
    """Print it."""
    async with blocklayer.Graph() as graph:
        node = await open_image(graph, args.file, args, format=args.source_format)
        extents = await _extents(node, args.start_offset, args.max_length)
        names = {name: each.filename or name for name, each in graph.nodes.items()}
    if args.output == "json":
        records = [as_record(extent) for extent in extents] or [nothing(args.start_offset)]
        print("[" + ",\n".join("{ " + json.dumps(record)[1:] for record in records) + "]")
    else:
        _print_table(extents, names)
    return 0


async def _extents(node: blocklayer.Node, start: int, length_max: int | None) -> list[blocklayer.Extent]:
    """The extents of the range that was asked for, as far as the image reaches."""
    end = virtual_size(node) if length_max is None else min(virtual_size(node), start + length_max)
    inside = min(end, node.size)
    extents = [extent async for extent in node.extents(start, inside - start)] if start < inside else []
    behind = max(start, inside)
    if behind < end:  # a raw file that ends within a sector reads as zeroes to the sector's end
        kind = blocklayer.ExtentKind.ZERO
        extents.append(blocklayer.Extent(behind, end - behind, kind, node=node.name, host_offset=behind))
    return extents


def _print_table(extents: list[blocklayer.Extent], names: dict[str, str]) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}{'File'}")
    for extent in extents:
        if extent.kind is not blocklayer.ExtentKind.DATA:
            continue
        if extent.host_offset is None:
            raise FailureError("File contains external, encrypted or compressed clusters; use --output json")
        file = names.get(extent.host_node or "", "")
        numbers = (extent.offset, extent.length, extent.host_offset)
        print("".join(f"{as_hex(number):<16}" for number in numbers) + file)


def as_hex(number: int) -> str:
    """As C's %#x prints: zero has no prefix."""
    return hex(number) if number else "0"


def as_record(extent: blocklayer.Extent) -> dict[str, object]:
    """Keys and order as in qemu-img's JSON."""
    is_zero = extent.is_zero
    record: dict[str, object] = {
        "start": extent.offset,
        "length": extent.length,
        "depth": extent.depth,
        "present": extent.present,
        "zero": is_zero,
        "data": not is_zero or extent.unwritten,
    }
    if extent.host_offset is not None:
        record["offset"] = extent.host_offset
    return record


def nothing(start: int) -> dict[str, object]:
    """What stands for an empty range."""
    return {"start": start, "length": 0, "depth": 0, "present": False, "zero": False, "data": False}
