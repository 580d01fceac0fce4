"""Random and mutated bytes thrown at the NBD server: it never hangs, never has an exception, and keeps nothing.

A case is a stream of what a client may say, some of it changed, cut, doubled or replaced by noise, in pieces of random
sizes; the client reads, or does not, and leaves when it likes. Each case depends on its seed alone, up to the kernel's
socket buffers. Behind each batch a well-behaved client is served, and nothing is left over.

The normal run has 300 cases; the long one 50,000, or 25 times BLOCKLAYER_SEEDS if that is set.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import struct
import time

import pytest

from blocklayer.codec.nbd import options as opt
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd.protocol import Command, Option
from blocklayer.codec.nbd.transmission import pack_request
from blocklayer.exports.nbd_server import NbdExport, NbdServer, ServerLimits
from tests.helpers.nbd_client import SHAPES, Leftovers, connected, until_clients
from tests.helpers.nbd_disk import PaperDisk

CASE_S = 20
"""A case takes milliseconds; one that takes so long hangs."""

BATCH = 50
CASES = 300
CASES_LONG = 25 * int(os.environ.get("BLOCKLAYER_SEEDS", "2000"))
SIZE = 1 << 18
EDGES = [0, 1, 27, 28, 512, 4096, SIZE - 1, SIZE, SIZE + 1, 1 << 25, (1 << 25) + 1, 1 << 31, (1 << 32) - 1]
EDGES_64 = [*EDGES, 1 << 32, 1 << 63, (1 << 64) - 1]


def handshake(chance, shape):
    """Options that lead to the transmission phase, with others in between."""
    parts = [opt.pack_client_flags(3)]
    extras = [
        opt.pack_option(Option.LIST), opt.pack_option(99, chance.randbytes(chance.randrange(50))),
        opt.pack_option(Option.INFO, opt.pack_info_request("disk", [0, 1, 2, 3, 99])),
        opt.pack_option(Option.LIST_META_CONTEXT, opt.pack_meta_request("disk", [])), opt.pack_option(Option.STARTTLS),
        opt.pack_option(Option.GO, opt.pack_info_request("missing", [])),
        opt.pack_option(Option.SET_META_CONTEXT, chance.randbytes(chance.randrange(40))),
    ]  # fmt: skip
    parts += chance.sample(extras, chance.randrange(3))
    if shape != "simple":
        parts.append(opt.pack_option(Option.EXTENDED_HEADERS if shape == "extended" else Option.STRUCTURED_REPLY))
        contexts = ["base:allocation", "qemu:allocation-depth"][: chance.randrange(3)]
        parts.append(opt.pack_option(Option.SET_META_CONTEXT, opt.pack_meta_request("disk", contexts)))
    parts.append(opt.pack_option(Option.GO, opt.pack_info_request("disk", [3])))
    return parts


def requests(chance, shape):
    """Requests with numbers from the edges of what there is, payloads of which some are too short or too long."""
    extended = shape == "extended"
    parts = []
    for cookie in range(chance.randrange(60)):
        command = chance.choice([*Command, *Command, 8, 9, 0xFFFF])
        if command == Command.DISC and chance.random() < 0.8:
            command = Command.READ
        offset, length, flags = chance.randrange(SIZE - 9000), chance.randrange(9000), chance.choice([0, 0, 0, 1])
        if chance.random() < 0.3:
            offset = chance.choice(EDGES_64)
        if chance.random() < 0.3:
            length = chance.choice(EDGES_64 if extended else EDGES)
        if chance.random() < 0.2:
            flags = chance.choice([4, 8, chance.randrange(64), chance.randrange(1 << 16)])
        payload = b""
        if command == Command.WRITE or (extended and flags & 32):
            if length > 200_000 and chance.random() < 0.9:
                length = chance.randrange(5000)
            payload = chance.randbytes(min(length, 300_000))
            if command == Command.BLOCK_STATUS and chance.random() < 0.7:
                payload = payloads.pack_filter(chance.choice(EDGES_64), chance.sample(range(4), chance.randrange(4)))
                length = len(payload)
        parts.append(pack_request(command, flags, cookie, offset, length, extended=extended) + payload)
    return parts


def mutated(chance, parts):
    """Some of the parts changed."""
    parts = list(parts)
    for _ in range(chance.choice([0, 0, 1, 1, 2, 5])):
        if not parts:
            break
        index = chance.randrange(len(parts))
        part = bytearray(parts[index])
        match chance.randrange(6):
            case 0 if part:
                part[chance.randrange(min(len(part), 40))] ^= 1 << chance.randrange(8)
            case 1:
                del part[chance.randrange(len(part) + 1) :]
            case 2:
                part += chance.randbytes(chance.randrange(100))
            case 3:
                part = bytearray(chance.randbytes(chance.randrange(200)))
            case 4 if len(part) >= 16:
                struct.pack_into(">I", part, chance.choice([4, 8, 12]), chance.choice(EDGES))
            case 5:
                parts.insert(index, parts[chance.randrange(len(parts))])
                continue
        parts[index] = bytes(part)
    return b"".join(parts)


def stream_of(chance):
    """What a client says in one case."""
    shape = chance.choice(SHAPES)
    match chance.randrange(8):
        case 0:
            return chance.randbytes(chance.choice([1, 20, 300, 100_000]))
        case 1:
            return mutated(chance, handshake(chance, shape))
        case 2:
            return b"".join(handshake(chance, shape)) + chance.randbytes(chance.choice([10, 1000, 500_000]))
        case 3:
            return mutated(chance, [*handshake(chance, shape), *requests(chance, shape)])
        case _:
            return b"".join(handshake(chance, shape)) + mutated(chance, requests(chance, shape))


async def throw(server, seed):
    """One case."""
    chance = random.Random(seed)
    stream = stream_of(chance)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    if chance.random() < 0.3:
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server.adopt(theirs)
    loop = asyncio.get_running_loop()
    reads, half = chance.random() < 0.7, chance.random() < 0.3
    buffer = bytearray(1 << 16)

    async def speak():
        at = 0
        while at < len(stream):
            count = chance.choice([1, 16, 28, 100, 5000, 200_000])
            await loop.sock_sendall(ours, stream[at : at + count])
            at += count
        if half:
            ours.shutdown(socket.SHUT_WR)

    async def listen():
        while await loop.sock_recv_into(ours, buffer):
            pass

    with ours:
        tasks = [asyncio.ensure_future(speak()), *([asyncio.ensure_future(listen())] if reads else [])]
        await asyncio.wait(tasks, timeout=chance.choice([0, 0.002, 0.02]))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def batch(seeds, disk):
    """Some cases, two of them at once, and the judgement behind them."""
    before = Leftovers()
    async with NbdServer(limits=ServerLimits(handshake_s=CASE_S, close_s=CASE_S)) as server:
        server.add(NbdExport("disk", disk, writable=True, allocation_depth=True))
        for seed in range(seeds.start, seeds.stop, 2):
            async with asyncio.timeout(CASE_S):
                await asyncio.gather(*(throw(server, each) for each in (seed, seed + 1)))
                await until_clients(server, 0)
        for shape in SHAPES:
            async with connected(server, shape) as client:
                await client.write(100, b"still here")
                assert await client.read(100, 10) == b"still here"
                await client.leave()
        await until_clients(server, 0)
    before.assert_none()
    assert disk.size == SIZE


def throw_all(cases, caplog, *, first=0):
    caplog.set_level(logging.WARNING)
    started = time.monotonic()
    for start in range(first, first + cases, BATCH):
        disk = PaperDisk(SIZE, spot=bool(start // BATCH % 2))
        seeds = range(start, min(start + BATCH, first + cases))
        asyncio.run(batch(seeds, disk))
        records = [record.getMessage() for record in caplog.records]
        assert records == [], f"seeds {seeds}, after {time.monotonic() - started:.0f} s"


@pytest.mark.parametrize("part", range(3))
def test_noise(part, caplog):
    throw_all(CASES // 3, caplog, first=part * CASES // 3)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(10))
def test_much_noise(part, caplog):
    throw_all(CASES_LONG // 10, caplog, first=CASES + part * CASES_LONG // 10)
