"""Injected faults: which requests a rule hits, and what becomes of them: errors, delays, torn writes, requests held back."""

from __future__ import annotations

import asyncio
import errno
from contextlib import asynccontextmanager

import pytest

import blocklayer
from blocklayer.drivers import faults
from blocklayer.drivers.faults import EVENTS, Rule
from tests.helpers.virtual_time import virtual_loop, virtual_time

SIZE = 64 * 1024


@asynccontextmanager
async def faulty(*rules, **options):
    """A disk in memory below a filter with ``rules``: the node, and its driver."""
    async with blocklayer.Graph() as graph:
        below = {"driver": "memory", "size": SIZE, "node-name": "below"}
        disk = await graph.open({"driver": "faults", "file": below, "rules": list(rules), **options}, node_name="disk")
        yield disk, disk.driver
        disk.driver.clear()  # closing flushes


async def outcomes(*requests):
    """For each of ``requests``, one after the other: the errno, or None."""
    found = []
    for request in requests:
        try:
            await request
        except OSError as error:
            found.append(error.errno)
        else:
            found.append(None)
    return found


def each_kind(disk):
    """One request of each event."""
    return {
        "read": lambda: disk.read(0, 512),
        "write": lambda: disk.write(0, b"x" * 512),
        "write_zeroes": lambda: disk.write_zeroes(0, 512),
        "discard": lambda: disk.discard(0, 512),
        "flush": disk.flush,
        "truncate": lambda: disk.truncate(SIZE),
        "block_status": lambda: disk.driver.block_status(0, 512),
    }


# -- which requests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
async def test_a_rule_hits_requests_of_its_kind(event):
    async with faulty(Rule(event)) as (disk, _driver):
        kinds = each_kind(disk)
        assert set(kinds) == set(EVENTS) - {"any"}
        failed = [name for name, request in kinds.items() if await outcomes(request()) == [errno.EIO]]
        assert failed == ([event] if event != "any" else list(kinds))


async def test_without_rules_everything_passes():
    async with faulty() as (disk, _driver):
        assert await outcomes(*(request() for request in each_kind(disk).values())) == [None] * 7
        assert disk.try_read(0, 1) == b"\0"


@pytest.mark.parametrize(
    ("place", "hit"),
    [
        ((0, 4096), False),
        ((4095, 1), False),
        ((4095, 2), True),
        ((4096, 1), True),
        ((0, SIZE), True),
        ((8191, 1), True),
        ((8192, 1), False),
    ],
    ids=str,
)
async def test_a_rule_with_a_range_hits_what_touches_it(place, hit):
    async with faulty({"event": "read", "offset": 4096, "length": "4k"}) as (disk, _driver):
        assert await outcomes(disk.read(*place)) == [errno.EIO if hit else None]
        assert (disk.try_read(*place) is None) == hit


async def test_a_range_without_a_length_goes_to_the_end():
    async with faulty(Rule("write", offset=4096)) as (disk, _driver):
        assert await outcomes(disk.write(0, b"x"), disk.write(SIZE - 1, b"x")) == [None, errno.EIO]


@pytest.mark.parametrize(
    ("rule", "failing"),
    [
        (Rule("write"), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Rule("write", once=True), [1]),
        (Rule("write", nth=3), [3]),
        (Rule("write", nth=3, once=True), [3]),
        (Rule("write", every=3), [3, 6]),
        (Rule("write", every=3, once=True), [3]),
        (Rule("write", probability=0), []),
        (Rule("write", offset=512, nth=1), []),
    ],
    ids=lambda value: repr(value) if isinstance(value, Rule) else "",
)
async def test_which_of_eight_writes_fail(rule, failing):
    async with faulty(rule) as (disk, driver):
        found = await outcomes(*(disk.write(0, b"x") for _ in range(8)))
        assert [number for number, code in enumerate(found, 1) if code] == failing
        assert driver.hits(rule) == len(failing)


