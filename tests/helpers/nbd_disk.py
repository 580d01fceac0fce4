"""A disk that is no node: bytes in memory, and a script that sees each request, for tests of the NBD server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.modes import WriteFlags

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Script = Callable[[str, int, int], Awaitable[None]]

UNIT = 4096


class PaperDisk:
    """Units of 4 KiB that hold only zeroes are holes. ``script(kind, offset, length)`` may wait, or raise.

    ``spot``: reads can be answered at once. ``log`` holds kind, offset, length and flags of what was asked.
    """

    def __init__(self, size: int = 1 << 20, *, read_only: bool = False, spot: bool = False) -> None:
        """Zeroes."""
        self.bytes = bytearray(size)
        self.read_only = read_only
        self.spot = spot
        self.script: Script | None = None
        self.log: list[tuple[object, ...]] = []

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.bytes)

    async def _step(self, kind: str, offset: int = 0, length: int = 0, flags: WriteFlags = WriteFlags.NONE) -> None:
        self.log.append((kind, offset, length, flags))
        if self.script is not None:
            await self.script(kind, offset, length)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """As ``spot`` says."""
        if self.spot:
            buffer[:] = self.bytes[offset : offset + len(buffer)]
        return self.spot

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy."""
        await self._step("read", offset, len(buffer))
        buffer[:] = self.bytes[offset : offset + len(buffer)]

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Copy."""
        await self._step("write", offset, len(data), flags)
        self.bytes[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero."""
        await self._step("write_zeroes", offset, length, flags)
        self.bytes[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        """Zero."""
        await self._step("discard", offset, length)
        self.bytes[offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        """Only logged."""
        await self._step("flush")

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """One for each unit, not joined."""
        await self._step("extents", offset, length)
        at, end = offset, offset + length
        while at < end:
            stop = min(end, at - at % UNIT + UNIT)
            start = at - at % UNIT
            unit = self.bytes[start : start + UNIT]
            kind = ExtentKind.ZERO if unit.count(0) == len(unit) else ExtentKind.DATA
            yield Extent(at, stop - at, kind)
            at = stop
