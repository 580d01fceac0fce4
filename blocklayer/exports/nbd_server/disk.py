"""What can be exported: anything that answers like a ``Node``. The server asks for no more than this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blocklayer.base.extents import Extent
    from blocklayer.base.modes import WriteFlags


class Disk(Protocol):
    """Bytes that can be read and written; offsets and lengths are bytes. Errors are kinds of ``BlockError``."""

    @property
    def size(self) -> int:
        """Bytes that can be read and written."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` at once, or answer False."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` or raise."""

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Write all of ``data``."""

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Make the range read as zeroes."""

    async def discard(self, offset: int, length: int) -> None:
        """The range's content is not needed any more."""

    async def flush(self) -> None:
        """Make completed writes durable."""

    def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """What the range is made of, over all layers."""
