"""RateLimiter: bytes per second in slices of a tenth of a second, in virtual time."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.aio.rate_limit import SLICE_S, RateLimiter
from blocklayer.base.errors import OptionError
from tests.helpers.virtual_time import run_virtual, virtual_time


class LoopClock:
    """The event loop's virtual seconds."""

    def now(self):
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds):
        await anyio.sleep(seconds)


def limiter(speed=0):
    return RateLimiter(speed, clock=LoopClock())


def now():
    return asyncio.get_running_loop().time()


async def moments(limit, lengths):
    passed = []
    for length in lengths:
        await limit.wait(length)
        passed.append(now())
    return passed


@virtual_time
async def test_without_a_limit_nobody_waits():
    assert await moments(limiter(), [1 << 40] * 5) == [0] * 5


@virtual_time
async def test_each_request_waits_until_those_before_it_are_paid():
    assert await moments(limiter(1000), [100, 500, 100, 100]) == pytest.approx([0, 0.1, 0.6, 0.7])


@virtual_time
async def test_one_request_larger_than_a_slice_passes_and_is_followed_by_a_longer_pause():
    assert await moments(limiter(1000), [5000, 1, 1]) == pytest.approx([0, 5, 5.001])


@virtual_time
async def test_a_pause_saves_up_one_slice_and_not_more():
    limit = limiter(1000)
    await limit.wait(1)
    await anyio.sleep(100)
    assert await moments(limit, [50, 50, 50, 50]) == pytest.approx([100.001, 100.001, 100.001, 100.051], abs=2e-3)


@virtual_time
async def test_a_request_of_nothing_costs_nothing():
    assert await moments(limiter(10), [0, 0, 10, 0, 10]) == pytest.approx([0, 0, 0, 1, 1])


@pytest.mark.parametrize(("speed", "expected"), [(0, 3), (1000, 3), (1 << 40, 3)])
def test_a_change_of_speed_takes_effect_at_once_also_for_who_waits(speed, expected):
    @virtual_time
    async def main():
        limit = limiter(10)
        await limit.wait(1000)
        waiting = asyncio.ensure_future(moments(limit, [1]))
        await anyio.sleep(3)
        assert not waiting.done()
        limit.set_speed(speed)
        assert limit.speed == speed
        assert await waiting == [expected]

    main()


@virtual_time
async def test_a_lower_speed_holds_from_the_next_request_on():
    limit = limiter(1000)
    await limit.wait(1000)
    limit.set_speed(10)
    assert await moments(limit, [100, 100, 100]) == pytest.approx([0, 10, 20])


@virtual_time
async def test_a_waiter_that_is_cancelled_has_used_nothing_up():
    limit = limiter(10)
    await limit.wait(100)
    cancelled = asyncio.ensure_future(limit.wait(100_000))
    await anyio.sleep(1)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert cancelled.cancelled()
    assert await moments(limit, [1, 1]) == pytest.approx([10, 10.1])


@given(
    speed=st.integers(1, 1000),
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    tasks=st.integers(1, 4),
)
def test_all_together_get_the_speed_and_in_no_time_more_than_that_and_a_slice(speed, lengths, tasks):
    async def main():
        limit = limiter(speed)
        passed = []

        async def work(own):
            for length in own:
                await limit.wait(length)
                passed.append((now(), length))

        await asyncio.gather(*(work(lengths[index::tasks]) for index in range(tasks)))
        return passed

    passed = run_virtual(main())
    assert sorted(length for _, length in passed) == sorted(lengths)
    total = sum(lengths)
    assert passed[-1][0] <= total / speed + 1e-6, "not slower than the speed"
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            seconds = passed[last][0] - passed[first][0]
            between = sum(length for _, length in passed[first:last])
            assert between <= speed * (seconds + SLICE_S) + 1e-6 + max(lengths)


@pytest.mark.parametrize("set_it", [RateLimiter, lambda speed: RateLimiter(5).set_speed(speed)])
def test_a_negative_speed_is_refused(set_it):
    with pytest.raises(OptionError) as caught:
        set_it(-1)
    assert str(caught.value) == "speed must be 0 (unlimited) or positive, not -1"
