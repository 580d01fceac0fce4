"""A raw client of an NBD server for tests: says exactly the bytes that it is told, and reads replies one by one.

It stands on a socket pair of which the server adopts the other side, or on any connected socket. Nothing here checks
what a server may say beyond the codec's parsers; tests do.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from blocklayer.codec.nbd import options as opt
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd import transmission as wire
from blocklayer.codec.nbd.protocol import Command, HandshakeFlags, Info, Option, OptionReply, ReplyType

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from blocklayer.exports.nbd_server import NbdServer

PATIENCE_S = 20.0
"""A reply that does not come fails the test after this time."""

SHAPES = ["simple", "structured", "extended"]
CLIENT_FLAGS = HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES


class OptionAnswer(NamedTuple):
    """One reply to an option."""

    type: int
    payload: bytes


class Reply(NamedTuple):
    """All that answered one request: its error (0: none), and what its chunks held, in their order."""

    error: int = 0
    message: str = ""
    data: tuple[tuple[int, bytes], ...] = ()
    holes: tuple[tuple[int, int], ...] = ()
    status: tuple[payloads.BlockStatus, ...] = ()

    @property
    def content(self) -> bytes:
        """The bytes of a read, holes filled, from the first chunk on."""
        pieces = [*self.data, *((offset, bytes(length)) for offset, length in self.holes)]
        return b"".join(data for _, data in sorted(pieces))


class RawClient:
    """One connection; ``shape`` is one of ``SHAPES``."""

    def __init__(self, sock: socket.socket, shape: str = "simple") -> None:
        """On a connected socket; nothing is sent."""
        sock.setblocking(False)
        self.sock = sock
        self.shape = shape
        self.extended = shape == "extended"
        self.size = 0
        self.flags = 0
        self.contexts: dict[str, int] = {}
        self._cookie = 100
        self._asked: dict[int, wire.Request] = {}
        self._parts: dict[int, list[Reply]] = {}
        self._done: dict[int, Reply] = {}

    def close(self) -> None:
        """Vanish."""
        self.sock.close()

    # -- bytes ---------------------------------------------------------------------------------------------------

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """All of it."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            await loop.sock_sendall(self.sock, data)

    async def receive(self, length: int) -> bytes:
        """Exactly so many bytes; ``EOFError`` if the server hung up before."""
        loop, data = asyncio.get_running_loop(), bytearray()
        async with asyncio.timeout(PATIENCE_S):
            while len(data) < length:
                try:
                    piece = await loop.sock_recv(self.sock, length - len(data))
                except ConnectionError:
                    piece = b""
                if not piece:
                    raise EOFError(f"the server hung up behind {bytes(data[:64])!r}")
                data += piece
        return bytes(data)

    async def at_end(self) -> bool:
        """Whether the server hangs up without another byte."""
        try:
            await self.receive(1)
        except EOFError:
            return True
        return False

    # -- handshake -----------------------------------------------------------------------------------------------

    async def greet(self, flags: int = CLIENT_FLAGS) -> None:
        """Read the greeting and answer it."""
        assert await self.receive(18) == opt.pack_greeting(CLIENT_FLAGS)
        await self.send(opt.pack_client_flags(flags))

    async def option(self, option: int, payload: bytes = b"") -> list[OptionAnswer]:
        """All replies to an option."""
        await self.send(opt.pack_option(option, payload))
        return await self.option_replies()

    async def option_replies(self) -> list[OptionAnswer]:
        """Replies up to the final one."""
        answers: list[OptionAnswer] = []
        while True:
            header = opt.parse_option_reply_header(await self.receive(20))
            answers.append(OptionAnswer(header.type, await self.receive(header.length)))
            if header.type == OptionReply.ACK or header.type & (1 << 31):
                return answers

    async def negotiate(self, name: str = "disk", *, contexts: Sequence[str] = ()) -> None:
        """Greeting, shape, contexts; everything but GO."""
        await self.greet()
        if self.shape != "simple":
            option = Option.EXTENDED_HEADERS if self.extended else Option.STRUCTURED_REPLY
            assert await self.option(option) == [(OptionReply.ACK, b"")]
        if contexts:
            await self.choose(name, contexts)

    async def choose(self, name: str, contexts: Sequence[str]) -> None:
        """SET_META_CONTEXT."""
        answers = await self.option(Option.SET_META_CONTEXT, opt.pack_meta_request(name, contexts))
        assert answers[-1].type == OptionReply.ACK
        found = [opt.parse_meta_context(answer.payload) for answer in answers[:-1]]
        self.contexts = {context.name: context.context_id for context in found}

    async def go(self, name: str = "disk", *, contexts: Sequence[str] = ()) -> RawClient:
        """The whole handshake."""
        await self.negotiate(name, contexts=contexts)
        answers = await self.option(Option.GO, opt.pack_info_request(name, []))
        assert [answer.type for answer in answers] == [OptionReply.INFO, OptionReply.ACK], answers
        info = opt.parse_info(answers[0].payload)
        assert isinstance(info, opt.ExportInfo)
        assert answers[0].payload[:2] == Info.EXPORT.to_bytes(2, "big")
        self.size, self.flags = info
        return self

    # -- requests ------------------------------------------------------------------------------------------------

    def pack(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"", cookie: int = -1
    ) -> bytes:
        """A request with its payload; its cookie is ``last`` afterwards."""
        self._cookie += 1
        cookie = self._cookie if cookie < 0 else cookie
        self.last = cookie
        length = length or len(payload)
        self._asked[cookie] = wire.Request(command, flags, cookie, offset, length)
        return wire.pack_request(command, flags, cookie, offset, length, extended=self.extended) + payload

    async def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request; answers its cookie."""
        data = self.pack(command, offset, length, flags=flags, payload=payload)
        cookie = self.last
        await self.send(data)
        return cookie

    async def request(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b""
    ) -> Reply:
        """Send a request and read its reply."""
        return await self.reply(await self.ask(command, offset, length, flags=flags, payload=payload))

    async def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """The bytes of a read, which must not fail."""
        reply = await self.request(Command.READ, offset, length, flags=flags)
        assert not reply.error, reply
        return reply.content

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Must not fail."""
        assert await self.request(Command.WRITE, offset, flags=flags, payload=data) == Reply()

    async def leave(self) -> None:
        """DISC, upon which the server hangs up without a word."""
        await self.send(self.pack(Command.DISC))
        assert await self.at_end()
        self.close()

    async def reply(self, cookie: int) -> Reply:
        """The reply to one request; those to others are kept."""
        while cookie not in self._done:
            await self._read_chunk()
        return self._done.pop(cookie)

    async def _read_chunk(self) -> None:
        head = await self.receive(16)
        chunk = None
        structured = self.shape != "simple"
        while chunk is None:
            chunk = wire.parse_chunk(head, 0, structured=structured, extended=self.extended)
            if chunk is None:
                head += await self.receive((32 if self.extended else 20) - len(head))
        request = self._asked[chunk.cookie]
        wire.check_answer(chunk, request, structured=structured)
        self._parts.setdefault(chunk.cookie, []).append(await self._content(chunk, request))
        if chunk.done:
            parts = self._parts.pop(chunk.cookie)
            del self._asked[chunk.cookie]
            error = next((part for part in parts if part.error), Reply())
            self._done[chunk.cookie] = Reply(
                error.error,
                error.message,
                tuple(piece for part in parts for piece in part.data),
                tuple(hole for part in parts for hole in part.holes),
                tuple(status for part in parts for status in part.status),
            )

    async def _content(self, chunk: wire.Chunk, request: wire.Request) -> Reply:
        if chunk.kind is wire.ReplyKind.SIMPLE:
            if chunk.error or request.command != Command.READ or not request.length:
                return Reply(chunk.error)
            return Reply(data=((request.offset, await self.receive(request.length)),))
        payload = await self.receive(chunk.length)
        if chunk.is_error:
            error = payloads.parse_error(payload, type=chunk.type)
            return Reply(error.error, error.message)
        if chunk.type == ReplyType.OFFSET_DATA:
            offset = payloads.parse_data_offset(payload)
            wire.check_content(offset, len(payload) - 8, request)
            return Reply(data=((offset, payload[8:]),))
        if chunk.type == ReplyType.OFFSET_HOLE:
            wire.check_content(*payloads.parse_hole(payload), request)
            return Reply(holes=(payloads.parse_hole(payload),))
        if chunk.type == ReplyType.BLOCK_STATUS:
            return Reply(status=(payloads.parse_block_status(payload),))
        if chunk.type == ReplyType.BLOCK_STATUS_EXT:
            return Reply(status=(payloads.parse_block_status_ext(payload),))
        return Reply()


