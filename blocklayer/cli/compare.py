"""``blocklayer compare``: whether two images hold the same; options, texts and exit statuses as qemu-img compare's.

0 identical, 1 different, 2 cannot be opened, 3 block status failed, 4 reading failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import blocklayer
from blocklayer.base.buffers import is_zero
from blocklayer.base.units import MIB
from blocklayer.cli.common import FailureError, add_source_arguments, open_image

if TYPE_CHECKING:
    import argparse

PIECE = 2 * MIB


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Arguments."""
    parser = commands.add_parser("compare", help="whether two images hold the same")
    add_source_arguments(parser)
    parser.add_argument("-F", "--second-format", metavar="FMT", help="format of the second image")
    parser.add_argument("-s", "--strict", action="store_true", help="also compare sizes and allocation")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit status tells")
    parser.add_argument("file1")
    parser.add_argument("file2")
    parser.set_defaults(run=run, error_status=2)


async def run(args: argparse.Namespace) -> int:
    """Compare."""
    async with blocklayer.Graph() as graph:
        first = await open_image(graph, args.file1, args, format=args.source_format)
        second = await open_image(graph, args.file2, args, format=args.second_format)
        verdict = await _compare(first, second, args)
    if verdict is not None:
        _say(args, verdict)
        return 1
    _say(args, "Images are identical.")
    return 0


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(text)


async def _compare(first: blocklayer.Node, second: blocklayer.Node, args: argparse.Namespace) -> str | None:
    """What differs, or None."""
    common = min(first.size, second.size)
    if first.size != second.size:
        if args.strict:
            return "Strict mode: Image size mismatch!"
        _say(args, "Warning: Image size mismatch!")
    offset = 0
    while offset < common:
        try:
            ours = await first.block_status(offset, common - offset)
            theirs = await second.block_status(offset, common - offset)
        except blocklayer.IOFailedError as error:
            raise FailureError(f"Sector allocation test failed: {error}", status=3) from None
        length = min(ours.length, theirs.length)
        if args.strict and ours.is_allocated != theirs.is_allocated:
            return f"Strict mode: Offset {offset} block status mismatch!"
        at = await _first_difference(first, second, offset, length, ours.is_zero, theirs.is_zero)
        if at is not None:
            return f"Content mismatch at offset {at}!"
        offset += length
        if args.progress and not args.quiet:
            print(f"    ({offset * 100 / max(common, 1):.2f}/100%)", end="\r", flush=True)
    longer = first if first.size > second.size else second
    async for extent in longer.extents(common):
        at = None if extent.is_zero else await _first_data(longer, extent.offset, extent.length)
        if at is not None:
            return f"Content mismatch at offset {at}!"
    return None


async def _first_difference(
    first: blocklayer.Node, second: blocklayer.Node, offset: int, length: int, ours_zero: bool, theirs_zero: bool
) -> int | None:
    if ours_zero and theirs_zero:
        return None
    if ours_zero or theirs_zero:
        return await _first_data(second if ours_zero else first, offset, length)
    for start in range(offset, offset + length, PIECE):
        count = min(PIECE, offset + length - start)
        ours, theirs = await _read(first, start, count), await _read(second, start, count)
        if ours != theirs:
            return start + _differing_byte(ours, theirs)
    return None


async def _first_data(node: blocklayer.Node, offset: int, length: int) -> int | None:
    for start in range(offset, offset + length, PIECE):
        data = await _read(node, start, min(PIECE, offset + length - start))
        if not is_zero(data):
            return start + len(data) - len(data.lstrip(b"\0"))
    return None


async def _read(node: blocklayer.Node, offset: int, length: int) -> bytes:
    try:
        return await node.read(offset, length)
    except blocklayer.IOFailedError as error:
        raise FailureError(f"Error while reading offset {offset} of {node.filename}: {error}", status=4) from None


def _differing_byte(ours: bytes, theirs: bytes) -> int:
    low, high = 0, len(ours)
    while high - low > 1:
        middle = (low + high) // 2
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle
    return low
