"""Many requests at once on qcow2 images whose file answers each of its requests after a time of its own.

Workers write, zero, discard, compress and read ranges at any byte; no two of them at the same bytes, so that a bytearray
says what each must find, but in the same clusters, tables and refcount blocks all the time. Others flush. Time is
virtual and chance has a seed: a failure repeats itself.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from blocklayer.aio.range_lock import RangeLock
from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import KIB
from tests.helpers.qcow2_disk import assert_sound, memory_graph, new_image
from tests.helpers.virtual_time import run_virtual

SIZE = 300 * KIB + 512
WORKERS = 8
STEPS = 25

LAYOUTS = {
    "plain": ({"cluster_size": 4 * KIB}, {}),
    "tiny": ({"cluster_size": 512}, {"l2-cache-size": 2048, "refcount-cache-size": 2048}),
    "narrow": ({"cluster_size": 1 * KIB, "refcount_bits": 1}, {"refcount-cache-size": 1024}),
    "wide": ({"cluster_size": 512, "refcount_bits": 64}, {"l2-cache-size": 2048}),
    "subclusters": ({"cluster_size": 16 * KIB, "extended_l2": True}, {}),
    "lazy": ({"cluster_size": 4 * KIB, "lazy_refcounts": True}, {}),
    "old": ({"cluster_size": 8 * KIB, "compat": "0.10"}, {}),
    "large": ({}, {"pass-discard-request": False}),
}


class Stress:
    """One image under work; ``model`` is what it holds, as far as nobody works there."""

    def __init__(self, disk, base, seed):
        self.disk = disk
        self.model = bytearray(base.ljust(SIZE, b"\0"))
        self.chance = random.Random(seed)
        self.ours = RangeLock()

    async def work(self):
        for _ in range(STEPS):
            offset = self.chance.randrange(SIZE)
            length = min(SIZE - offset, self.chance.choice([1, 300, 512, 4 * KIB, 5000, 40 * KIB]))
            action = self.chance.choice([self.write, self.write, self.zero, self.discard, self.compress, self.read])
            await action(offset, length)

    async def write(self, offset, length):
        data = self.chance.randbytes(length)
        async with self.ours.hold(offset, length):
            await self.disk.write(offset, data)
            self.model[offset : offset + length] = data

    async def zero(self, offset, length):
        flags = self.chance.choice([WriteFlags.NONE, WriteFlags.MAY_UNMAP])
        async with self.ours.hold(offset, length):
            await self.disk.write_zeroes(offset, length, flags)
            self.model[offset : offset + length] = bytes(length)

    async def discard(self, offset, length):
        async with self.ours.hold(offset, length):
            await self.disk.discard(offset, length)
            now = await self.disk.read(offset, length)
            was = self.model[offset : offset + length]
            assert all(a in (b, 0) for a, b in zip(now, was, strict=True))
            self.model[offset : offset + length] = now

    async def compress(self, offset, _length):
        unit = self.disk.driver.cluster_size
        offset -= offset % unit
        length = min(unit, SIZE - offset)
        data = (b"packed %d " % self.chance.randrange(99) * unit)[:length]
        async with self.ours.hold(offset, length):
            await self.disk.write_compressed(offset, data)
            self.model[offset : offset + length] = data

    async def read(self, offset, length):
        async with self.ours.hold(offset, length):
            expected = bytes(self.model[offset : offset + length])
            assert self.disk.try_read(offset, length) in (None, expected)
            assert await self.disk.read(offset, length) == expected

    async def flush(self):
        for _ in range(STEPS // 3):
            await asyncio.sleep(self.chance.random() * 20)
            await self.disk.flush()


async def run(layout, backed, seed):
    create, options = LAYOUTS[layout]
    chance = random.Random(seed)
    base = chance.randbytes(SIZE // 2) if backed else b""
    content = new_image(SIZE, **create)

    async def latency(_kind, _offset, _length):
        await asyncio.sleep(chance.choice([0, 0, 0.5, 1, 3]) * chance.random())

    async with memory_graph() as graph:
        options = {"driver": "qcow2", "file": {"driver": "memfile", "content": content, "script": latency}, **options}
        if backed:
            options["backing"] = {"driver": "memfile", "content": bytearray(base)}
        disk = await graph.open(options)
        stress = Stress(disk, base, seed)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(WORKERS):
                tasks.create_task(stress.work())
            tasks.create_task(stress.flush())
        assert await disk.read(0, SIZE) == stress.model
        await disk.close()
        assert_sound(content)
        disk = await graph.open(options)
        assert await disk.read(0, SIZE) == stress.model


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_requests_side_by_side_on_a_slow_file(layout, backed, seed):
    run_virtual(run(layout, backed, seed))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 60))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_requests_side_by_side_on_a_slow_file(layout, seed):
    for backed in (False, True):
        run_virtual(run(layout, backed, seed))
