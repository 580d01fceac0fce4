"""The NBD driver: a disk that a server exports, as a node.

What the server can do decides what the driver does: no FUA, then the request path flushes; no WRITE_ZEROES, then zeroes
are written; no TRIM, then a discard is dropped; no ``base:allocation``, then everything counts as data.

Invariants
- All connections see the same export: one that comes back with another size or with fewer abilities is not used.
- There is more than one connection only if the server says that a flush on one covers what was written on all.

Source: NBD, "Transmission flags", "Block size constraints", "base:allocation metadata context".
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import AccessDeniedError, BlockError, IOFailedError, UnsupportedError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.limits import ZEROES_MAX, BlockLimits
from blocklayer.base.modes import WriteFlags
from blocklayer.base.ranges import align_down, align_up
from blocklayer.base.units import MIB
from blocklayer.codec.nbd.client_handshake import RemoteExport, Wish
from blocklayer.codec.nbd.protocol import (
    BASE_ALLOCATION,
    AllocationState,
    Command,
    CommandFlags,
    TlsMode,
    TransmissionFlags,
)
from blocklayer.drivers.nbd.connection import Connection
from blocklayer.drivers.nbd.link import Link
from blocklayer.drivers.nbd.options import NbdOptions, Place, parse, place_of
from blocklayer.graph.driver import Driver

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from blocklayer.base.options import Options
    from blocklayer.graph.opener import Opener

TRANSFER_MAX: Final = 32 * MIB
"""What every server takes unless it says otherwise."""

STATUS_MAX: Final = 1 << 31
"""Longest range that block status asks about: compact requests have lengths of 32 bits."""

_ZERO = int(AllocationState.ZERO)


class NbdDriver(Driver):
    """Made by ``open``."""

    name = "nbd"
    schemes = ("nbd", "nbds", "nbd+unix", "nbds+unix")

    def __init__(self, place: Place, options: NbdOptions, first: Connection) -> None:
        """``first`` is open; the others come with ``_open_more``."""
        self._place = place
        self._options = options
        self._export = first.export
        self._flags = first.export.flags
        self._has_status = BASE_ALLOCATION in first.export.contexts.values()
        self.limits = limits_of(first.export)
        self.handles_fua = TransmissionFlags.SEND_FUA in self._flags
        self._size = align_down(first.export.size, self.limits.request_alignment)
        self._links = [self._link(first)]
        self._turn = 0

    # -- life ----------------------------------------------------------------------------------------------------

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """See ``NbdOptions``. Raises what ``Connection.open`` raises, and ``AccessDeniedError`` for a read-only export."""
        wanted = parse(options)
        place = place_of(wanted)
        self = cls(place, wanted, await _dial(place, wanted))
        try:
            if TransmissionFlags.READ_ONLY in self._flags and not opener.read_only:
                if not opener.options.auto_read_only:
                    text = "the server exports it read-only; open it with read_only=True, or auto_read_only=True"
                    raise AccessDeniedError(text, errno=errno.EROFS, filename=str(place))
                opener.options = replace(opener.options, read_only=True)
            if TransmissionFlags.CAN_MULTI_CONN in self._flags:
                while len(self._links) < wanted.connections:
                    self._links.append(self._link(await self._dial_again()))
        except BaseException:
            await self.close()
            raise
        return self

    def _link(self, connection: Connection) -> Link:
        return Link(connection, self._dial_again, delay_s=self._options.reconnect_delay)

    async def _dial_again(self) -> Connection:
        """A connection to the same export as the first one."""
        connection = await _dial(self._place, self._options)
        try:
            check_same(self._export, connection.export)
        except BlockError:
            await connection.close()
            raise
        return connection

    async def close(self) -> None:
        """Take leave on each connection."""
        for link in self._links:
            await link.close()

    @property
    def size(self) -> int:
        """Bytes of the export; a tail that is shorter than the smallest block cannot be reached."""
        return self._size

    async def info(self) -> Mapping[str, object]:
        """What was agreed on."""
        export = self._export
        shape = "extended" if export.extended else "structured" if export.structured else "simple"
        return {
            "uri": str(self._place),
            "replies": shape,
            "tls": export.tls,
            "read-only": TransmissionFlags.READ_ONLY in self._flags,
            "connections": len(self._links),
        }

    def _next(self) -> Link:
        self._turn = (self._turn + 1) % len(self._links)
        return self._links[self._turn]

    # -- requests ------------------------------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """READ, straight into ``buffer``."""
        await self._next().run(lambda connection: connection.read_into(offset, buffer))

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """WRITE, straight from ``data``."""
        fua = self.handles_fua and WriteFlags.FUA in flags
        await self._next().run(lambda connection: connection.write(offset, data, fua=fua))

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """WRITE_ZEROES; NO_FALLBACK is FAST_ZERO, which not every server has."""
        if TransmissionFlags.SEND_WRITE_ZEROES not in self._flags:
            await super().write_zeroes(offset, length, flags)
            return
        wire = CommandFlags(0)
        if WriteFlags.NO_FALLBACK in flags:
            if TransmissionFlags.SEND_FAST_ZERO not in self._flags:
                text = "the server does not tell whether it has a fast way to write zeroes"
                raise UnsupportedError(text, offset=offset, length=length)
            wire |= CommandFlags.FAST_ZERO
        if WriteFlags.MAY_UNMAP not in flags:
            wire |= CommandFlags.NO_HOLE
        if self.handles_fua and WriteFlags.FUA in flags:
            wire |= CommandFlags.FUA
        await self._command(Command.WRITE_ZEROES, offset, length, wire)

    async def discard(self, offset: int, length: int) -> None:
        """TRIM, if the server has it."""
        if TransmissionFlags.SEND_TRIM in self._flags:
            await self._command(Command.TRIM, offset, length)

    async def flush(self) -> None:
        """FLUSH, on one connection for all; a server without it has nothing to flush."""
        if TransmissionFlags.SEND_FLUSH in self._flags and TransmissionFlags.READ_ONLY not in self._flags:
            await self._command(Command.FLUSH)

    async def _command(self, command: Command, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        await self._next().run(lambda connection: connection.command(command, offset, length, flags))

    async def block_status(self, offset: int, length: int) -> Extent:
        """By ``base:allocation``: zero where the server says so, else data."""
        if not self._has_status:
            return Extent(offset, length, ExtentKind.DATA)
        unit = self.limits.request_alignment
        start = align_down(offset, unit)
        end = min(align_up(offset + length, unit), self._size, start + STATUS_MAX)
        status = await self._next().run(lambda connection: connection.block_status(start, end - start, one=True))
        (told,) = status.values()
        ((run, flags),) = told.extents
        kind = ExtentKind.ZERO if flags & _ZERO else ExtentKind.DATA
        return Extent(start, run, kind).clipped(offset, length)


async def _dial(place: Place, options: NbdOptions) -> Connection:
    tls = TlsMode.OFF if place.tls is None else TlsMode.REQUIRE
    wish = Wish(place.export, tls=tls, contexts=(BASE_ALLOCATION,))
    return await Connection.open(
        place.address,
        wish,
        place.tls,
        place.hostname,
        open_timeout_s=options.open_timeout,
        request_timeout_s=options.request_timeout,
    )


def limits_of(export: RemoteExport) -> BlockLimits:
    """The server's block sizes as limits. Zeroes and discards carry no data, but only extended requests say so."""
    unit = export.minimum
    longest = max(unit, align_down(min(export.maximum, ZEROES_MAX), unit))
    return BlockLimits(
        request_alignment=unit,
        transfer_max=max(unit, align_down(min(export.maximum, TRANSFER_MAX), unit)),
        zeroes_max=ZEROES_MAX if export.extended else longest,
    )


def check_same(before: RemoteExport, now: RemoteExport) -> None:
    """Raise ``IOFailedError`` if an export is not what it was, so that what relies on it would break."""
    if now.size != before.size:
        raise IOFailedError(f"the export has now {now.size} bytes; it had {before.size}", errno=errno.ESTALE)
    ours = before.flags & ~TransmissionFlags.CAN_MULTI_CONN
    if missing := ours & ~now.flags:
        raise IOFailedError(f"the export has lost abilities: {missing!r}", errno=errno.ESTALE)
    if TransmissionFlags.READ_ONLY in now.flags & ~before.flags:
        raise IOFailedError("the export is now read-only", errno=errno.ESTALE)
    if now.minimum > before.minimum or now.maximum < before.maximum or now.extended < before.extended:
        raise IOFailedError("the export now takes other requests than before", errno=errno.ESTALE)
    if set(now.contexts.values()) != set(before.contexts.values()):
        raise IOFailedError("the export now has other metadata contexts", errno=errno.ESTALE)
