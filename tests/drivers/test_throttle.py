"""Throttling in virtual time: rates, bursts, directions, order, and limits that change. Also what every filter passes on."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

import blocklayer
from blocklayer.base.limits import BlockLimits
from blocklayer.base.modes import Permission, WriteFlags
from blocklayer.drivers import throttle
from blocklayer.drivers.filter import FilterDriver
from blocklayer.drivers.memory import MemoryDriver
from blocklayer.drivers.throttle import parse_limits
from blocklayer.graph.child import Child
from blocklayer.graph.graph import Caller
from tests.helpers.virtual_time import virtual_loop, virtual_time

SIZE = 1 << 20


class LoopClock:
    """The virtual time of the event loop."""

    def now(self):
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds):
        await asyncio.sleep(seconds)


@pytest.fixture(autouse=True)
def virtual_clock(monkeypatch):
    monkeypatch.setattr(throttle, "MonotonicClock", LoopClock)


@asynccontextmanager
async def throttled(**limits):
    """A throttled disk in memory; options with ``_`` for ``-``."""
    async with blocklayer.Graph() as graph:
        options = {name.replace("_", "-"): value for name, value in limits.items()}
        yield await graph.open({"driver": "throttle", "file": {"driver": "memory", "size": SIZE}, **options})


async def moments(*requests):
    """When each of ``requests`` was done that were made one after the other."""
    times = []
    for request in requests:
        await request
        times.append(round(virtual_loop().time(), 6))
    return times


async def moments_at_once(*requests):
    """When each of ``requests`` was done that were made at the same time."""

    async def moment(request):
        await request
        return round(virtual_loop().time(), 6)

    return await asyncio.gather(*map(moment, requests))


# -- rates -----------------------------------------------------------------------------------------------------------


@virtual_time
async def test_without_limits_nothing_waits():
    async with throttled() as disk:
        assert await moments(*(disk.write(0, bytes(SIZE)) for _ in range(100))) == [0] * 100
        assert disk.try_read(0, 100) == bytes(100)


@virtual_time
async def test_bytes_pass_at_the_rate():
    """A tenth of a second's worth is free, then each request waits until the ones before it are paid for."""
    async with throttled(bps_total=1000) as disk:
        assert await moments(*(disk.read(0, 500) for _ in range(5))) == [0, 0.4, 0.9, 1.4, 1.9]


@virtual_time
async def test_requests_pass_at_the_rate_whatever_their_length():
    async with throttled(iops_total=10) as disk:
        lengths = (1, SIZE, 512, 70_000, 3)
        assert await moments(*(disk.read(0, length) for length in lengths)) == [0, 0, 0.1, 0.2, 0.3]


@virtual_time
async def test_a_long_request_counts_as_several_if_a_size_is_given():
    async with throttled(iops_total=10, iops_size=1000) as disk:
        assert await moments(*(disk.read(0, length) for length in (5000, 500, 2500, 1))) == [0, 0.4, 0.5, 0.75]


@pytest.mark.parametrize("kind", ["bps", "iops"])
@virtual_time
async def test_reads_and_writes_have_limits_of_their_own(kind):
    unit = {"bps": 10, "iops": 1}[kind]
    async with throttled(**{f"{kind}_read": 10 * unit, f"{kind}_write": 5 * unit}) as disk:
        reads = moments(*(disk.read(0, 10) for _ in range(4)))
        writes = moments(*(disk.write(0, bytes(10)) for _ in range(4)))
        found = await asyncio.gather(reads, writes)
        assert (
            found
            == {
                "bps": [[0, 0, 0.1, 0.2], [0, 0.1, 0.3, 0.5]],
                "iops": [[0, 0, 0.1, 0.2], [0, 0.1, 0.3, 0.5]],
            }[kind]
        )


@virtual_time
async def test_a_limit_of_one_direction_leaves_the_other_alone():
    async with throttled(bps_write=10) as disk:
        assert await moments(*(disk.read(0, 4096) for _ in range(10))) == [0] * 10
        assert await moments(disk.write(0, bytes(100)), disk.write(0, bytes(1))) == [0, 9.9]


