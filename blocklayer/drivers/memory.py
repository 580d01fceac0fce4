"""A disk in memory: the model of a driver, and the tutorial's example.

Options: ``size`` (bytes, or like "64M").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocklayer.base.buffers import fill_zero
from blocklayer.base.modes import Preallocation, WriteFlags
from blocklayer.base.options import Options, build
from blocklayer.graph.driver import Driver

if TYPE_CHECKING:
    from typing import Self

    from blocklayer.graph.opener import Opener


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """``size`` in bytes."""

    size: int


class MemoryDriver(Driver):
    """Bytes in a bytearray: everything can be answered at once."""

    name = "memory"
    handles_fua = True
    zero_init = True

    def __init__(self, size: int) -> None:
        """A disk of ``size`` zeroes."""
        self._bytes = bytearray(size)

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:  # noqa: ARG003 - there is nothing to open
        """See ``MemoryOptions``."""
        return cls(build(MemoryOptions, options).size)

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return len(self._bytes)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Memory never waits."""
        buffer[:] = memoryview(self._bytes)[offset : offset + len(buffer)]
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As above."""
        self.try_read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:  # noqa: ARG002 - always as durable
        """Copy ``data`` in."""
        self._bytes[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Zero the range."""
        fill_zero(memoryview(self._bytes)[offset : offset + length])

    async def discard(self, offset: int, length: int) -> None:
        """What is discarded reads as zeroes."""
        fill_zero(memoryview(self._bytes)[offset : offset + length])

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        """Cut or extend with zeroes."""
        del self._bytes[size:]
        self._bytes.extend(bytes(size - len(self._bytes)))
