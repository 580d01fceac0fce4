"""RangeLock: overlapping holds exclude each other, first come first served, whoever is cancelled."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.aio.range_lock import RangeLock
from tests.helpers.blocking import turns
from tests.helpers.virtual_time import run_virtual, virtual_time

RANGES = st.tuples(st.integers(0, 8), st.integers(1, 4))


def overlap(first, second):
    return first[0] < second[0] + second[1] and second[0] < first[0] + first[1]


class Holder:
    """A task that wants a range, notes when it has it, and holds it until it is told to let go."""

    def __init__(self, lock, area):
        self.area = area
        self.has = False
        self.may_go = asyncio.Event()
        self.task = asyncio.ensure_future(self.run(lock))

    async def run(self, lock):
        async with lock.hold(*self.area):
            self.has = True
            try:
                await self.may_go.wait()
            finally:
                self.has = False


@given(
    areas=st.lists(RANGES, min_size=1, max_size=8),
    steps=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=10),
)
def test_who_holds_is_who_would_hold_in_a_queue_kept_by_hand(areas, steps):
    """Model: a list of all that came and are not gone; one holds if nobody before it on the list overlaps it."""

    async def main():
        lock = RangeLock()
        present = []
        for area in areas:
            present.append(Holder(lock, area))
            await turns()
        for number, cancel in steps:
            if number < len(present):
                holder = present[number]
                if holder.has and not cancel:
                    holder.may_go.set()
                else:
                    holder.task.cancel()
                present.pop(number)
                await turns()
            expected = [
                not any(overlap(other.area, holder.area) for other in present[:index])
                for index, holder in enumerate(present)
            ]
            assert [holder.has for holder in present] == expected
            assert len(lock) == len(present)
        for holder in present:
            holder.may_go.set()
        await asyncio.gather(*(holder.task for holder in present))
        assert len(lock) == 0

    run_virtual(main())


@virtual_time
async def test_ranges_that_only_touch_do_not_wait_for_each_other():
    lock = RangeLock()
    async with lock.hold(0, 512), lock.hold(512, 512), lock.hold(4096, 1):
        assert len(lock) == 3
    assert len(lock) == 0


@virtual_time
async def test_trying_takes_a_free_range_at_once_or_answers_none():
    lock = RangeLock()
    first = lock.try_hold(0, 10)
    assert first is not None
    assert lock.try_hold(9, 1) is None
    assert lock.try_hold(0, 1) is None
    second = lock.try_hold(10, 1)
    assert second is not None
    lock.release(first)
    assert lock.try_hold(9, 1) is not None


@virtual_time
async def test_trying_does_not_overtake_somebody_who_waits():
    lock = RangeLock()
    held = lock.try_hold(0, 10)
    waiting = asyncio.ensure_future(lock.acquire(5, 10))
    await turns()
    assert lock.try_hold(12, 1) is None
    lock.release(held)
    assert lock.try_hold(12, 1) is None
    lock.release(await waiting)
    assert lock.try_hold(12, 1) is not None


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 10, False), (0, 11, True), (10, 1, True), (19, 1, True), (20, 5, False), (12, 2, True), (0, 100, True)],
)
async def test_it_tells_whether_somebody_has_a_byte_of_a_range(offset, length, expected):
    lock = RangeLock()
    async with lock.hold(10, 10):
        assert lock.overlaps(offset, length) == expected


@virtual_time
async def test_an_error_inside_lets_go():
    lock = RangeLock()
    with pytest.raises(ZeroDivisionError):
        async with lock.hold(0, 10):
            raise ZeroDivisionError
    assert len(lock) == 0


@virtual_time
async def test_waiting_until_a_range_is_clear_takes_no_hold_and_does_not_wait_for_newcomers():
    lock = RangeLock()
    old = [lock.try_hold(0, 10), lock.try_hold(10, 10)]
    other = lock.try_hold(100, 10)
    clear = asyncio.ensure_future(lock.wait_clear(5, 10))
    await turns()
    lock.release(old[0])
    newcomer = lock.try_hold(0, 10)
    await turns()
    assert (clear.done(), newcomer is not None) == (False, True)
    lock.release(old[1])
    await clear
    assert len(lock) == 2
    lock.release(other)
    lock.release(newcomer)


@virtual_time
async def test_a_clear_range_needs_no_waiting():
    await RangeLock().wait_clear(0, 1 << 60)


@virtual_time
async def test_waiters_that_are_cancelled_take_nobody_with_them():
    """Two wait for the same hold; that one of them gives up does not wake or cancel the other one."""
    lock = RangeLock()
    held = lock.try_hold(0, 10)
    first, second = asyncio.ensure_future(lock.acquire(0, 5)), asyncio.ensure_future(lock.acquire(5, 5))
    await turns()
    first.cancel()
    await turns()
    assert (first.cancelled(), second.done(), len(lock)) == (True, False, 2)
    lock.release(held)
    lock.release(await second)
    assert len(lock) == 0