@virtual_time
async def test_a_total_limit_counts_both_directions_together():
    async with throttled(bps_total=1000) as disk:
        assert await moments(disk.read(0, 500), disk.write(0, bytes(500)), disk.read(0, 1)) == [0, 0.4, 0.9]


@virtual_time
async def test_the_narrower_of_bytes_and_requests_decides():
    async with throttled(bps_total=1000, iops_total=2) as disk:
        assert await moments(*(disk.read(0, length) for length in (1, 1, 1, 2000, 1))) == [0, 0.4, 0.9, 1.4, 3.3]


@virtual_time
async def test_each_kind_of_change_counts_as_a_write_and_a_flush_does_not():
    async with throttled(bps_write=1000) as disk:
        requests = (disk.write_zeroes(0, 1100), disk.flush(), disk.discard(0, 1000), disk.write(0, b"x"), disk.flush())
        assert await moments(*requests) == [0, 0, 1, 2, 2]


@virtual_time
async def test_a_pause_is_no_credit():
    async with throttled(bps_total=1000) as disk:
        await disk.read(0, 600)
        await asyncio.sleep(100)
        assert await moments(*(disk.read(0, 600) for _ in range(3))) == [100, 100.5, 101.1]


# -- bursts ----------------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_burst_of_a_second_passes_at_once_and_then_the_average():
    async with throttled(bps_total=1000, bps_total_max=5000) as disk:
        found = await moments(*(disk.read(0, 1000) for _ in range(8)))
        assert found == [0, 0, 0, 0, 0, 0, 1, 2]


@virtual_time
async def test_a_longer_burst_keeps_to_its_rate():
    """5000 a second for three seconds, less what leaks meanwhile, then 1000 a second."""
    async with throttled(bps_total=1000, bps_total_max=5000, bps_total_max_length=3) as disk:
        found = await moments(*(disk.read(0, 1000) for _ in range(25)))
        assert found[:4] == [0, 0.1, 0.3, 0.5]
        assert max(found.index(t) for t in found if t <= 3) <= 5 * 3 + 1
        steps = [round(b - a, 6) for a, b in zip(found, found[1:], strict=False)]
        assert set(steps[1:15]) == {0.2}
        assert set(steps[-5:]) == {1.0}


# -- order -----------------------------------------------------------------------------------------------------------


@virtual_time
async def test_requests_of_a_direction_pass_in_the_order_in_which_they_came():
    done = []
    async with throttled(iops_write=10) as disk:

        async def write(number):
            await disk.write(0, bytes([number]) * (5 - number))
            done.append(number)

        await asyncio.gather(*map(write, range(5)))
        assert done == [0, 1, 2, 3, 4]
        assert await disk.read(0, 5) == b"\4\3\2\1\0"


@virtual_time
async def test_many_at_once_take_as_long_as_one_after_the_other():
    async with throttled(bps_total=1000) as disk:
        assert await moments_at_once(*(disk.read(0, 500) for _ in range(5))) == [0, 0.4, 0.9, 1.4, 1.9]


@virtual_time
async def test_a_request_that_is_cancelled_while_it_waits_costs_nothing():
    async with throttled(bps_total=1000) as disk:
        await disk.read(0, 1100)
        waiting = [asyncio.ensure_future(disk.read(0, 10_000)) for _ in range(3)]
        await asyncio.sleep(0.5)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert await moments(disk.read(0, 1)) == [1.0]


# -- without waiting -------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_try_is_answered_and_counted_while_there_is_budget():
    async with throttled(bps_read=1000) as disk:
        assert disk.try_read(0, 600) == bytes(600)
        assert disk.try_read(0, 1) is None
        assert await moments(disk.read(0, 1)) == [0.5]


@virtual_time
async def test_a_try_does_not_overtake_those_who_wait():
    async with throttled(bps_read=1000) as disk:
        await disk.read(0, 1100)
        waiting = asyncio.ensure_future(disk.read(0, 1))
        await asyncio.sleep(0.999)
        assert disk.try_read(0, 1) is None
        await waiting
        await asyncio.sleep(0.01)
        assert disk.try_read(0, 1) is not None


