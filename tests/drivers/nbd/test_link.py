"""Link: requests wait for a server that comes back, but not for ever. Virtual time."""

from __future__ import annotations

import asyncio
import copy

import pytest

from blocklayer.base.errors import IOFailedError, NoSpaceError, ProtocolError
from blocklayer.drivers.nbd.link import Link
from tests.helpers.virtual_time import virtual_time


class Line:
    """A connection that lives for ``good`` requests."""

    def __init__(self, good=10**9, kind=IOFailedError):
        self.good, self.kind, self.error, self.closed = good, kind, None, False

    async def request(self):
        await asyncio.sleep(0)
        if self.error is None and self.good <= 0:
            self.error = self.kind("lost")
        if self.error is not None:
            raise copy.copy(self.error) from self.error
        self.good -= 1
        return self

    async def close(self):
        self.closed = True


class Dialler:
    """Hands out ``lines``; an exception among them is raised, and the last one for ever."""

    def __init__(self, *lines):
        self.lines, self.calls = list(lines), 0

    async def __call__(self):
        self.calls += 1
        await asyncio.sleep(0)
        line = self.lines.pop(0) if len(self.lines) > 1 else self.lines[0]
        if isinstance(line, Exception):
            raise line
        return line


REFUSED = IOFailedError("refused", errno=111)


def ask(link):
    return link.run(lambda line: line.request())


@virtual_time
async def test_without_a_delay_a_request_fails_and_the_next_one_connects():
    dial = Dialler(second := Line())
    link = Link(Line(0), dial, delay_s=0)
    with pytest.raises(IOFailedError, match="lost"):
        await ask(link)
    assert dial.calls == 0
    assert await ask(link) is second
    await link.close()
    assert second.closed


@virtual_time
async def test_with_a_delay_a_request_is_sent_again():
    dial = Dialler(REFUSED, REFUSED, second := Line())
    link = Link(Line(0), dial, delay_s=5)
    assert await asyncio.gather(*(ask(link) for _ in range(20))) == [second] * 20
    assert dial.calls == 3


@virtual_time
async def test_a_server_that_stays_away_fails_all_after_the_delay():
    loop, dial = asyncio.get_running_loop(), Dialler(REFUSED)
    link = Link(Line(0), dial, delay_s=5)
    failed = await asyncio.gather(*(ask(link) for _ in range(20)), return_exceptions=True)
    assert {str(error) for error in failed} == {"refused"}
    assert 5 <= loop.time() < 6
    calls = dial.calls
    with pytest.raises(IOFailedError, match="refused"):
        await ask(link)
    assert (dial.calls, loop.time() < 6) == (calls + 1, True)


@virtual_time
async def test_a_server_that_dies_of_a_request_is_not_asked_for_ever():
    class Mortal(Dialler):
        async def __call__(self):
            self.calls += 1
            await asyncio.sleep(1)
            return Line(0)

    link = Link(Line(0), dial := Mortal(), delay_s=5)
    with pytest.raises(IOFailedError, match="lost"):
        await ask(link)
    assert dial.calls <= 6


@virtual_time
async def test_the_servers_own_errors_are_not_repeated():
    async def full(_line):
        raise NoSpaceError("full")

    link = Link(Line(), dial := Dialler(Line()), delay_s=5)
    with pytest.raises(NoSpaceError):
        await link.run(full)
    assert dial.calls == 0


@virtual_time
async def test_a_server_that_breaks_the_protocol_is_not_asked_again():
    link = Link(Line(0, ProtocolError), dial := Dialler(Line()), delay_s=5)
    with pytest.raises(ProtocolError):
        await ask(link)
    assert dial.calls == 0


@virtual_time
async def test_whoever_dials_may_be_cancelled():
    link = Link(Line(0), Dialler(*[REFUSED] * 30, last := Line()), delay_s=100)
    first, second = (asyncio.ensure_future(ask(link)) for _ in range(2))
    await asyncio.sleep(1)
    first.cancel()
    assert await second is last
