"""A disk that forgets: writes vanish, reads give zeroes. For tests and measurements.

Options: ``size`` (default 1 GiB); ``latency_ns``: how long each request takes; ``read_zeroes``: whether block status
tells that everything is zero (reads give zeroes in any case).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocklayer.aio.clock import Clock, MonotonicClock
from blocklayer.base.buffers import fill_zero
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.base.options import Options, build
from blocklayer.base.units import GIB
from blocklayer.graph.driver import Driver

if TYPE_CHECKING:
    from typing import Self

    from blocklayer.graph.opener import Opener


@dataclass(frozen=True, slots=True)
class NullOptions:
    """See the module's text."""

    size: int = GIB
    latency_ns: int = 0
    read_zeroes: bool = False


class NullDriver(Driver):
    """Nothing behind it."""

    name = "null-co"
    handles_fua = True
    zero_init = True

    def __init__(self, options: NullOptions, *, clock: Clock | None = None) -> None:
        """``clock`` makes latency; tests pass their own."""
        self._options = options
        self._clock = clock or MonotonicClock()

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:  # noqa: ARG003 - there is nothing to open
        """See ``NullOptions``."""
        return cls(build(NullOptions, options))

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._options.size

    async def _wait(self) -> None:
        if self._options.latency_ns:
            await self._clock.sleep(self._options.latency_ns / 1e9)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:  # noqa: ARG002 - all places are alike
        """Zeroes, at once if there is no latency to wait for."""
        if self._options.latency_ns:
            return False
        fill_zero(buffer)
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Zeroes."""
        await self._wait()
        fill_zero(buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Forget ``data``."""
        await self._wait()

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """It is zero."""
        await self._wait()

    async def flush(self) -> None:
        """Nothing to lose."""
        await self._wait()

    async def block_status(self, offset: int, length: int) -> Extent:
        """Zero if it is told to say so, else data."""
        return Extent(offset, length, ExtentKind.ZERO if self._options.read_zeroes else ExtentKind.DATA)