def raw_client(server: NbdServer, shape: str = "simple", *, buffer: int = 0) -> RawClient:
    """A client that is connected and has said nothing; ``buffer``: bytes that the sockets hold (0: the system's)."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    server.adopt(theirs)
    return RawClient(ours, shape)


@asynccontextmanager
async def connected(
    server: NbdServer, shape: str = "simple", name: str = "disk", *, contexts: Sequence[str] = (), buffer: int = 0
) -> AsyncIterator[RawClient]:
    """A client in its transmission phase, whose socket is closed at the end."""
    client = raw_client(server, shape, buffer=buffer)
    try:
        yield await client.go(name, contexts=contexts)
    finally:
        client.close()


async def until_clients(server: NbdServer, count: int = 0) -> None:
    """Wait until so many clients are connected."""
    async with asyncio.timeout(PATIENCE_S):
        while server.connections != count:
            await asyncio.sleep(0.001)


class Leftovers:
    """What a process has now: tasks and descriptors; ``assert_none`` says that nothing was added since."""

    def __init__(self) -> None:
        """In the event loop."""
        self.tasks = asyncio.all_tasks()
        self.descriptors = self._descriptors()

    @staticmethod
    def _descriptors() -> dict[str, str]:
        found: dict[str, str] = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                found[name] = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue
        return found

    def assert_none(self) -> None:
        """Whatever is new has gone."""
        assert asyncio.all_tasks() - self.tasks - {asyncio.current_task()} == set()
        now = self._descriptors()
        assert {name: now[name] for name in now if self.descriptors.get(name) != now[name]} == {}