async def test_others_do_not_count_for_the_nth():
    async with faulty(Rule("write", offset=512, nth=2)) as (disk, _driver):
        requests = (
            disk.write(512, b"x"),
            disk.read(512, 1),
            disk.write(0, b"x"),
            disk.write(512, b"x"),
            disk.write(512, b""),
        )
        assert await outcomes(*requests) == [None, None, None, errno.EIO, None]


async def by_chance(seed):
    async with faulty(Rule("read", probability=0.3), seed=seed) as (disk, _driver):
        return [code is not None for code in await outcomes(*(disk.read(0, 1) for _ in range(300)))]


async def test_a_seed_repeats_what_happened_by_chance():
    first = await by_chance(1)
    assert await by_chance(1) == first
    assert await by_chance("1") == first
    assert await by_chance(2) != first
    assert 60 < sum(first) < 120


async def test_the_first_rule_that_hits_decides():
    rules = Rule("write", nth=2, errno=errno.ENOSPC), Rule("any", errno=errno.EIO), Rule("read", errno=errno.EPERM)
    async with faulty(*rules) as (disk, driver):
        assert await outcomes(disk.write(0, b"x"), disk.write(0, b"x"), disk.read(0, 1)) == [5, errno.ENOSPC, 5]
        assert [driver.hits(rule) for rule in rules] == [1, 2, 0]


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EIO, blocklayer.IOFailedError),
        (errno.ENOSPC, blocklayer.NoSpaceError),
        (errno.EACCES, blocklayer.AccessDeniedError),
        (errno.ETIMEDOUT, blocklayer.TimedOutError),
    ],
)
async def test_an_error_is_of_the_class_of_its_errno_and_says_where(code, kind):
    async with faulty(Rule("write", errno=code)) as (disk, _driver):
        with pytest.raises(kind) as caught:
            await disk.write(4096, b"abc")
        error = caught.value
        assert (type(error), error.errno, error.node) == (kind, code, "disk")
        assert (error.offset, error.length) == (4096, 3)
        assert str(error).startswith("node 'disk': write (injected) failed: ")
        assert str(error).endswith("(at 0x1000+3)")


async def test_a_request_that_fails_changes_nothing():
    async with faulty(*(Rule(event) for event in ("write", "write_zeroes", "discard", "truncate"))) as (disk, driver):
        below = driver.file.node
        await driver.file.write(0, memoryview(b"old" * 100))
        kinds = each_kind(disk)
        await outcomes(*(kinds[kind]() for kind in ("write", "write_zeroes", "discard", "truncate")))
        await outcomes(disk.truncate(5))
        assert (await below.read(0, 300), disk.size) == (b"old" * 100, SIZE)


async def test_errors_are_counted_by_the_node():
    async with faulty(Rule("read", nth=2)) as (disk, _driver):
        await outcomes(*(disk.read(0, 10) for _ in range(3)))
        assert (disk.statistics.read.operations, disk.statistics.read.errors) == (2, 1)


async def test_a_flush_that_fails_at_closing_is_told_and_everything_is_closed():
    async with faulty(Rule("flush", errno=errno.ENOSPC)) as (disk, driver):
        below = driver.file.node
        await disk.write(0, b"x")
        with pytest.raises(blocklayer.NoSpaceError):
            await disk.close()
        assert (disk.closed, below.closed) == (True, True)


async def test_a_rule_without_errno_fails_nothing():
    async with faulty(Rule("write", errno=0)) as (disk, driver):
        assert await outcomes(disk.write(0, b"x")) == [None]
        assert await disk.read(0, 1) == b"x"
        (rule,) = (state["hits"] for state in (await driver.info())["rules"])
        assert rule == 1


async def test_compressed_writes_are_writes(tmp_path):
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / "a.qcow2", format="qcow2", size="1M")
        image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / "a.qcow2")}}
        disk = await graph.open({"driver": "faults", "file": image, "rules": [{"event": "write", "nth": 1}]})
        assert await outcomes(*(disk.write_compressed(0, bytes(65536)) for _ in range(2))) == [errno.EIO, None]


