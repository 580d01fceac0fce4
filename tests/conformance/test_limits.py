"""A driver's limits are true and stay so, and nobody above has to know them."""

from __future__ import annotations

from blocklayer.base.limits import ZEROES_MAX
from blocklayer.base.ranges import is_power_of_two
from tests.conformance.suite import KIB, Can, bench, drivers_that, every_driver, noise


@every_driver
async def test_limits_are_multiples_of_each_other_and_do_not_change(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        limits = b.disk.driver.limits
        assert is_power_of_two(limits.request_alignment)
        assert is_power_of_two(limits.memory_alignment)
        assert limits.transfer_max % limits.request_alignment == 0
        assert limits.zeroes_max % limits.request_alignment == 0
        assert limits.zeroes_max <= ZEROES_MAX
        if Can.WRITE in factory.can:
            await b.fill()
            await b.disk.flush()
        await b.disk.read(0, b.size)
        assert b.disk.driver.limits == limits


@every_driver
async def test_a_cluster_is_a_power_of_two_or_there_is_none(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        cluster = b.disk.driver.cluster_size
        assert cluster is None or is_power_of_two(cluster)


@every_driver
async def test_a_disk_describes_itself(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        driver = b.disk.driver.name
        expected = f"<Node {b.disk.name!r} {driver} {b.size} bytes rw, 1 users, 0 in flight>"
        assert repr(b.disk) == expected


@drivers_that(Can.WRITE)
async def test_single_bytes_can_be_written_around_each_boundary(factory, tmp_path):
    async with bench(factory, tmp_path) as b:
        for boundary in (512, 4 * KIB, 8 * KIB, 64 * KIB, b.size):
            for at in range(boundary - 3, min(boundary + 3, b.size)):
                await b.write(at, noise(1, at))
            await b.agree()
        await b.fill()
        for boundary in (512, 4 * KIB, 8 * KIB, 64 * KIB, b.size):
            await b.write_zeroes(boundary - 2, min(5, b.size - boundary + 2))
            await b.discard(boundary - 400, 300)
        await b.agree()


@drivers_that(Can.WRITE)
async def test_requests_longer_than_a_driver_takes_at_once_are_whole(factory, tmp_path):
    """Both ends are off every boundary, so that first and last pieces are cut."""
    async with bench(factory, tmp_path) as b:
        await b.fill()
        await b.write(3, noise(b.size - 6, 2))
        await b.agree()
        assert await b.disk.read(5, b.size - 10) == b.model[5:-5]
        await b.write_zeroes(7, b.size - 14)
        await b.agree()
        await b.discard(1, b.size - 2)
        await b.agree()
