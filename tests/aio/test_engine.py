"""The contract of an I/O engine: whole transfers, errors mapped once, and buffers that nobody uses after a cancellation."""

from __future__ import annotations

import asyncio
import errno
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.aio.fallocate import KEEP_SIZE, PUNCH_HOLE
from blocklayer.aio.threads import ThreadEngine
from blocklayer.base.errors import (
    AccessDeniedError,
    CorruptImageError,
    IOFailedError,
    MissingFileError,
    NoSpaceError,
    StateError,
    TimedOutError,
    io_error,
)
from blocklayer.base.units import KIB, MIB
from tests.helpers.blocking import Blocking, turns

SIZE = 10_000


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "disk"
    file.write_bytes(pattern(0, SIZE))
    return file


@pytest.fixture
def fd(path):
    number = os.open(path, os.O_RDWR)
    yield number
    os.close(number)


def pattern(offset, length):
    return bytes((offset + index) * 7 % 251 + 1 for index in range(length))


# -- whole transfers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 0), (0, 1), (0, SIZE), (1, SIZE - 1), (SIZE - 1, 1), (SIZE - 1, 2), (SIZE, 5), (SIZE * 3, 4096), (5000, 9000)],
)
async def test_a_read_fills_the_whole_buffer_with_zeroes_behind_the_end(engine, fd, offset, length):
    buffer = bytearray(b"?" * length)
    await engine.read(fd, memoryview(buffer), offset)
    assert buffer == (pattern(0, SIZE) + bytes(4 * SIZE))[offset : offset + length]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize(
    "buffers",
    [[], [b""], [b"abc"], [b"a", b"", b"bc"], [b"x" * MIB, b"y"], [bytes([index % 256]) for index in range(3000)]],
    ids=["none", "empty", "one", "some", "large", "more than one call takes"],
)
async def test_a_write_stores_all_buffers_one_behind_the_other(engine, fd, path, buffers, durable):
    await engine.write(fd, [memoryview(buffer) for buffer in buffers], SIZE - 1, durable=durable)
    written = b"".join(buffers)
    assert path.read_bytes() == (pattern(0, SIZE - 1) + written if written else pattern(0, SIZE))


async def test_requests_of_all_kinds_run_at_once(engine, fd):
    """Each writer reads its own bytes back while all others do the same."""

    async def write_and_read(index):
        data = bytes([index]) * (KIB << index % 10)
        offset = index * MIB
        await engine.write(fd, [memoryview(data)], offset)
        if index % 7 == 0:
            await engine.sync(fd)
        buffer = bytearray(len(data) + 1)
        await engine.read(fd, memoryview(buffer), offset)
        return buffer == data + b"\0"

    assert await asyncio.gather(*map(write_and_read, range(1, 60))) == [True] * 59


async def test_a_hole_is_punched_and_space_is_reserved(engine, fd, path):
    await engine.allocate(fd, PUNCH_HOLE | KEEP_SIZE, 10, 20)
    await engine.allocate(fd, 0, SIZE, 90)
    assert path.read_bytes() == pattern(0, 10) + bytes(20) + pattern(30, SIZE - 30) + bytes(90)


# -- errors --------------------------------------------------------------------------------------------------------

CODES = {
    errno.EIO: IOFailedError,
    errno.ENOSPC: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.EROFS: AccessDeniedError,
    errno.EACCES: AccessDeniedError,
    errno.ENOENT: MissingFileError,
    errno.ETIMEDOUT: TimedOutError,
    errno.EBADF: IOFailedError,
}


def fails(code):
    def function(*_args):
        raise OSError(code, os.strerror(code))

    return function


@pytest.mark.parametrize(("code", "kind"), CODES.items(), ids=lambda value: errno.errorcode.get(value, ""))
async def test_an_error_is_mapped_once_and_keeps_its_errno(engine, fd, monkeypatch, code, kind):
    for name in ("preadv", "pwritev", "fdatasync"):
        monkeypatch.setattr(os, name, fails(code))
    calls = {
        f"read failed: {os.strerror(code)} (at 0x200+2)": engine.read(fd, memoryview(bytearray(2)), 512),
        f"write failed: {os.strerror(code)} (at 0x0+5)": engine.write(fd, [memoryview(b"abc"), memoryview(b"de")], 0),
        f"flush failed: {os.strerror(code)}": engine.sync(fd),
        f"function failed: {os.strerror(code)}": engine.call(fails(code), 1),
    }
    results = await asyncio.gather(*calls.values(), return_exceptions=True)
    assert [(type(error), error.errno, str(error)) for error in results] == [(kind, code, text) for text in calls]
    assert [(error.__cause__, error.__suppress_context__) for error in results] == [(None, True)] * 4