# -- torn writes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sectors", "stored"), [(0, 0), (1, 512), (3, 1536), (4, 2000), (100, 2000)])
async def test_a_torn_write_stores_its_first_sectors_and_fails(sectors, stored):
    async with faulty(Rule("write", torn=sectors)) as (disk, _driver):
        assert await outcomes(disk.write(100, b"x" * 2000)) == [errno.EIO]
        assert await disk.read(0, SIZE) == bytes(100) + b"x" * stored + bytes(SIZE - 100 - stored)


async def test_what_is_no_write_cannot_be_torn_but_fails():
    async with faulty(Rule("any", torn=1)) as (disk, driver):
        await driver.file.write(0, memoryview(b"x" * 1024))
        assert await outcomes(disk.discard(0, 1024), disk.write_zeroes(0, 1024)) == [errno.EIO] * 2
        assert await driver.file.node.read(0, 1024) == b"x" * 1024


# -- delays ----------------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_delayed_request_is_done_later_and_others_are_not():
    async with faulty(Rule("write", delay_s=2.5, errno=0), {"event": "flush", "delay-s": "0.5"}) as (disk, _driver):
        writing = asyncio.ensure_future(disk.write(0, b"x"))
        await disk.read(0, 1)
        assert virtual_loop().time() == 0
        await writing
        assert (virtual_loop().time(), await disk.read(0, 1)) == (2.5, b"x")
        assert await outcomes(disk.flush()) == [errno.EIO]
        assert virtual_loop().time() == 3.0


async def test_delays_pass_on_the_clock_that_is_given(monkeypatch):
    slept = []

    class Clock:
        async def sleep(self, seconds):
            slept.append(seconds)

    monkeypatch.setattr(faults, "MonotonicClock", Clock)
    async with faulty(Rule("write", delay_s=1000, errno=0)) as (disk, _driver):
        await disk.write(0, b"x")
    assert slept == [1000]


# -- requests held back ------------------------------------------------------------------------------------------------


@virtual_time
async def test_a_held_request_goes_on_when_it_is_released():
    async with faulty() as (disk, driver):
        rule = driver.add(Rule("write", hold=True, errno=0))
        writing = asyncio.ensure_future(disk.write(0, b"x"))
        await driver.wait_held(rule)
        assert (await disk.read(0, 1), writing.done()) == (b"\0", False)
        driver.release(rule)
        await writing
        assert await disk.read(0, 1) == b"x"
        await disk.write(0, b"y")  # nothing is held any more
        assert driver.hits(rule) == 2


@virtual_time
async def test_a_held_request_may_fail_afterwards():
    async with faulty() as (disk, driver):
        rule = driver.add(Rule("write", hold=True, errno=errno.ENOSPC))
        writing = asyncio.ensure_future(outcomes(disk.write(0, b"x")))
        await driver.wait_held(rule)
        driver.release(rule)
        assert await writing == [errno.ENOSPC]


@virtual_time
async def test_only_the_nth_request_is_held():
    async with faulty() as (disk, driver):
        rule = driver.add(Rule("write", nth=2, hold=True, errno=0))
        await disk.write(0, b"a")
        second = asyncio.ensure_future(disk.write(1, b"b"))
        await driver.wait_held(rule)
        await disk.write(2, b"c")
        assert await disk.read(0, 3) == b"a\0c"
        driver.release(rule)
        await second
        assert await disk.read(0, 3) == b"abc"


@virtual_time
@pytest.mark.parametrize("how", ["remove", "clear"])
async def test_a_rule_that_is_taken_away_lets_go(how):
    async with faulty() as (disk, driver):
        rule = driver.add(Rule("write", hold=True, errno=0))
        writes = [asyncio.ensure_future(disk.write(at, b"x")) for at in range(3)]
        await driver.wait_held(rule)
        driver.clear() if how == "clear" else driver.remove(rule)
        await asyncio.gather(*writes)
        assert await disk.read(0, 3) == b"xxx"


