"""The way of a request: bounds, alignment, splitting, notifiers, serialising, flags, flushes and counting."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import IOFailedError, OutOfRangeError, ReadOnlyError, StateError, UnsupportedError
from blocklayer.base.modes import WriteFlags
from tests.helpers.scripted import Gate, bad_medium, fail_on
from tests.helpers.strict import slow, strict, strict_graph
from tests.helpers.virtual_time import run_virtual, virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from blocklayer.graph.node import Node
    from blocklayer.graph.requests import Request
    from tests.helpers.strict import StrictDriver

FUA, UNCHANGED, SERIALISING, NO_FALLBACK, MAY_UNMAP = (
    WriteFlags.FUA,
    WriteFlags.UNCHANGED,
    WriteFlags.SERIALISING,
    WriteFlags.NO_FALLBACK,
    WriteFlags.MAY_UNMAP,
)


@asynccontextmanager
async def opened(**options: object) -> AsyncIterator[tuple[Node, StrictDriver]]:
    """A strict disk called "disk"."""
    async with strict_graph() as graph:
        disk = await graph.open({"driver": "strict", "node-name": "disk", **options})
        yield disk, strict(disk)


# -- bounds ------------------------------------------------------------------------------------------------------


OPERATIONS = {
    "read": lambda disk, offset, length: disk.read(offset, length),
    "write": lambda disk, offset, length: disk.write(offset, bytes(max(length, 0))),
    "write_compressed": lambda disk, offset, length: disk.write_compressed(offset, bytes(max(length, 0))),
    "write_zeroes": lambda disk, offset, length: disk.write_zeroes(offset, length),
    "discard": lambda disk, offset, length: disk.discard(offset, length),
}
CHANGES = [name for name in OPERATIONS if name != "read"]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (4096, 1), (4095, 2), (0, 4097), (1 << 70, 1), (5000, 0)])
async def test_a_request_that_sticks_out_is_refused_and_never_reaches_the_driver(name, offset, length) -> None:
    async with opened(size=4096) as (disk, driver):
        with pytest.raises(OutOfRangeError) as raised:
            await OPERATIONS[name](disk, offset, length)
        assert (raised.value.node, raised.value.offset, raised.value.length) == ("disk", offset, length)
        assert "request outside the node's 4096 bytes" in str(raised.value)
        assert driver.log == []


@pytest.mark.parametrize("name", ["read", "write_zeroes", "discard"])
async def test_a_negative_length_is_refused(name) -> None:
    async with opened() as (disk, driver):
        with pytest.raises(OutOfRangeError):
            await OPERATIONS[name](disk, 100, -1)
        assert driver.log == []


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("offset", [0, 100, 4096])
async def test_an_empty_request_does_nothing_up_to_the_very_end(name, offset) -> None:
    async with opened(size=4096, align=512) as (disk, driver):
        called = []
        disk.before_write(lambda request: called.append(request))
        assert await OPERATIONS[name](disk, offset, 0) in (None, b"")
        assert (driver.log, called) == ([], [])


@pytest.mark.parametrize("name", CHANGES)
async def test_a_read_only_node_refuses_every_change(name) -> None:
    async with opened(**{"read-only": True}) as (disk, driver):
        with pytest.raises(ReadOnlyError, match="^node 'disk': it was opened read-only"):
            await OPERATIONS[name](disk, 0, 512)
        with pytest.raises(ReadOnlyError):
            await disk.truncate(8192)
        await disk.flush()
        assert driver.log == []
        assert await disk.read(0, 512) == bytes(512)


@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_closed_node_refuses_every_request(name) -> None:
    async with opened() as (disk, _):
        await disk.close()
        for offset in (0, 100):
            with pytest.raises(StateError, match="^node 'disk': it is closed"):
                await OPERATIONS[name](disk, offset, 0 if offset else 1)
        with pytest.raises(StateError):
            await disk.flush()
        with pytest.raises(StateError):
            await disk.truncate(1)
        with pytest.raises(StateError):
            await disk.block_status(0, 1)
        assert disk.try_read(0, 1) is None


# -- alignment and splitting -------------------------------------------------------------------------------------


async def test_a_read_is_aligned_out_and_split_by_the_limits() -> None:
    async with opened(size=8192, align=512, transfer_max=2048) as (disk, driver):
        driver.bytes[:] = bytes(index % 251 for index in range(8192))
        assert await disk.read(700, 5000) == driver.bytes[700:5700]
        assert driver.log == [("read", 512, 2048), ("read", 2560, 2048), ("read", 4608, 1536)]


async def test_an_unaligned_write_reads_only_the_units_that_it_covers_in_part() -> None:
    async with opened(size=8192, align=512, transfer_max=2048) as (disk, driver):
        driver.bytes[:] = b"o" * 8192
        await disk.write(700, b"n" * 3000)
        assert bytes(driver.bytes) == b"o" * 700 + b"n" * 3000 + b"o" * (8192 - 3700)
        reads = sorted(entry for entry in driver.log if entry[0] == "read")
        assert reads == [("read", 512, 512), ("read", 3584, 512)]
        assert driver.log[2:] == [("write", 512, 2048), ("write", 2560, 1536)]


async def test_a_write_with_one_aligned_end_reads_one_unit() -> None:
    async with opened(size=8192, align=512) as (disk, driver):
        await disk.write(512, b"n" * 700)
        assert driver.log == [("read", 1024, 512), ("write", 512, 1024)]


async def test_zeroes_go_to_the_driver_in_whole_units_and_the_ends_are_written() -> None:
    async with opened(size=8192, align=512, zeroes_max=1024) as (disk, driver):
        driver.bytes[:] = b"o" * 8192
        await disk.write_zeroes(500, 3000)
        assert bytes(driver.bytes) == b"o" * 500 + bytes(3000) + b"o" * (8192 - 3500)
        zeroes = [entry for entry in driver.log if entry[0] == "write_zeroes"]
        assert zeroes == [("write_zeroes", 512, 1024), ("write_zeroes", 1536, 1024), ("write_zeroes", 2560, 512)]


async def test_a_discard_never_touches_units_that_it_covers_in_part() -> None:
    async with opened(size=8192, align=512, zeroes_max=1024) as (disk, driver):
        driver.bytes[:] = b"o" * 8192
        await disk.discard(100, 3000)
        assert driver.log == [("discard", 512, 1024), ("discard", 1536, 1024), ("discard", 2560, 512)]
        await disk.discard(100, 300)
        assert len(driver.log) == 3


async def test_the_last_part_of_a_unit_can_be_read_and_written() -> None:
    async with opened(size=1000, align=512) as (disk, driver):
        await disk.write(900, b"n" * 100)
        assert await disk.read(0, 1000) == bytes(900) + b"n" * 100
        await disk.write_zeroes(0, 1000)
        assert await disk.read(0, 1000) == bytes(1000)
        assert len(driver.bytes) == 1024


PLACES = st.tuples(
    st.sampled_from(["write", "write_zeroes", "discard", "read"]), st.integers(0, 4000), st.integers(0, 4000)
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([(1, 7, 5), (16, 16, 32), (512, 1024, 512), (512, 4096, 2048)]),
    st.sampled_from([4000, 4096, 3585]),
    st.lists(PLACES, max_size=12),
)
def test_any_requests_do_what_they_would_do_to_plain_bytes(limits, size, requests) -> None:
    align, transfer_max, zeroes_max = limits

    async def main() -> None:
        async with opened(size=size, align=align, transfer_max=transfer_max, zeroes_max=zeroes_max) as (disk, driver):
            model = bytearray(size)
            for number, (name, offset, length) in enumerate(requests, 1):
                offset, end = min(offset, size), min(size, offset + length)
                length = end - min(offset, end)
                if name == "write":
                    model[offset:end] = bytes([number]) * length
                    await disk.write(offset, bytes([number]) * length)
                elif name == "write_zeroes":
                    model[offset:end] = bytes(length)
                    await disk.write_zeroes(offset, length)
                elif name == "discard":
                    first, last = -(-offset // align) * align, end // align * align
                    model[first:last] = b"\xdd" * (last - first)
                    await disk.discard(offset, length)
                else:
                    assert await disk.read(offset, length) == model[offset:end]
            assert driver.bytes[:size] == model
            assert not any(driver.bytes[size:])

    run_virtual(main())


# -- concurrent unaligned writes ---------------------------------------------------------------------------------


@virtual_time
async def test_two_unaligned_writes_in_one_unit_lose_nothing() -> None:
    async with opened(align=512) as (disk, driver):
        driver.script = slow(1)
        await asyncio.gather(disk.write(0, b"a" * 100), disk.write(100, b"b" * 100), disk.write(500, b"c" * 24))
        assert bytes(driver.bytes[:600]) == b"a" * 100 + b"b" * 100 + bytes(300) + b"c" * 24 + bytes(76)


@virtual_time
async def test_an_unaligned_write_and_an_aligned_one_in_the_same_unit_lose_nothing() -> None:
    async with opened(align=512) as (disk, driver):
        driver.script = slow(1)
        await asyncio.gather(disk.write(100, b"a" * 100), disk.write(0, b"b" * 512))
        assert bytes(driver.bytes[:512]) in (b"b" * 512, b"b" * 100 + b"a" * 100 + b"b" * 312)
        await asyncio.gather(disk.write(512, b"c" * 512), disk.write(600, b"d" * 10))
        assert driver.bytes[600] in b"cd"
        assert bytes(driver.bytes[1000:1024]) == b"c" * 24


@virtual_time
async def test_zeroes_with_two_unaligned_ends_do_not_wait_for_those_who_wait_for_them() -> None:
    async with opened(align=512) as (disk, driver):
        driver.bytes[:] = b"o" * 4096
        driver.script = slow(1)

        async def later() -> None:
            await anyio.sleep(0.5)
            await disk.write(400, b"n" * 10)

        await asyncio.gather(disk.write_zeroes(100, 2000), later())
        assert bytes(driver.bytes[:100]) == b"o" * 100
        assert bytes(driver.bytes[400:410]) == b"n" * 10
        assert bytes(driver.bytes[410:2100]) == bytes(1690)
        assert bytes(driver.bytes[2100:]) == b"o" * 1996


@virtual_time
async def test_unaligned_writes_with_slow_notifiers_do_not_wait_for_each_other_for_ever() -> None:
    async with opened(align=512) as (disk, driver):
        delays = iter((5, 1))

        async def notifier(_request: Request) -> None:
            await anyio.sleep(next(delays))

        disk.before_write(notifier)
        await asyncio.gather(disk.write(0, b"a" * 100), disk.write(100, b"b" * 100))
        assert bytes(driver.bytes[:200]) == b"a" * 100 + b"b" * 100


@virtual_time
async def test_a_notifier_may_read_what_a_waiting_unaligned_write_covers() -> None:
    async with opened(align=512) as (disk, driver):
        driver.script = slow(1)
        seen = []

        async def notifier(request: Request) -> None:
            if request.offset == 0:
                await anyio.sleep(3)
                seen.append(await disk.read(0, 512))

        disk.before_write(notifier)

        async def later() -> None:
            await anyio.sleep(1)
            await disk.write(100, b"b" * 10)

        await asyncio.gather(disk.write(0, b"a" * 512), later())
        assert seen == [bytes(512)]
        assert bytes(driver.bytes[:512]) == b"a" * 100 + b"b" * 10 + b"a" * 402


@settings(max_examples=150, deadline=None)
@given(st.permutations(range(16)), st.lists(st.integers(0, 3), min_size=16, max_size=16), st.booleans())
def test_concurrent_writes_of_disjoint_places_all_arrive(order, delays, hooked) -> None:
    async def main() -> None:
        async with opened(align=64, size=512) as (disk, driver):
            driver.script = slow(1)

            async def notifier(request: Request) -> None:
                await anyio.sleep(delays[request.offset // 32])

            if hooked:
                disk.before_write(notifier)

            async def write(number: int) -> None:
                await anyio.sleep(delays[15 - number])
                if number % 5 == 4:
                    await disk.write_zeroes(number * 32 + number, 32 - number)
                else:
                    await disk.write(number * 32 + number, bytes([number + 1]) * (32 - number))

            driver.bytes[:] = b"\xff" * 512
            await asyncio.gather(*(write(number) for number in order))
            for number in range(16):
                value = 0 if number % 5 == 4 else number + 1
                expected = b"\xff" * number + bytes([value]) * (32 - number)
                assert bytes(driver.bytes[number * 32 : number * 32 + 32]) == expected
            assert len(disk.path.requests) == 0

    run_virtual(main())


# -- serialising -------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_serialising_write_waits_for_reads_in_flight_and_holds_off_new_ones() -> None:
    async with opened(size=4096) as (disk, driver):
        driver.script = slow(2, "read", "write")
        log: list[str] = []

        async def step(name: str, after_s: float, action) -> None:
            await anyio.sleep(after_s)
            result = await action()
            log.append(f"{name} {asyncio.get_running_loop().time():g} {result}")

        await asyncio.gather(
            step("early read", 0, lambda: disk.read(0, 2)),
            step("write", 1, lambda: disk.write(0, b"nn", SERIALISING)),
            step("late read", 3, lambda: disk.read(1, 2)),
            step("other read", 3, lambda: disk.read(2, 2)),
        )
        assert log == [
            "early read 2 b'\\x00\\x00'",
            "write 4 None",
            "other read 5 b'\\x00\\x00'",
            "late read 6 b'n\\x00'",
        ]


@virtual_time
async def test_a_quick_read_does_not_pass_a_serialising_write() -> None:
    async with opened(size=4096, quick=True) as (disk, driver):
        driver.script = slow(1, "write")
        writing = asyncio.ensure_future(disk.write(0, b"n" * 512, SERIALISING))
        await anyio.sleep(0.5)
        assert disk.try_read(511, 1) is None
        assert disk.try_read(512, 1) == b"\0"
        assert await disk.read(511, 1) == b"n"
        assert disk.try_read(511, 1) == b"n"
        await writing


@virtual_time
async def test_a_cancelled_request_is_off_the_list_and_lets_others_go() -> None:
    async with opened(align=512) as (disk, driver):
        held = Gate("read")
        driver.script = held
        first = asyncio.ensure_future(disk.write(0, b"a"))
        await held.reached.wait()
        second = asyncio.ensure_future(disk.write(1, b"b"))
        third = asyncio.ensure_future(disk.write(2, b"c"))
        await anyio.sleep(1)
        first.cancel()
        second.cancel()
        held.opened.set()
        await asyncio.wait([first, second, third])
        assert (first.cancelled(), second.cancelled(), third.exception()) == (True, True, None)
        assert bytes(driver.bytes[:4]) == b"\0\0c\0"
        assert len(disk.path.requests) == 0


# -- truncation --------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_request_that_waited_for_a_truncation_is_refused_if_its_place_is_gone() -> None:
    for name in OPERATIONS:
        async with opened(size=4096) as (disk, driver):
            driver.script = slow(1, "truncate")
            cut = asyncio.ensure_future(disk.truncate(1024))
            await anyio.sleep(0.5)
            inside = asyncio.ensure_future(OPERATIONS[name](disk, 0, 100))
            with pytest.raises(OutOfRangeError):
                await OPERATIONS[name](disk, 1000, 100)
            await cut
            await inside
            assert driver.size == len(driver.bytes) == 1024


@virtual_time
async def test_a_truncation_waits_for_writes_to_what_it_cuts_off() -> None:
    async with opened(size=4096) as (disk, driver):
        driver.script = slow(1, "write")
        await asyncio.gather(disk.write(2000, b"x"), disk.write(0, b"x"), disk.truncate(1024))
        kinds = [kind for kind, *_ in driver.log]
        assert kinds == ["write", "write", "truncate"]
        assert driver.size == 1024


async def test_what_a_truncation_adds_reads_as_zeroes() -> None:
    async with opened(size=1000, align=512) as (disk, _):
        await disk.write(0, b"x" * 1000)
        await disk.truncate(500)
        await disk.truncate(1000)
        assert await disk.read(0, 1000) == b"x" * 500 + bytes(500)


# -- flags and flushes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fua", "expected"), [(True, ["write"]), (False, ["write", "flush"])])
async def test_a_durable_write_is_the_drivers_business_or_followed_by_a_flush(fua, expected) -> None:
    async with opened(fua=fua) as (disk, driver):
        await disk.write(0, b"x", FUA)
        assert [kind for kind, *_ in driver.log] == expected
        assert driver.flags == [FUA if fua else WriteFlags.NONE]


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
async def test_with_a_write_through_cache_every_write_is_durable(cache) -> None:
    async with opened(cache=cache) as (disk, driver):
        await disk.write(0, b"x")
        await disk.write_zeroes(0, 1)
        await disk.write_compressed(0, b"x")
        assert [kind for kind, *_ in driver.log] == [
            "write", "flush", "write_zeroes", "flush", "write_compressed", "flush",
        ]  # fmt: skip


async def test_a_compressed_durable_write_is_flushed_also_where_plain_ones_need_no_flush() -> None:
    async with opened(fua=True, cache="writethrough") as (disk, driver):
        await disk.write_compressed(0, b"x")
        assert [kind for kind, *_ in driver.log] == ["write_compressed", "flush"]


async def test_flags_that_are_the_paths_business_do_not_reach_the_driver() -> None:
    async with opened() as (disk, driver):
        await disk.write(0, b"x", UNCHANGED | SERIALISING)
        await disk.write_zeroes(0, 1, UNCHANGED | SERIALISING | NO_FALLBACK | MAY_UNMAP)
        assert driver.flags == [WriteFlags.NONE, NO_FALLBACK | MAY_UNMAP]


@pytest.mark.parametrize(
    ("options", "flags", "expected"),
    [
        ({"detect-zeroes": "off"}, WriteFlags.NONE, [("write", 0, 8)]),
        ({"detect-zeroes": "on"}, WriteFlags.NONE, [("write_zeroes", 0, 8)]),
        ({"detect-zeroes": "unmap"}, MAY_UNMAP, [("write_zeroes", 0, 8)]),
    ],
)
async def test_zeroes_are_detected_where_that_is_asked_for(options, flags, expected) -> None:
    async with opened(**options) as (disk, driver):
        await disk.write(0, bytes(8))
        assert (driver.log, driver.flags) == (expected, [flags])
        await disk.write(0, b"\0\0\0\0\0\0\0x")
        assert driver.log[1:] == [("write", 0, 8)]


async def test_without_discard_nothing_is_unmapped() -> None:
    async with opened(discard="ignore") as (disk, driver):
        await disk.discard(0, 512)
        await disk.write_zeroes(0, 512, MAY_UNMAP)
        assert (driver.log, driver.flags) == ([("write_zeroes", 0, 512)], [WriteFlags.NONE])


async def test_a_second_flush_without_a_write_between_costs_nothing() -> None:
    async with opened() as (disk, driver):
        await disk.write(0, b"x")
        await disk.flush()
        await disk.flush()
        assert [kind for kind, *_ in driver.log] == ["write", "flush"]
        await disk.discard(0, 1)
        await disk.flush()
        assert [kind for kind, *_ in driver.log] == ["write", "flush", "discard", "flush"]


async def test_after_a_failed_flush_the_next_one_tries_again() -> None:
    async with opened() as (disk, driver):
        await disk.write(0, b"x")
        driver.script = fail_on("flush")
        with pytest.raises(IOFailedError, match="^node 'disk': bad medium"):
            await disk.flush()
        await disk.flush()
        assert [kind for kind, *_ in driver.log] == ["write", "flush", "flush"]


@virtual_time
async def test_a_flush_covers_what_completed_before_it_also_while_another_one_runs() -> None:
    async with opened() as (disk, driver):
        driver.script = slow(2, "flush")
        await disk.write(0, b"a")
        first = asyncio.ensure_future(disk.flush())
        await anyio.sleep(1)
        await disk.write(1, b"b")
        await asyncio.gather(disk.flush(), disk.flush(), first)
        assert [kind for kind, *_ in driver.log] == ["write", "flush", "write", "flush"]


@virtual_time
async def test_a_cancelled_flush_does_not_count() -> None:
    async with opened() as (disk, driver):
        driver.script = slow(2, "flush")
        await disk.write(0, b"a")
        with anyio.move_on_after(1):
            await disk.flush()
        await disk.flush()
        assert [kind for kind, *_ in driver.log] == ["write", "flush", "flush"]


async def test_what_a_driver_cannot_do_is_said_with_its_name_and_the_nodes() -> None:
    async with strict_graph() as graph:
        disk = await graph.open({"driver": "memory", "size": 4096, "node-name": "disk"})
        with pytest.raises(UnsupportedError, match="^node 'disk': driver 'memory' cannot compress"):
            await disk.write_compressed(0, bytes(4096))
        assert disk.statistics.write.errors == 1


# -- errors and counting -----------------------------------------------------------------------------------------


async def test_requests_are_counted_with_their_bytes_and_errors() -> None:
    async with opened(size=8192) as (disk, driver):
        await disk.read(0, 100)
        await disk.write(0, b"x" * 200)
        await disk.write_zeroes(4096, 300)
        await disk.discard(1000, 400)
        await disk.flush()
        driver.script = fail_on("read")
        with pytest.raises(IOFailedError):
            await disk.read(0, 1)
        counted = disk.statistics
        assert (counted.read.operations, counted.read.bytes, counted.read.errors) == (1, 100, 1)
        assert (counted.write.operations, counted.write.bytes) == (1, 200)
        assert (counted.write_zeroes.operations, counted.write_zeroes.bytes) == (1, 300)
        assert (counted.discard.operations, counted.discard.bytes) == (1, 400)
        assert (counted.flush.operations, counted.flush.bytes) == (1, 0)
        assert counted.write_end_max == 4396
        for counters in (counted.read, counted.write, counted.write_zeroes, counted.discard, counted.flush):
            assert sum(counters.latency) == counters.operations


async def test_an_unaligned_write_counts_as_many_bytes_as_were_asked_for() -> None:
    async with opened(align=512) as (disk, _):
        await disk.write(100, b"x" * 10)
        counted = disk.statistics
        assert (counted.write.operations, counted.write.bytes, counted.read.operations) == (1, 10, 0)
        assert counted.write_end_max == 110


async def test_a_read_that_is_answered_at_once_counts_in_the_first_bucket() -> None:
    async with opened(quick=True) as (disk, driver):
        assert disk.try_read(0, 100) == bytes(100)
        assert await disk.read(0, 50) == bytes(50)
        assert driver.log == []
        counted = disk.statistics.read
        assert (counted.operations, counted.bytes, counted.latency[0]) == (2, 150, 2)


async def test_a_request_outside_the_disk_is_no_error_of_the_disk() -> None:
    async with opened() as (disk, _):
        with pytest.raises(OutOfRangeError):
            await disk.read(4096, 1)
        assert disk.statistics.read.errors == 0


@pytest.mark.parametrize(("kind", "name"), [("read", "read"), ("write", "write"), ("discard", "discard")])
async def test_a_failed_request_names_the_node_and_leaves_the_list(kind, name) -> None:
    async with opened() as (disk, driver):
        driver.script = fail_on(kind, error=bad_medium)
        with pytest.raises(IOFailedError) as raised:
            await OPERATIONS[name](disk, 0, 512)
        assert (raised.value.node, str(raised.value)) == ("disk", "node 'disk': bad medium")
        assert len(disk.path.requests) == 0
        await OPERATIONS[name](disk, 0, 512)


async def test_block_status_is_clipped_to_what_was_asked_for() -> None:
    async with opened(size=4096) as (disk, _):
        status = await disk.path.block_status(100, 200)
        assert (status.offset, status.length, status.host_offset) == (100, 200, 100)


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (4096, 0), (4096, 1), (-1, 1), (0, -1)])
async def test_block_status_of_nothing_or_outside_is_refused(offset, length) -> None:
    async with opened(size=4096) as (disk, driver):
        with pytest.raises(OutOfRangeError):
            await disk.path.block_status(offset, length)
        assert driver.log == []
