"""FormatDriver, by a toy format: reads by mapping, copy-on-write, allocation, zeroes, discards, and all of it at once."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import IOFailedError, UnsupportedError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.graph.format_driver import MapKind
from tests.helpers.scripted import Gate, bad_medium, fail_on
from tests.helpers.strict import slow
from tests.helpers.toy import Entry, special, toy_disk
from tests.helpers.virtual_time import run_virtual, virtual_time

UNIT = 64
SIZE = 1000
BASE = bytes(1 + index % 250 for index in range(700))
"""Content of a backing node that is shorter than the disk, and ends inside a cluster."""


def old() -> bytearray:
    """What a disk over ``BASE`` reads as at first."""
    return bytearray(BASE.ljust(SIZE, b"\0"))


# -- reading -----------------------------------------------------------------------------------------------------


async def test_a_read_takes_each_part_from_where_it_lies() -> None:
    async with toy_disk(backing=BASE) as (disk, driver, _):
        expected = old()
        driver.put(1, b"D" * UNIT)
        driver.put(3, b"E" * UNIT)
        driver.table[4] = Entry(MapKind.ZERO)
        driver.table[5] = special(7)
        expected[64:128] = b"D" * UNIT
        expected[192:256] = b"E" * UNIT
        expected[256:320] = bytes(UNIT)
        expected[320:384] = b"\7" * UNIT
        assert await disk.read(0, SIZE) == expected
        assert await disk.read(100, 270) == expected[100:370]


async def test_a_nowait_read_answers_when_tables_and_children_can() -> None:
    async with toy_disk(backing=BASE) as (disk, driver, file):
        driver.put(1, b"D" * UNIT)
        assert disk.try_read(64, 10) is None, "the table is not loaded"
        await disk.read(0, SIZE)
        assert disk.try_read(64, 10) is None, "the file is slow"
        file.quick = True
        assert disk.try_read(64, 10) == b"D" * 10
        assert disk.try_read(60, 10) is None, "the backing node is slow"
        disk.backing.driver.quick = True
        assert disk.try_read(0, SIZE) == await disk.read(0, SIZE)
        driver.table[2] = special(7)
        assert disk.try_read(130, 10) is None
        assert disk.try_read(0, SIZE) is None


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (0, Extent(0, 64, ExtentKind.UNALLOCATED, node="disk")),
        (1, Extent(64, 64, ExtentKind.DATA, node="disk", host_offset=0, host_node="file")),
        (2, Extent(128, 64, ExtentKind.ZERO, node="disk")),
        (3, Extent(192, 64, ExtentKind.DATA, node="disk", compressed=True)),
        (4, Extent(256, 64, ExtentKind.ZERO, node="disk", host_offset=64, host_node="file")),
    ],
)
async def test_block_status_says_what_the_mapping_says(cluster, expected) -> None:
    async with toy_disk() as (disk, driver, _):
        driver.put(1, b"D" * UNIT)
        driver.table[2] = Entry(MapKind.ZERO)
        driver.table[3] = special(7)
        driver.put(4, b"")
        driver.table[4] = Entry(MapKind.ZERO, driver.table[4].host)
        for _ in range(2):  # loaded, then from cached tables
            layer = await disk.path.block_status(cluster * UNIT, UNIT)
            assert layer == Extent(
                expected.offset, 64, expected.kind,
                host_offset=expected.host_offset, host_node=expected.host_node, compressed=expected.compressed,
            )  # fmt: skip


# -- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 64), (10, 20), (60, 10), (100, 300), (990, 10), (0, SIZE), (690, 20)]
)
async def test_a_first_write_keeps_what_the_backing_node_held_around_it(offset, length) -> None:
    async with toy_disk(backing=BASE) as (disk, driver, _):
        expected = old()
        expected[offset : offset + length] = b"n" * length
        await disk.write(offset, b"n" * length)
        assert await disk.read(0, SIZE) == expected
        driver.check()


async def test_a_whole_cluster_is_written_without_reading_what_was_there() -> None:
    async with toy_disk(backing=BASE) as (disk, _, file):
        await disk.write(64, b"n" * 128)
        assert file.log == [("write", 0, 128)]
        assert disk.backing.driver.log == []


async def test_the_end_of_a_short_backing_node_is_filled_up_with_zeroes() -> None:
    async with toy_disk(backing=BASE) as (disk, _, file):
        await disk.write(650, b"n")
        assert bytes(file.bytes) == BASE[640:650] + b"n" + BASE[651:700] + bytes(4)


async def test_the_second_write_to_a_cluster_goes_in_place() -> None:
    async with toy_disk(backing=BASE) as (disk, driver, file):
        await disk.write(70, b"first")
        file.log.clear()
        await disk.write(80, b"second")
        assert file.log == [("write", 16, 6)]
        assert len([step for step in driver.log if step[0] == "allocate"]) == 1


async def test_a_shared_cluster_is_copied_before_it_is_written() -> None:
    async with toy_disk() as (disk, driver, file):
        driver.put(2, b"S" * UNIT, shared=True)
        await disk.write(130, b"n")
        assert bytes(file.bytes[:64]) == b"S" * UNIT
        assert await disk.read(128, UNIT) == b"SSn" + b"S" * 61
        driver.check()


async def test_a_special_cluster_is_expanded_when_it_is_written() -> None:
    async with toy_disk() as (disk, driver, _):
        driver.table[2] = special(7)
        await disk.write(130, b"n")
        assert await disk.read(128, UNIT) == b"\7\7n" + b"\7" * 61
        driver.check()


async def test_into_room_that_is_zero_only_the_data_are_written() -> None:
    async with toy_disk() as (disk, _, file):
        await disk.write(10, b"nnn")
        assert file.log == [("write", 10, 3)]
        assert await disk.read(0, 64) == bytes(10) + b"nnn" + bytes(51)


# -- failures ----------------------------------------------------------------------------------------------------


async def failing_write(step: str) -> None:
    async with toy_disk(backing=BASE) as (disk, driver, file):
        await disk.write(0, b"a" * 100)
        expected = bytes(await disk.read(0, SIZE))
        table = dict(driver.table)
        used = set(driver.used)
        if step == "allocate":
            driver.script = fail_step("allocate")
        else:
            (file if step == "write" else disk.backing.driver).script = fail_on(step)
        with pytest.raises(IOFailedError, match="bad medium"):
            await disk.write(200, b"n" * 10)
        assert (driver.table, driver.used) == (table, used)
        assert await disk.read(0, SIZE) == expected
        driver.check()
        await disk.write(200, b"n" * 10)
        assert await disk.read(200, 10) == b"n" * 10


def fail_step(wanted: str):
    left = 1

    async def script(kind: str) -> None:
        nonlocal left
        if kind == wanted and left:
            left -= 1
            raise bad_medium()

    return script


@pytest.mark.parametrize("step", ["allocate", "write", "read"])
async def test_a_failure_in_the_middle_of_an_allocation_publishes_nothing_and_gives_the_room_back(step: str) -> None:
    await failing_write(step)


def test_a_cancellation_in_the_middle_of_an_allocation_publishes_nothing_and_gives_the_room_back() -> None:
    async def main(at_s: float) -> bool:
        async with toy_disk(backing=BASE) as (disk, driver, file):
            for other in (file, disk.backing.driver):
                other.script = slow(1)

            async def step(_kind: str) -> None:
                await anyio.sleep(1)

            driver.script = step
            with anyio.move_on_after(at_s) as scope:
                await disk.write(70, b"n" * 100)
            for other in (file, disk.backing.driver):
                other.script = None
            driver.check()
            data = await disk.read(0, SIZE)
            expected = old()
            assert data[:70] + data[170:] == expected[:70] + expected[170:]
            if scope.cancelled_caught:
                assert len(driver._locks) == 0
                await disk.write(70, b"n" * 100)
            expected[70:170] = b"n" * 100
            assert await disk.read(0, SIZE) == expected
            return scope.cancelled_caught

    outcomes = [run_virtual(main(at + 0.5)) for at in range(20)]
    assert outcomes[0]
    assert not outcomes[-1]


# -- zeroes and discards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeroing", [True, False])
@pytest.mark.parametrize(
    ("offset", "length"), [(0, SIZE), (64, 64), (10, 20), (60, 200), (990, 10), (100, 28), (640, 360)]
)
async def test_zeroes_change_the_mapping_of_whole_clusters_and_write_the_rest(zeroing, offset, length) -> None:
    async with toy_disk(backing=BASE, zeroing=zeroing) as (disk, driver, _):
        expected = old()
        driver.put(1, b"D" * UNIT)
        expected[64:128] = b"D" * UNIT
        expected[offset : offset + length] = bytes(length)
        await disk.write_zeroes(offset, length)
        assert await disk.read(0, SIZE) == expected
        first, last = -(-offset // UNIT), (SIZE + 63 if offset + length == SIZE else offset + length) // UNIT
        zeroed = [step[1:3] for step in driver.log if step[0] == "zero"]
        assert zeroed == ([(first * UNIT, (last - first) * UNIT)] if last > first else [])
        driver.check()


async def test_zeroing_what_is_zero_writes_nothing() -> None:
    async with toy_disk() as (disk, driver, file):
        driver.table[2] = Entry(MapKind.ZERO)
        await disk.write_zeroes(10, 20)
        await disk.write_zeroes(130, 20)
        assert file.log == []
        assert driver.used == set()


async def test_zeroes_keep_the_room_unless_they_may_unmap() -> None:
    async with toy_disk() as (disk, driver, _):
        await disk.write(0, b"n" * 128)
        await disk.write_zeroes(0, 64)
        await disk.write_zeroes(64, 64, WriteFlags.MAY_UNMAP)
        assert [driver.table[cluster].host for cluster in (0, 1)] == [0, None]


async def test_zeroes_that_must_be_fast_are_refused_where_they_are_not() -> None:
    async with toy_disk(zeroing=False) as (disk, _, file):
        with pytest.raises(UnsupportedError, match="no fast way to write zeroes"):
            await disk.write_zeroes(0, 128, WriteFlags.NO_FALLBACK)
        assert file.log == []


async def test_zero_units_may_be_smaller_than_clusters() -> None:
    async with toy_disk(zero_unit=16) as (disk, driver, _):
        driver.put(0, b"D" * UNIT)
        driver.zeroing = False
        await disk.write_zeroes(10, 30)
        assert [step[1:3] for step in driver.log if step[0] == "zero"] == [(16, 16)]
        assert await disk.read(0, UNIT) == b"D" * 10 + bytes(30) + b"D" * 24


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 64, [(0, 64)]),
        (1, 126, []),
        (1, 127, [(64, 64)]),
        (900, 100, [(960, 64)]),
        (900, 99, []),
        (0, SIZE, [(0, 1024)]),
    ],
)
async def test_a_discard_drops_whole_clusters_only_the_last_of_the_disk_too(offset, length, expected) -> None:
    async with toy_disk() as (disk, driver, _):
        await disk.discard(offset, length)
        assert [step[1:] for step in driver.log if step[0] == "discard"] == expected


# -- at once -----------------------------------------------------------------------------------------------------


@virtual_time
async def test_two_first_writes_to_one_cluster_lose_nothing() -> None:
    async with toy_disk(backing=BASE) as (disk, driver, file):
        file.script = slow(1)
        disk.backing.driver.script = slow(1)
        await asyncio.gather(disk.write(64, b"a" * 10), disk.write(80, b"b" * 10), disk.write(100, b"c" * 40))
        expected = old()
        expected[64:74], expected[80:90], expected[100:140] = b"a" * 10, b"b" * 10, b"c" * 40
        assert await disk.read(0, SIZE) == expected
        assert len(driver.used) == 2
        driver.check()


@virtual_time
async def test_a_slow_read_never_sees_what_somebody_else_put_into_its_freed_cluster() -> None:
    async with toy_disk() as (disk, driver, file):
        await disk.write(0, b"a" * UNIT)
        held = Gate("read")
        file.script = held
        reading = asyncio.ensure_future(disk.read(0, UNIT))
        await held.reached.wait()
        await disk.discard(0, UNIT)
        await disk.write(UNIT, b"b" * UNIT)
        held.opened.set()
        assert await reading == b"a" * UNIT
        await disk.write(2 * UNIT, b"c" * UNIT)
        assert [driver.table[cluster].host for cluster in (0, 1, 2)] == [None, 1, 0]
        driver.check()


@virtual_time
async def test_a_slow_write_in_place_never_lands_in_somebody_elses_cluster() -> None:
    async with toy_disk() as (disk, driver, file):
        await disk.write(0, b"a" * UNIT)
        held = Gate("write")
        file.script = held
        writing = asyncio.ensure_future(disk.write(0, b"x" * UNIT))
        await held.reached.wait()
        file.script = None
        await disk.discard(0, UNIT)
        await disk.write(UNIT, b"b" * UNIT)
        held.opened.set()
        await writing
        assert await disk.read(0, 2 * UNIT) == bytes(UNIT) + b"b" * UNIT
        driver.check()


OPERATION = st.tuples(
    st.sampled_from(["write", "write", "write_zeroes", "unmap", "discard", "read"]),
    st.integers(0, 9),  # which of ten slots of 100 bytes
    st.integers(0, 99),
    st.integers(1, 100),
    st.integers(0, 3),  # starts after
    st.sampled_from([None, None, None, 1, 2, 4]),  # cancelled after
)
FAULTS = st.lists(st.integers(0, 40), max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(OPERATION, min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from([None, BASE]),
    st.sampled_from([16, 64, 256]),
    FAULTS,
)
def test_any_program_of_concurrent_requests_is_as_one_on_plain_bytes(batches, backing, unit, faults) -> None:
    """Requests of a batch run at once on bytes of their own, but share clusters; some fail, some are cancelled."""

    async def main() -> None:
        async with toy_disk(backing=backing, unit=unit) as (disk, driver, file):
            model = old() if backing else bytearray(SIZE)
            driver.put(2, b"S" * unit, shared=True)
            driver.table[3] = special(9)
            model[2 * unit : 3 * unit] = b"S" * len(model[2 * unit : 3 * unit])
            model[3 * unit : 4 * unit] = b"\x09" * len(model[3 * unit : 4 * unit])
            count = 0

            async def script(kind: str, *_: int) -> None:
                nonlocal count
                await anyio.sleep(1)
                if kind == "write":
                    count += 1
                    if count in faults:
                        raise bad_medium()

            file.script = driver.script = script
            for number, batch in enumerate(batches, 1):
                slots = {slot: rest for *rest, slot in ((op[0], *op[2:], op[1]) for op in batch)}
                await asyncio.gather(
                    *(run(disk, model, number, slot * 100, unit, *rest) for slot, rest in slots.items())
                )
                driver.check()
                assert len(driver._locks) == 0
                assert await disk.read(0, SIZE) == model

    run_virtual(main())


async def run(disk, model, number, start, unit, name, skip, length, after_s, cancelled_after_s) -> None:
    """One request on the disk and the model; one that did not succeed may have done any part."""
    offset, end = start + skip, min(start + 100, start + skip + length)
    wanted = bytes(model[offset:end])
    await anyio.sleep(after_s)
    first, last = offset, end
    try:
        with anyio.move_on_after(cancelled_after_s or 10_000) as scope:
            if name == "write":
                wanted = bytes([number]) * (end - offset)
                await disk.write(offset, wanted)
            elif name in ("write_zeroes", "unmap"):
                wanted = bytes(end - offset)
                await disk.write_zeroes(
                    offset, end - offset, WriteFlags.MAY_UNMAP if name == "unmap" else WriteFlags.NONE
                )
            elif name == "discard":
                first = min(-(-offset // unit) * unit, end)
                last = max(first, end if end == SIZE else end // unit * unit)
                wanted = bytes(last - first)
                await disk.discard(offset, end - offset)
            else:
                assert await disk.read(offset, end - offset) == wanted
        failed = scope.cancelled_caught
    except IOFailedError:
        failed = True
    if failed and name != "read":
        for at in range(10):
            try:
                data = await disk.read(offset, end - offset)
                break
            except IOFailedError:
                assert at < 9
        old_data = model[offset:end]
        new_data = bytearray(old_data)
        new_data[first - offset : last - offset] = wanted
        assert all(byte in (before, after) for byte, before, after in zip(data, old_data, new_data, strict=True))
        model[offset:end] = data
    elif name != "read":
        model[first:last] = wanted