@virtual_time
async def test_a_held_request_that_is_cancelled_never_happens():
    async with faulty() as (disk, driver):
        rule = driver.add(Rule("write", hold=True, errno=0))
        writing = asyncio.ensure_future(disk.write(0, b"x"))
        await driver.wait_held(rule)
        writing.cancel()
        await asyncio.wait([writing])
        driver.release(rule)
        assert await disk.read(0, 1) == b"\0"
        assert len(disk.path.requests) == 0


@virtual_time
async def test_a_drained_section_waits_for_what_is_held():
    async with faulty() as (disk, driver):
        rule = driver.add(Rule("write", hold=True, errno=0))
        writing = asyncio.ensure_future(disk.write(0, b"x"))
        await driver.wait_held(rule)
        asyncio.get_running_loop().call_later(7, driver.release, rule)
        async with disk.drained():
            assert (writing.done(), virtual_loop().time()) == (True, 7)


# -- without waiting -------------------------------------------------------------------------------------------------


async def test_what_a_rule_could_want_is_not_answered_at_once():
    """Whether it is hit is decided once, when the coroutine runs: a try is no draw, and no count."""
    async with faulty(Rule("read", offset=512, length=512, nth=2)) as (disk, driver):
        (rule,) = driver._rules
        assert [disk.try_read(512, 1) for _ in range(5)] == [None] * 5
        assert disk.try_read(0, 512) == bytes(512)
        assert await outcomes(disk.read(512, 1), disk.read(512, 1)) == [None, errno.EIO]
        driver.remove(rule)
        assert disk.try_read(512, 1) == b"\0"


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": []}, "unknown option 'rule'; known options: rules, seed"),
        ({"rules": "write"}, "option 'rules' cannot be 'write'; it takes a list of mappings"),
        ({"rules": ["write"]}, "option 'rules' cannot be ['write']; it takes a list of mappings"),
        ({"rules": {"event": "write"}}, "option 'rules' cannot be {'event': 'write'}; it takes a list of mappings"),
        ({"rules": [{"events": "write"}]}, "unknown option 'events'; known options: delay_s, errno, event, every"),
        ({"rules": [{"event": "cough"}]}, "event 'cough' is none of read, write, write_zeroes, discard, flush"),
        ({"rules": [{"nth": "second"}]}, "option 'nth' cannot be 'second'; it takes a number or size"),
        ({"rules": [{"probability": 2}]}, "nth and every are 0 or positive, probability is from 0 to 1"),
        ({"rules": [{"probability": -0.5}]}, "nth and every are 0 or positive, probability is from 0 to 1"),
        ({"rules": [{"delay_s": -1}]}, "delay_s and torn are 0 or positive"),
        ({"rules": [{"torn": 1, "errno": 0}]}, "a torn write fails: it needs an errno"),
        ({"seed": "dice"}, "option 'seed' cannot be 'dice'; it takes a number or size"),
    ],
    ids=str,
)
async def test_wrong_options_are_refused(options, message):
    async with blocklayer.Graph() as graph:
        with pytest.raises(blocklayer.OptionError) as caught:
            await graph.open({"driver": "faults", "file": {"driver": "memory", "size": SIZE}, **options})
        assert str(caught.value).startswith(message)
        assert graph.nodes == {}


@pytest.mark.parametrize("fields", [{"nth": -1}, {"every": -1}, {"torn": -1}, {"delay_s": -0.1}], ids=str)
def test_a_rule_that_could_not_be_is_no_rule(fields):
    with pytest.raises(blocklayer.OptionError):
        Rule(**fields)


async def test_equal_rules_are_different_rules():
    async with faulty() as (disk, driver):
        first, second = driver.add(Rule("write", once=True)), driver.add(Rule("write", once=True))
        assert await outcomes(*(disk.write(0, b"x") for _ in range(3))) == [5, 5, None]
        assert (driver.hits(first), driver.hits(second)) == (1, 1)