async def test_what_the_system_refuses_arrives_as_its_error(engine, path):
    readable, writable = os.open(path, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)
    requests = [
        engine.write(readable, [memoryview(b"x")], 0),
        engine.write(writable, [memoryview(b"x")], 0),
        engine.read(writable, memoryview(bytearray(1)), 0),
        engine.allocate(readable, 0, 0, 1),
        engine.allocate(writable, PUNCH_HOLE, 0, 1),
    ]
    errors = await asyncio.gather(*requests, return_exceptions=True)
    os.close(readable)
    os.close(writable)
    assert [(type(error), error.errno) for error in errors] == [
        (IOFailedError, errno.EBADF),
        (NoSpaceError, errno.ENOSPC),
        (IOFailedError, errno.EBADF),
        (IOFailedError, errno.EBADF),
        (IOFailedError, errno.EOPNOTSUPP),
    ]


@pytest.mark.parametrize(
    "error", [io_error(errno.EROFS, "open"), CorruptImageError("no"), KeyError("x"), ZeroDivisionError()]
)
async def test_errors_that_are_not_of_the_system_pass_as_they_are(engine, error):
    def function():
        raise error

    with pytest.raises(type(error)) as caught:
        await engine.call(function)
    assert caught.value is error


async def test_the_end_of_an_iterator_reaches_the_caller_as_a_coroutine_would_raise_it(engine):
    other = asyncio.ensure_future(engine.call(int, "7"))
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        await engine.call(next, iter(()))
    assert await other == 7


async def test_one_failed_request_leaves_its_neighbours_alone(engine, fd):
    buffers = [bytearray(10) for _ in range(5)]
    requests = [engine.read(-1 if index == 2 else fd, memoryview(buffers[index]), index * 10) for index in range(5)]
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [getattr(result, "errno", None) for result in results] == [None, None, errno.EBADF, None, None]
    assert b"".join(buffers) == pattern(0, 20) + bytes(10) + pattern(30, 20)


# -- any function --------------------------------------------------------------------------------------------------


async def test_a_function_runs_outside_the_event_loop_with_its_arguments(engine):
    def function(*args):
        return threading.get_ident(), args

    thread, args = await engine.call(function, 1, "b", weight=10 * MIB)
    assert thread != threading.get_ident()
    assert args == (1, "b")


async def test_a_function_that_blocks_holds_up_neither_the_loop_nor_what_comes_later(engine):
    """A flush can take seconds."""
    blocking = Blocking()
    slow = asyncio.ensure_future(engine.call(blocking))
    await blocking.reached.wait()
    async with asyncio.timeout(10):
        assert await engine.call(int, "7") == 7
    assert not slow.done()
    blocking.let_go()
    await slow


@pytest.mark.parametrize("weight", [0, MIB])
async def test_several_callers_block_at_the_same_time(engine, weight):
    """They come one by one; all three are in their function before one of them goes on."""
    barrier = threading.Barrier(3)
    waiting = []
    for _ in range(3):
        waiting.append(asyncio.ensure_future(engine.call(barrier.wait, 10, weight=weight)))
        await turns()
    assert sorted(await asyncio.gather(*waiting)) == [0, 1, 2]


# -- cancellation --------------------------------------------------------------------------------------------------