# -- limits that change ------------------------------------------------------------------------------------------------


@virtual_time
async def test_new_limits_hold_for_those_who_wait_already():
    async with throttled(bps_total=1) as disk:
        await disk.read(0, 1000)
        waiting = [asyncio.ensure_future(moments(disk.read(0, 1000))) for _ in range(2)]
        await asyncio.sleep(10)
        disk.driver.set_limits({"bps-total": 1000})
        assert await asyncio.gather(*waiting) == [[10.89], [11.89]]


@virtual_time
async def test_lifted_limits_let_everybody_go():
    async with throttled(bps_total=1, iops_write=1) as disk:
        await disk.write(0, bytes(1000))
        waiting = [moments(disk.read(0, 1000)), moments(disk.write(0, bytes(1000))), moments(disk.discard(0, 1000))]
        waiting = [asyncio.ensure_future(request) for request in waiting]
        await asyncio.sleep(10)
        disk.driver.set_limits({})
        assert await asyncio.gather(*waiting) == [[10], [10], [10]]


@virtual_time
async def test_wrong_limits_change_nothing():
    async with throttled(bps_total=1000) as disk:
        with pytest.raises(blocklayer.OptionError):
            disk.driver.set_limits({"iops-total": 5, "iops-size": 5, "bps-total-max": 5})
        assert await moments(disk.read(0, 600), disk.read(0, 1)) == [0, 0.5]


# -- options ---------------------------------------------------------------------------------------------------------


def test_limits_are_taken_in_either_spelling_and_as_sizes():
    limits, iops_size = parse_limits({"bps_read": "1M", "bps-read-max": 2 << 20, "iops-write": 7, "iops_size": "4k"})
    assert (limits["bps-read"].average, limits["bps-read"].burst_max) == (1 << 20, 2 << 20)
    assert (limits["iops-write"].average, iops_size) == (7, 4096)
    assert {limits[name].average for name in ("bps-total", "bps-write", "iops-total", "iops-read")} == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bps": 5}, "unknown option 'bps'; known options: bps-read, bps-read-max, bps-read-max-length, bps-total"),
        ({"bps-total": -5}, "option 'bps-total' cannot be -5; it takes a number or size"),
        ({"bps-total": "fast"}, "option 'bps-total' cannot be 'fast'; it takes a number or size"),
        ({"bps-total": 5, "bps-read": 5}, "bps-total cannot be combined with bps-read or bps-write"),
        ({"iops-total": 5, "iops-write": 5}, "iops-total cannot be combined with iops-read or iops-write"),
        ({"bps-read-max": 5}, "bps-read: a burst limit needs an average limit"),
        ({"bps-read": 6, "bps-read-max": 5}, "bps-read: a burst limit must not be lower than the average limit"),
        ({"iops-read": 6, "iops-read-max-length": 5}, "iops-read: a burst length needs a burst limit"),
        (
            {"iops-read": 6, "iops-read-max": 7, "iops-read-max-length": 0},
            "iops-read: the length of a burst must be at least one second",
        ),
        ({"iops-size": 4096}, "iops-size needs a limit of requests: iops-total, iops-read or iops-write"),
        ({"iops-total": 1, "iops-size": -1}, "option 'iops-size' cannot be -1; it takes a number or size"),
    ],
    ids=str,
)
async def test_limits_that_make_no_sense_are_refused_by_name(options, message):
    async with blocklayer.Graph() as graph:
        with pytest.raises(blocklayer.OptionError) as caught:
            await graph.open({"driver": "throttle", "file": {"driver": "memory", "size": SIZE}, **options})
        assert str(caught.value).startswith(message)
        assert graph.nodes == {}


# -- what every filter does --------------------------------------------------------------------------------------------


class Plain(FilterDriver):
    """A filter that changes nothing."""

    name = "plain"

    @classmethod
    async def open(cls, options, opener):
        return cls(await opener.child("file"))


