"""Requests in flight: who waits for whom, in which order, and that nobody waits for ever."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.graph.requests import Request, RequestKind, RequestList
from tests.helpers.virtual_time import run_virtual, virtual_time


def plain(offset: int, length: int) -> Request:
    return Request(RequestKind.WRITE, offset, length)


def serialising(offset: int, length: int) -> Request:
    return Request(RequestKind.WRITE, offset, length, serialising=True)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (plain(0, 10), plain(0, 10), False),
        (plain(0, 10), serialising(9, 1), True),
        (serialising(0, 10), plain(9, 1), True),
        (serialising(0, 10), serialising(0, 1), True),
        (serialising(0, 10), serialising(10, 1), False),
        (serialising(10, 5), plain(0, 10), False),
        (serialising(0, 0), serialising(0, 10), False),
    ],
)
def test_requests_conflict_if_they_overlap_and_one_is_serialising(first: Request, second: Request, expected) -> None:
    assert first.conflicts(second) is expected
    assert second.conflicts(first) is expected


def test_a_request_tells_what_it_is() -> None:
    assert repr(plain(4096, 512)) == "<write 4096+512>"
    assert repr(serialising(4096, 512)) == "<write 4096+512 serialising>"


def test_the_list_counts_what_is_in_flight_oldest_first() -> None:
    requests = RequestList()
    first, second = plain(0, 1), serialising(0, 1)
    requests.add(first)
    requests.add(second)
    assert (len(requests), list(requests), requests.serialising) == (2, [first, second], 1)
    requests.remove(first)
    requests.remove(second)
    assert (len(requests), list(requests), requests.serialising) == (0, [], 0)


def test_only_a_serialising_request_blocks_a_plain_one() -> None:
    requests = RequestList()
    requests.add(plain(0, 100))
    assert not requests.blocks(0, 100)
    requests.add(serialising(200, 100))
    assert not requests.blocks(0, 200)
    assert requests.blocks(0, 201)
    assert requests.blocks(299, 1)
    assert not requests.blocks(300, 1)


@virtual_time
async def test_a_serialising_request_waits_for_what_was_there_before() -> None:
    requests, log = RequestList(), []
    await in_turn(requests, log, {"a": (plain(0, 10), 5), "b": (serialising(5, 10), 1), "c": (plain(20, 1), 1)})
    assert log == ["a begins", "c begins", "c ends", "a ends", "b begins", "b ends"]


@virtual_time
async def test_whatever_overlaps_waits_for_a_serialising_request() -> None:
    requests, log = RequestList(), []
    await in_turn(requests, log, {"a": (serialising(0, 10), 5), "b": (plain(9, 1), 1), "c": (plain(10, 1), 1)})
    assert log == ["a begins", "c begins", "c ends", "a ends", "b begins", "b ends"]


@virtual_time
async def test_serialising_requests_on_one_range_go_first_come_first_served() -> None:
    requests, log = RequestList(), []
    await in_turn(requests, log, {name: (serialising(0, 10), 1) for name in "abc"})
    assert log == ["a begins", "a ends", "b begins", "b ends", "c begins", "c ends"]


@virtual_time
async def test_two_requests_that_both_become_serialising_do_not_wait_for_each_other() -> None:
    requests, log = RequestList(), []

    async def run(name: str, request: Request, before_s: float) -> None:
        requests.add(request)
        await anyio.sleep(before_s)
        requests.promote(request, 0, 512)
        await turn(requests, log, name, request)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, "slow", plain(0, 100), 5)
        tasks.start_soon(run, "fast", plain(200, 10), 1)
    assert log == ["slow begins", "slow ends", "fast begins", "fast ends"]


@virtual_time
async def test_a_request_that_becomes_serialising_goes_before_one_that_waits_for_it() -> None:
    requests, log = RequestList(), []
    first, second = plain(0, 10), serialising(0, 512)

    async def run_first() -> None:
        requests.add(first)
        await anyio.sleep(2)  # meanwhile the second one waits for us
        requests.promote(first, 0, 512)
        await turn(requests, log, "first", first)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_first)
        await anyio.sleep(1)
        requests.add(second)
        tasks.start_soon(turn, requests, log, "second", second)
    assert log == ["first begins", "first ends", "second begins", "second ends"]


@virtual_time
async def test_a_serialising_request_may_grow_while_others_wait_for_it() -> None:
    requests, log = RequestList(), []

    async def grows() -> None:
        request = serialising(0, 512)
        requests.add(request)
        await requests.wait_turn(request)
        await anyio.sleep(2)
        requests.promote(request, 0, 1024)
        await turn(requests, log, "grown", request)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(grows)
        await anyio.sleep(1)
        for name, offset in (("inside", 0), ("added", 600)):
            request = plain(offset, 10)
            requests.add(request)
            tasks.start_soon(turn, requests, log, name, request)
    assert log == ["added begins", "added ends", "grown begins", "grown ends", "inside begins", "inside ends"]


@virtual_time
async def test_a_request_does_not_wait_for_one_that_waits_itself() -> None:
    """A notifier's read on behalf of ``a`` must pass ``b``, which waits for ``a``: nobody else would ever let it go."""
    requests, log = RequestList(), []

    async def with_notifier() -> None:
        a = plain(0, 10)
        requests.add(a)
        await anyio.sleep(2)
        read = plain(0, 512)
        requests.add(read)
        await turn(requests, log, "read of a's notifier", read)
        await turn(requests, log, "a", a)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(with_notifier)
        await anyio.sleep(1)
        b = serialising(0, 512)
        requests.add(b)
        tasks.start_soon(turn, requests, log, "b", b)
    assert log[:4] == ["read of a's notifier begins", "read of a's notifier ends", "a begins", "a ends"]
    assert log[4:] == ["b begins", "b ends"]


