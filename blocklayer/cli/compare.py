"""``blocklayer compare``: whether two images hold the same; options, texts and exit statuses as qemu-img compare's.

0 identical, 1 different (or wrong usage), 2 cannot be opened, 3 block status failed, 4 reading failed.
Of two images of different sizes the longer one must hold zeroes behind the other's end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import blocklayer
from blocklayer.base.buffers import is_zero
from blocklayer.base.ranges import align_down
from blocklayer.base.units import MIB, SECTOR
from blocklayer.cli.common import add_cache_argument, add_source_arguments, open_image, virtual_size
from blocklayer.cli.parser import FailureError

if TYPE_CHECKING:
    import argparse

PIECE = 2 * MIB
PROGRESS_STEP = 2.0
"""Percent between two lines of progress."""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add_source_arguments(parser)
    add_cache_argument(parser, "-T", "--cache")
    parser.add_argument("-F", "--second-format", metavar="FMT", help="format of the second image")
    parser.add_argument("-s", "--strict", action="store_true", help="also compare sizes and allocation")
    parser.add_argument("-p", "--progress", action="store_true", help="show how far it is")
    parser.add_argument("-q", "--quiet", action="store_true", help="only the exit status tells")
    parser.add_argument("file1", metavar="FILE1")
    parser.add_argument("file2", metavar="FILE2")
    parser.set_defaults(run=run, error_status=2)


async def run(args: argparse.Namespace) -> int:
    """Compare."""
    async with blocklayer.Graph() as graph:
        first = await open_image(graph, args.file1, args, format=args.source_format)
        second = await open_image(graph, args.file2, args, format=args.second_format)
        comparison = Comparison(first, second, args)
        verdict = await comparison.run()
    comparison.say(verdict or "Images are identical.")
    if comparison.shows_progress:
        print()
    return 1 if verdict else 0


class Comparison:
    """Goes through both images from front to back."""

    def __init__(self, first: blocklayer.Node, second: blocklayer.Node, args: argparse.Namespace) -> None:
        """Nothing is read before ``run``."""
        self._first = first
        self._second = second
        self._strict = args.strict
        self._quiet = args.quiet
        self.shows_progress = args.progress and not args.quiet
        self._total = max(virtual_size(first), virtual_size(second))
        self._shown = -PROGRESS_STEP

    def say(self, text: str) -> None:
        """Print, unless asked to be quiet."""
        if not self._quiet:
            print(text)

    async def run(self) -> str | None:
        """What differs, or None."""
        self._progress(0)
        sizes = virtual_size(self._first), virtual_size(self._second)
        if sizes[0] != sizes[1] and self._strict:
            return "Strict mode: Image size mismatch!"
        common = min(self._first.size, self._second.size)
        offset = 0
        while offset < common:
            ours = await _status(self._first, offset, common - offset)
            theirs = await _status(self._second, offset, common - offset)
            if self._strict and _facts(ours) != _facts(theirs):
                return f"Strict mode: Offset {offset} block status mismatch!"
            length = min(ours.length, theirs.length)
            if not (ours.is_zero and theirs.is_zero):
                length = min(length, PIECE)
                at = await self._difference(offset, length, ours_zero=ours.is_zero, theirs_zero=theirs.is_zero)
                if at is not None:
                    return f"Content mismatch at offset {at}!"
            offset += length
            self._progress(offset)
        if sizes[0] != sizes[1]:
            self.say("Warning: Image size mismatch!")
        return await self._rest(common)

    async def _rest(self, offset: int) -> str | None:
        """The longer image behind the other's end."""
        longer = self._first if self._first.size > self._second.size else self._second
        while offset < longer.size:
            status = await _status(longer, offset, longer.size - offset)
            length = status.length if status.is_zero else min(status.length, PIECE)
            at = None if status.is_zero else _first_data(await _read(longer, offset, length))
            if at is not None:
                return f"Content mismatch at offset {offset + at}!"
            offset += length
            self._progress(offset)
        return None

    async def _difference(self, offset: int, length: int, *, ours_zero: bool, theirs_zero: bool) -> int | None:
        """Offset of the first sector that differs, or None."""
        if ours_zero or theirs_zero:
            at = _first_data(await _read(self._second if ours_zero else self._first, offset, length))
        else:
            at = _first_difference(await _read(self._first, offset, length), await _read(self._second, offset, length))
        return None if at is None else offset + at

    def _progress(self, done: int) -> None:
        percent = done * 100 / self._total if self._total else 0
        if self.shows_progress and (percent - self._shown >= PROGRESS_STEP or percent == 100 > self._shown):  # noqa: PLR2004 - percent
            self._shown = percent
            print(f"    ({percent:.2f}/100%)", end="\r", flush=True)


def _facts(status: blocklayer.Extent) -> tuple[object, ...]:
    """What strict mode compares."""
    return status.kind, status.present, status.host_offset is not None


async def _status(node: blocklayer.Node, offset: int, length: int) -> blocklayer.Extent:
    try:
        return await node.block_status(offset, length)
    except (blocklayer.IOFailedError, blocklayer.ImageError) as error:
        raise FailureError(f"Sector allocation test failed: {node.filename}: {error}", status=3) from None


async def _read(node: blocklayer.Node, offset: int, length: int) -> bytes:
    try:
        return await node.read(offset, length)
    except (blocklayer.IOFailedError, blocklayer.ImageError) as error:
        raise FailureError(f"Error while reading offset {offset} of {node.filename}: {error}", status=4) from None


def _first_data(data: bytes) -> int | None:
    """Offset of the first sector that is not zero."""
    return None if is_zero(data) else align_down(len(data) - len(data.lstrip(b"\0")), SECTOR)


def _first_difference(ours: bytes, theirs: bytes) -> int | None:
    """Offset of the first sector that differs, by bisection."""
    if ours == theirs:
        return None
    low, high = 0, len(ours)
    while high - low > 1:
        middle = (low + high) // 2
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle
    return align_down(low, SECTOR)