class Odd(MemoryDriver):
    """Memory in sectors that says unusual things of itself and remembers what it was asked."""

    name = "odd"
    limits = BlockLimits(request_alignment=512, optimal_transfer=4096)
    zero_init = False
    can_compress = True
    cluster_size = 2048

    def __init__(self, size):
        super().__init__(size)
        self.seen = []

    async def write(self, offset, data, flags):
        self.seen.append(("write", offset, len(data), flags))
        await super().write(offset, data, flags)

    async def write_compressed(self, offset, data):
        self.seen.append(("write_compressed", offset, len(data)))

    async def write_zeroes(self, offset, length, flags):
        self.seen.append(("write_zeroes", offset, length, flags))
        await super().write_zeroes(offset, length, flags)

    async def discard(self, offset, length):
        self.seen.append(("discard", offset, length))

    async def flush(self):
        self.seen.append(("flush",))


@asynccontextmanager
async def filtered():
    async with blocklayer.Graph(drivers={"plain": Plain, "odd": Odd}) as graph:
        below = {"driver": "odd", "size": 1 << 16, "node-name": "below"}
        disk = await graph.open({"driver": "plain", "file": below}, node_name="above")
        yield disk, graph.node("below")


async def test_a_filter_is_what_its_child_is():
    async with filtered() as (disk, below):
        facts = ("limits", "zero_init", "can_compress", "cluster_size", "growable", "size")
        assert [getattr(disk.driver, fact) for fact in facts] == [getattr(below.driver, fact) for fact in facts]
        assert disk.driver.is_filter


async def test_a_filter_passes_each_request_on_with_its_flags():
    async with filtered() as (disk, below):
        await disk.write(512, b"x" * 512)
        await disk.write_zeroes(0, 1024, WriteFlags.MAY_UNMAP)
        await disk.write_zeroes(0, 1024, WriteFlags.NO_FALLBACK)
        await disk.write_compressed(2048, bytes(2048))
        await disk.discard(512, 1024)
        await disk.flush()
        await disk.truncate(1 << 15)
        assert disk.size == below.size == 1 << 15
        assert below.driver.seen == [
            ("write", 512, 512, WriteFlags.NONE),
            ("write_zeroes", 0, 1024, WriteFlags.MAY_UNMAP),
            ("write_zeroes", 0, 1024, WriteFlags.NO_FALLBACK),
            ("write_compressed", 2048, 2048),
            ("discard", 512, 1024),
            ("flush",),
        ]


async def test_a_durable_write_through_a_filter_is_durable_below():
    async with filtered() as (disk, below):
        await disk.write(0, bytes(512), WriteFlags.FUA)
        durable = below.driver.seen[-1] == ("flush",) or WriteFlags.FUA in below.driver.seen[-1][3]
        assert durable


async def test_a_filter_lets_nobody_else_write_below_it():
    async with filtered() as (_disk, below):
        with pytest.raises(blocklayer.PermissionConflictError, match="node 'above'"):
            Child(Caller(), "disk", below, Permission.WRITE, Permission.ALL)


async def test_the_status_of_a_filter_is_that_of_the_layer_below():
    async with filtered() as (disk, below):
        extents = [extent async for extent in disk.extents()]
        assert [(e.offset, e.length, e.node, e.depth) for e in extents] == [(0, 1 << 16, "below", 0)]


async def test_a_filter_needs_a_child_and_takes_no_other():
    async with blocklayer.Graph(drivers={"plain": Plain}) as graph:
        with pytest.raises(blocklayer.OptionError, match="option 'file' is required"):
            await graph.open({"driver": "plain"})
        memory = {"driver": "memory", "size": 512}
        with pytest.raises(blocklayer.OptionError, match="driver 'plain' takes no child 'backing'"):
            await graph.open({"driver": "plain", "file": memory, "backing": memory})
        assert graph.nodes == {}


async def test_a_read_only_filter_opens_its_child_read_only():
    async with blocklayer.Graph(drivers={"plain": Plain}) as graph:
        below = {"driver": "memory", "size": 512, "node-name": "below"}
        disk = await graph.open({"driver": "plain", "file": below}, read_only=True)
        assert (disk.read_only, graph.node("below").read_only) == (True, True)
        await disk.flush()
        with pytest.raises(blocklayer.ReadOnlyError):
            await disk.write(0, b"x")
