"""The disk that forgets: sizes, latency by a clock of the test's own, and what its block status says."""

from __future__ import annotations

import pytest

import blocklayer
from blocklayer.base.extents import ExtentKind
from blocklayer.base.modes import WriteFlags
from blocklayer.drivers.null import NullDriver, NullOptions
from tests.helpers.virtual_time import virtual_loop, virtual_time


async def test_it_has_a_gibibyte_if_nobody_says_otherwise():
    async with blocklayer.Graph() as graph:
        assert (await graph.open({"driver": "null-co"})).size == 1 << 30
        assert (await graph.open({"driver": "null-co", "size": "7E"})).size == 7 << 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": -1}, "option 'size' cannot be -1; it takes a number or size"),
        ({"latency-ns": -1}, "option 'latency-ns' cannot be -1; it takes a number or size"),
        ({"latency-ns": "soon"}, "option 'latency-ns' cannot be 'soon'; it takes a number or size"),
        ({"read-zeroes": "perhaps"}, "option 'read-zeroes' cannot be 'perhaps'; it takes on or off"),
        ({"sizes": 1}, "unknown option 'sizes'; known options: latency_ns, read_zeroes, size"),
    ],
    ids=str,
)
async def test_wrong_options_are_refused_by_name(options, message):
    async with blocklayer.Graph() as graph:
        with pytest.raises(blocklayer.OptionError) as caught:
            await graph.open({"driver": "null-co", **options})
        assert str(caught.value) == message


async def test_writes_vanish():
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "null-co", "size": "1M"})
        await disk.write(1000, b"gone")
        await disk.write_zeroes(0, 4096, WriteFlags.MAY_UNMAP)
        await disk.write_zeroes(0, 4096, WriteFlags.NO_FALLBACK)
        await disk.discard(0, 4096)
        await disk.flush()
        buffer = bytearray(b"x" * 4096)
        await disk.read_into(0, buffer)
        assert buffer == bytes(4096)
        assert disk.try_read(1000, 4) == bytes(4)


@pytest.mark.parametrize(("said", "kind"), [(True, ExtentKind.ZERO), ("off", ExtentKind.DATA)])
async def test_block_status_says_zero_only_if_told_to(said, kind):
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "null-co", "size": "1M", "read-zeroes": said})
        assert [(e.offset, e.length, e.kind) async for e in disk.extents()] == [(0, 1 << 20, kind)]


async def test_it_cannot_be_resized():
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "null-co", "size": "1M"})
        with pytest.raises(blocklayer.UnsupportedError, match="driver 'null-co' cannot be resized to 5 bytes"):
            await disk.truncate(5)


@virtual_time
async def test_each_request_takes_its_latency():
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "null-co", "size": "1M", "latency-ns": 2_000_000_000})
        clock = virtual_loop()
        assert disk.try_read(0, 1) is None
        took = []
        for request in (disk.read(0, 1), disk.write(0, b"x"), disk.write_zeroes(0, 512), disk.flush()):
            began = clock.time()
            await request
            took.append(clock.time() - began)
        assert took == [2.0, 2.0, 2.0, 2.0]


async def test_latency_is_waited_for_on_the_clock_that_is_given():
    class Clock:
        slept = 0.0

        def now(self):
            return self.slept

        async def sleep(self, seconds):
            self.slept += seconds

    clock = Clock()
    driver = NullDriver(NullOptions(latency_ns=1500), clock=clock)
    await driver.read_into(0, memoryview(bytearray(1)))
    await driver.write(0, memoryview(b"x"), WriteFlags.NONE)
    assert clock.slept == pytest.approx(3e-6)
