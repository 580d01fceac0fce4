"""A request under way on one NBD connection: what it still needs before its caller may go on.

Two things have to happen, in any order: the reply comes to its end, and the channel has done with the data. Then
``future`` gets the error or None. A reply is believed only if it is whole: each byte of a read once, no more and no less.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from blocklayer.base.buffers import fill_zero
from blocklayer.base.errors import BlockError, ProtocolError
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd.errors_map import from_wire
from blocklayer.codec.nbd.protocol import Command, CommandFlags, ReplyType
from blocklayer.codec.nbd.transmission import Chunk, Request, check_content

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Container

PIECES_MAX: Final = 1 << 16
"""Separate pieces in which a read may arrive: one for every 512 bytes of the longest read."""

_ACTIONS: Final[dict[int, str]] = {
    Command.READ: "read",
    Command.WRITE: "write",
    Command.FLUSH: "flush",
    Command.TRIM: "discard",
    Command.WRITE_ZEROES: "write_zeroes",
    Command.BLOCK_STATUS: "block_status",
}


class Pending:
    """A request under way; ``future`` gets its error or None."""

    __slots__ = ("buffer", "error", "future", "pieces", "replied", "request", "sent", "status", "timer", "until_sent")

    def __init__(self, request: Request, buffer: memoryview | None, future: asyncio.Future[BlockError | None]) -> None:
        """``buffer`` is that of a read."""
        self.request = request
        self.buffer = buffer  # of a read; None if nobody wants the bytes
        self.future = future
        self.error: BlockError | None = None  # the first one that the server told
        self.pieces: list[tuple[int, int]] = []  # (start, end) on the disk that have arrived, in order, merged
        self.status: dict[int, payloads.BlockStatus] = {}
        self.replied = False
        self.sent = True  # its data are not needed any more
        self.until_sent: asyncio.Future[None] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def cover(self, offset: int, length: int) -> None:
        """Note that these bytes have arrived. Raises ``ProtocolError`` for bytes that came twice."""
        check_content(offset, length, self.request)
        end, pieces = offset + length, self.pieces
        at = bisect_right(pieces, (offset, end))
        if (at and pieces[at - 1][1] > offset) or (at < len(pieces) and pieces[at][0] < end):
            raise ProtocolError(f"the server sent {offset:#x}+{length} twice in one reply")
        first = last = at
        if at and pieces[at - 1][1] == offset:
            first, offset = at - 1, pieces[at - 1][0]
        if at < len(pieces) and pieces[at][0] == end:
            last, end = at + 1, pieces[at][1]
        pieces[first:last] = [(offset, end)]
        if len(pieces) > PIECES_MAX:
            raise ProtocolError(f"a read is answered in more than {PIECES_MAX} pieces")

    def check_end(self) -> None:
        """Raise ``ProtocolError`` if a reply without an error is not complete."""
        _, _, _, offset, length = self.request
        if self.request.command == Command.READ and self.pieces != [(offset, offset + length)]:
            raise ProtocolError(f"the reply to a read of {offset:#x}+{length} ends before all of it came")
        if self.request.command == Command.BLOCK_STATUS and not self.status:
            raise ProtocolError("a reply to BLOCK_STATUS tells nothing")

    def fail(self, told: payloads.ErrorPayload) -> None:
        """Keep the first error; where the server says where, there, else of all of it."""
        command, _, _, offset, length = self.request
        action = _ACTIONS.get(command, "request")
        if told.offset is None:
            error = from_wire(told.error, action, message=told.message, offset=offset, length=length)
        elif 0 <= told.offset - offset < max(1, length):
            error = from_wire(told.error, action, message=told.message, offset=told.offset)
        else:
            raise ProtocolError(f"an error at {told.offset:#x} answers {offset:#x}+{length}")
        self.error = self.error or error

    def take(self, chunk: Chunk, payload: memoryview, contexts: Container[int]) -> None:
        """A small payload: an error, a hole, or the status that one of ``contexts`` has."""
        request = self.request
        if chunk.is_error:
            self.fail(payloads.parse_error(payload, type=chunk.type))
        elif chunk.type == ReplyType.OFFSET_HOLE:
            offset, length = payloads.parse_hole(payload)
            self.cover(offset, length)
            if self.buffer is not None:
                start = offset - request.offset
                fill_zero(self.buffer[start : start + length])
        else:
            extended = chunk.type == ReplyType.BLOCK_STATUS_EXT
            status = (payloads.parse_block_status_ext if extended else payloads.parse_block_status)(payload)
            if status.context_id not in contexts or status.context_id in self.status:
                raise ProtocolError(f"a status of the context {status.context_id}, which is not due")
            payloads.check_extents(status, request.length, one=bool(request.flags & CommandFlags.REQ_ONE))
            self.status[status.context_id] = status

    def finish(self) -> None:
        """Tell the caller, if there is an answer and the data are not needed."""
        if self.replied and self.sent and not self.future.done():
            self.future.set_result(self.error)

    def release(self) -> None:
        """The channel has done with the data."""
        self.sent = True
        if self.until_sent is not None and not self.until_sent.done():
            self.until_sent.set_result(None)
        self.finish()