async def test_a_cancelled_caller_hears_of_it_only_when_its_buffer_is_free(engine, fd, monkeypatch):
    blocking = Blocking(os.preadv)
    monkeypatch.setattr(os, "preadv", blocking)
    buffer = bytearray(100)
    reading = asyncio.ensure_future(engine.read(fd, memoryview(buffer), 0))
    await blocking.reached.wait()
    for _ in range(3):
        reading.cancel()
        await turns()
    assert (reading.done(), blocking.done) == (False, 0)
    blocking.let_go()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert blocking.done == 1


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "bad medium"), ValueError("x")])
async def test_a_cancellation_is_not_lost_when_the_call_ends_in_between(engine, error):
    def outcome():
        if error is not None:
            raise error

    blocking = Blocking(outcome)
    calling = asyncio.ensure_future(engine.call(blocking))
    await blocking.reached.wait()
    calling.cancel()
    blocking.let_go()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert blocking.done == 1


async def test_what_is_cancelled_before_it_left_the_loop_never_runs(engine):
    ran = []
    neighbour = asyncio.ensure_future(engine.call(ran.append, "neighbour"))
    task = asyncio.ensure_future(cancels_itself(engine.call(ran.append, "cancelled")))
    assert await task == "cancelled"
    await neighbour
    await engine.close()
    assert ran == ["neighbour"]


async def cancels_itself(work):
    asyncio.current_task().cancel()
    try:
        await work
    except asyncio.CancelledError:
        return "cancelled"
    return "done"


async def test_a_cancelled_caller_leaves_its_neighbours_alone(engine):
    blocking = Blocking()
    calls = [asyncio.ensure_future(engine.call(blocking)) for _ in range(5)]
    await blocking.reached.wait()
    calls[2].cancel()
    await turns()
    blocking.let_go()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [type(None)] * 2 + [asyncio.CancelledError] + [type(None)] * 2


@given(steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.sampled_from([0, MIB])), max_size=12))
def test_whatever_is_cancelled_at_whatever_moment_everyone_gets_an_answer(steps):
    """A seeded mix of calls, turns of the loop and cancellations; at the end the engine closes, so nothing is lost."""

    async def main():
        engine = ThreadEngine(workers=2)
        entered = threading.Semaphore(0)
        tasks = []
        for before, after, weight in steps:
            task = asyncio.ensure_future(engine.call(entered.release, weight=weight))
            await turns(before)
            if after < 3:
                await turns(after)
                task.cancel()
            tasks.append(task)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()
        assert [type(result) for result in results if result is not None] == [
            asyncio.CancelledError for result in results if result is not None
        ]
        assert all(task.cancelled() or task.result() is None for task in tasks)

    asyncio.run(main())


# -- closing -------------------------------------------------------------------------------------------------------


async def test_closing_waits_for_what_is_in_flight(engine):
    blocking = Blocking(lambda: "late")
    calling = asyncio.ensure_future(engine.call(blocking))
    await blocking.reached.wait()
    closing = asyncio.ensure_future(engine.close())
    await turns()
    assert not closing.done()
    blocking.let_go()
    await closing
    assert await calling == "late"


async def test_a_closed_engine_refuses_every_call(engine, fd):
    await engine.close()
    requests = [
        engine.read(fd, memoryview(bytearray(1)), 0),
        engine.write(fd, [memoryview(b"x")], 0),
        engine.sync(fd),
        engine.allocate(fd, 0, 0, 1),
        engine.call(int),
    ]
    errors = await asyncio.gather(*requests, return_exceptions=True)
    assert [(type(error), str(error)) for error in errors] == [(StateError, "the I/O engine is closed")] * 5


async def test_closing_twice_and_an_unused_engine_is_fine(engine):
    await engine.close()
    await engine.close()


async def test_a_cancelled_close_can_be_repeated(engine):
    blocking = Blocking()
    calling = asyncio.ensure_future(engine.call(blocking))
    await blocking.reached.wait()
    closing = asyncio.ensure_future(engine.close())
    await turns()
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert closing.cancelled()
    blocking.let_go()
    await engine.close()
    assert calling.done()


async def test_closing_waits_for_cancelled_calls_too(engine):
    blocking = Blocking()
    calling = asyncio.ensure_future(engine.call(blocking))
    await blocking.reached.wait()
    calling.cancel()
    closing = asyncio.ensure_future(engine.close())
    await turns()
    assert (calling.done(), closing.done()) == (False, False)
    blocking.let_go()
    await closing
    assert blocking.done == 1
    await asyncio.gather(calling, return_exceptions=True)
    assert calling.cancelled()
