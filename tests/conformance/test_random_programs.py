"""Random programs of all operations, at any byte, against a bytearray: after each step the two agree.

A failure prints the program; ``@example(program=[...])`` above the test plays it again.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blocklayer.base.modes import WriteFlags
from tests.conformance.suite import KIB, Can, bench, chosen, difference, drivers_that, noise

FRACTION = st.integers(0, 1 << 20)
"""A place on a disk of any size, in 2^-20 of it."""

LENGTHS = st.one_of(st.integers(1, 1100), st.sampled_from([512, 4 * KIB, 64 * KIB, 128 * KIB]), st.integers(1, 200_000))

RANGE = st.tuples(FRACTION, st.sampled_from([1, 512, 4 * KIB, 64 * KIB]), LENGTHS)
"""Where about, the alignment of the start, and how long (cut at the end of the disk)."""

STEP = st.one_of(
    st.tuples(st.just("write"), RANGE, st.integers(0, 3)),
    st.tuples(st.just("write_zeroes"), RANGE, st.sampled_from([WriteFlags.NONE, WriteFlags.MAY_UNMAP])),
    st.tuples(st.just("discard"), RANGE),
    st.tuples(st.just("read"), RANGE),
    st.tuples(st.just("compress"), FRACTION),
    st.tuples(st.just("truncate"), st.integers(0, 2 * 300 * KIB)),
    st.tuples(st.just("flush")),
    st.tuples(st.just("reopen")),
)
PROGRAM = st.lists(STEP, min_size=1, max_size=25)


def place(size, where, alignment, length):
    """A range of at least one byte on a disk of ``size`` (> 0) bytes."""
    offset = min(where * size >> 20, size - 1)
    offset -= offset % alignment
    return offset, min(length, size - offset)


async def do_write(b, where, seed):
    if b.size:
        offset, length = place(b.size, *where)
        await b.write(offset, noise(length, seed))


async def do_write_zeroes(b, where, flags):
    if b.size:
        await b.write_zeroes(*place(b.size, *where), flags)


async def do_discard(b, where):
    if b.size:
        await b.discard(*place(b.size, *where))


async def do_read(b, where):
    if b.size:
        offset, length = place(b.size, *where)
        expected = bytes(b.model[offset : offset + length])
        assert difference(await b.disk.read(offset, length), expected) is None
        assert b.disk.try_read(offset, length) in (None, expected)


async def do_compress(b, where):
    unit = b.disk.driver.cluster_size
    if Can.COMPRESS in b.factory.can and b.size:
        offset, length = place(b.size, where, unit, unit)
        data = (b"packed %d " % where * unit)[:length]
        await b.disk.write_compressed(offset, data)
        b.model[offset : offset + length] = data


async def do_truncate(b, size):
    if Can.RESIZE in b.factory.can:
        await b.truncate(size - size % b.factory.grain)


async def do_flush(b):
    await b.disk.flush()


async def do_reopen(b):
    if Can.PERSIST in b.factory.can:
        await b.reopen()


async def run(factory, folder, program):
    async with bench(factory, folder) as b:
        for name, *arguments in program:
            await globals()[f"do_{name}"](b, *arguments)
            await b.agree()
        async for extent in b.disk.extents():
            assert extent.kind.value == "data" or not any(b.model[extent.offset : extent.end])
        if Can.PERSIST in factory.can:
            await b.reopen(read_only=True)
            await b.agree()


def check(factory, program):
    with TemporaryDirectory() as folder:
        asyncio.run(run(factory, Path(folder), program))


QUICK = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
THOROUGH = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


@drivers_that(Can.WRITE)
@given(program=PROGRAM)
@QUICK
def test_any_program_leaves_the_disk_as_a_bytearray_would_be(factory, program):
    check(factory, program)


@pytest.mark.long
@drivers_that(Can.WRITE)
@given(program=PROGRAM)
@THOROUGH
def test_many_programs_leave_the_disk_as_a_bytearray_would_be(factory, program):
    check(factory, program)


async def apply_at_once(b, steps):
    """Run ``steps``, whose ranges do not overlap, at the same time."""
    async with asyncio.TaskGroup() as tasks:
        for name, offset, length, seed in steps:
            if name == "write":
                tasks.create_task(b.write(offset, noise(length, seed)))
            elif name == "write_zeroes":
                flags = [WriteFlags.NONE, WriteFlags.MAY_UNMAP][seed % 2]
                tasks.create_task(b.write_zeroes(offset, length, flags))
            elif name == "discard":
                tasks.create_task(b.discard(offset, length))
            else:
                tasks.create_task(b.disk.flush())


async def run_at_once(factory, folder, seed, rounds):
    chance = random.Random(seed)
    async with bench(factory, folder) as b:
        for _ in range(rounds):
            cuts = sorted(chance.sample(range(1, b.size), 30))
            ranges = [(start, end - start) for start, end in zip([0, *cuts], [*cuts, b.size], strict=True)]
            chance.shuffle(ranges)
            kinds = ["write", "write", "write_zeroes", "discard", "flush"]
            await apply_at_once(b, [(chance.choice(kinds), *piece, chance.randrange(99)) for piece in ranges])
            await b.agree()
        if Can.PERSIST in factory.can:
            await b.reopen()
            await b.agree()


@drivers_that(Can.WRITE)
def test_requests_that_run_at_once_leave_what_they_leave_one_by_one(factory, tmp_path):
    asyncio.run(run_at_once(factory, tmp_path, 1, rounds=6))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100))
def test_many_requests_that_run_at_once(seed, tmp_path):
    for factory in chosen():
        if Can.WRITE in factory.can:
            folder = tmp_path / factory.name
            folder.mkdir()
            asyncio.run(run_at_once(factory, folder, seed, rounds=6))
