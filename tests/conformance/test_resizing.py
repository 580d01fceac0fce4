"""A disk that grows shows zeroes behind its old end, also where a backing file or older content would show through."""

from __future__ import annotations

import pytest

import blocklayer
from blocklayer.base.modes import Permission, Preallocation
from blocklayer.graph.child import Child
from blocklayer.graph.graph import Caller
from tests.conformance.suite import KIB, Can, bench, drivers_that, drivers_that_cannot, every_driver


@drivers_that(Can.RESIZE)
async def test_what_grows_is_zero_and_the_rest_stays(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for size in (b.size + factory.grain, 400 * KIB, 1024 * KIB):
            await b.truncate(size)
            await b.agree()
            await b.fill()
        await b.truncate(2048 * KIB)
        await b.agree()


@drivers_that(Can.RESIZE)
async def test_what_was_cut_does_not_come_back(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for cut in (100 * KIB + 512, 4 * KIB, 1024, 512, 0):
            cut -= cut % factory.grain
            await b.fill()
            await b.truncate(cut)
            await b.agree()
            with pytest.raises(blocklayer.OutOfRangeError):
                await b.disk.read(cut, 1)
            await b.truncate(400 * KIB)
            await b.agree()


@drivers_that(Can.RESIZE)
async def test_sizes_that_are_no_multiples_of_anything(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        for step in (3, 5, 2, 7, 1, 600, 599, 601, 602):
            await b.truncate(step * factory.grain)
            await b.agree()
            await b.fill(step)


@drivers_that(Can.RESIZE)
async def test_the_same_size_changes_nothing(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.truncate(b.size)
        await b.agree()


@drivers_that(Can.RESIZE | Can.PERSIST)
async def test_a_new_size_is_there_after_reopening(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        for size in (100 * KIB, 500 * KIB):
            await b.truncate(size)
            await b.reopen()
            await b.agree()


@every_driver
async def test_an_impossible_size_is_refused_and_changes_nothing(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        if Can.WRITE in factory.can:
            await b.fill()
        for size in (-1, -512, 1 << 63):
            with pytest.raises(blocklayer.OptionError) as caught:
                await b.disk.truncate(size)
            assert caught.value.node == b.disk.name
        await b.agree()


@drivers_that_cannot(Can.RESIZE)
async def test_a_disk_of_fixed_size_says_so(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for size in (0, b.size + 4 * KIB):
            with pytest.raises(blocklayer.UnsupportedError):
                await b.disk.truncate(size)
        await b.agree()


@drivers_that(Can.RESIZE)
async def test_a_user_that_needs_the_size_keeps_it(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        shares = Permission.ALL & ~Permission.RESIZE
        edge = Child(Caller(), "source", b.disk, Permission.CONSISTENT_READ, shares)
        with pytest.raises(blocklayer.InUseError, match="needs its size to stay"):
            await b.disk.truncate(0)
        edge.detach()
        await b.agree()
        await b.truncate(0)
        await b.agree()


@drivers_that(Can.RESIZE)
async def test_room_that_is_reserved_is_zero_or_the_driver_says_that_it_cannot(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        await b.fill()
        for how in (Preallocation.FALLOC, Preallocation.FULL, Preallocation.METADATA):
            size = b.size // KIB * KIB + 100 * KIB
            try:
                await b.disk.truncate(size, how)
                b.model.extend(bytes(size - b.size))
            except blocklayer.UnsupportedError as error:
                assert error.node in b.graph.nodes
            await b.agree()