@virtual_time
async def test_a_cancelled_waiter_holds_nobody_up() -> None:
    requests, log = RequestList(), []

    async def cancelled() -> None:
        request = serialising(0, 10)
        requests.add(request)
        with anyio.move_on_after(2):
            await turn(requests, log, "cancelled", request)

    async with anyio.create_task_group() as tasks:
        first = serialising(0, 10)
        requests.add(first)
        tasks.start_soon(turn, requests, log, "first", first, 5)
        await anyio.sleep(1)
        tasks.start_soon(cancelled)
        await anyio.sleep(0.5)
        last = plain(0, 10)
        requests.add(last)
        tasks.start_soon(turn, requests, log, "last", last)
    assert log == ["first begins", "first ends", "last begins", "last ends"]
    assert len(requests) == 0


@virtual_time
async def test_idle_means_that_nothing_is_in_flight_not_even_what_came_later() -> None:
    requests, log = RequestList(), []
    await requests.wait_idle()

    async def wait() -> None:
        await requests.wait_idle()
        log.append("idle")

    first, second = plain(0, 1), plain(0, 1)
    requests.add(first)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await anyio.sleep(1)
        requests.add(second)
        requests.remove(first)
        await anyio.sleep(1)
        assert log == []
        requests.remove(second)
    assert log == ["idle", "idle"]


async def turn(requests: RequestList, log: list[str], name: str, request: Request, length_s: float = 1) -> None:
    """Wait for the turn of a request on the list, run, and take it off."""
    try:
        await requests.wait_turn(request)
        log.append(f"{name} begins")
        await anyio.sleep(length_s)
        log.append(f"{name} ends")
    finally:
        requests.remove(request)


async def in_turn(requests: RequestList, log: list[str], script: dict[str, tuple[Request, float]]) -> None:
    """Start requests in the order of the script."""

    async def run(name: str, request: Request, length_s: float) -> None:
        requests.add(request)
        await turn(requests, log, name, request, length_s)

    async with anyio.create_task_group() as tasks:
        for name, (request, length_s) in script.items():
            tasks.start_soon(run, name, request, length_s)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 3),  # starts after
        st.integers(0, 7),  # offset
        st.integers(1, 4),  # length
        st.sampled_from(["plain", "serialising", "becomes", "becomes twice"]),
        st.integers(0, 3),  # time before it becomes serialising: its notifiers run
        st.integers(1, 3),  # time in the driver
        st.booleans(),  # cancelled at some time
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_conflicting_requests_never_run_at_once_and_all_of_them_end(script) -> None:
    requests = RequestList()
    running: list[Request] = []

    async def run(start_s: int, offset: int, length: int, kind: str, notify_s: int, run_s: int, cancel: bool) -> None:
        await anyio.sleep(start_s)
        request = Request(RequestKind.WRITE, offset, length, serialising=kind == "serialising")
        requests.add(request)
        try:
            with anyio.move_on_after(4 if cancel else 10_000):
                if kind == "plain":
                    await anyio.sleep(notify_s)
                await requests.wait_turn(request)
                if kind.startswith("becomes"):
                    await anyio.sleep(notify_s)
                    requests.promote(request, offset - offset % 4, 4 + length)
                    await requests.wait_turn(request)
                await driver(request, run_s)
                if kind == "becomes twice":
                    requests.promote(request, offset - offset % 4, 8 + length)
                    await requests.wait_turn(request)
                    await driver(request, run_s)
        finally:
            requests.remove(request)

    async def driver(request: Request, run_s: int) -> None:
        assert [other for other in running if other.conflicts(request)] == []
        running.append(request)
        try:
            await anyio.sleep(run_s)
        finally:
            running.remove(request)

    async def main() -> None:
        await asyncio.gather(*(run(*step) for step in script))

    run_virtual(main())
    assert len(requests) == 0
    assert requests.serialising == 0
