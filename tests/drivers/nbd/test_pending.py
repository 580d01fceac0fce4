"""Pending: a reply is believed only if it is whole, and a caller goes on only when its data are not needed."""

from __future__ import annotations

import asyncio

import pytest

from blocklayer.base.errors import IOFailedError, NoSpaceError, ProtocolError
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd.protocol import Command, NbdErrno
from blocklayer.codec.nbd.transmission import Request
from blocklayer.drivers.nbd import pending as module
from blocklayer.drivers.nbd.pending import Pending


def a_request(command=Command.READ, offset=100, length=50):
    return Pending(Request(command, 0, 1, offset, length), None, asyncio.get_running_loop().create_future())


async def test_pieces_in_any_order_make_a_whole():
    pending = a_request()
    for offset, length in [(120, 10), (100, 10), (140, 10), (110, 10), (130, 10)]:
        with pytest.raises(ProtocolError, match="ends before all"):
            pending.check_end()
        pending.cover(offset, length)
    pending.check_end()


@pytest.mark.parametrize(("offset", "length"), [(110, 10), (105, 6), (119, 1), (119, 20), (100, 50), (112, 2)])
async def test_a_byte_comes_once(offset, length):
    pending = a_request()
    pending.cover(110, 10)
    with pytest.raises(ProtocolError, match="twice"):
        pending.cover(offset, length)


async def test_a_read_in_too_many_pieces_is_refused(monkeypatch):
    monkeypatch.setattr(module, "PIECES_MAX", 3)
    pending = a_request()
    for offset in (100, 102, 104):
        pending.cover(offset, 1)
    pending.cover(101, 1)
    pending.cover(110, 1)
    with pytest.raises(ProtocolError, match="more than 3 pieces"):
        pending.cover(120, 1)


async def test_block_status_must_tell_something():
    with pytest.raises(ProtocolError, match="tells nothing"):
        a_request(Command.BLOCK_STATUS).check_end()
    a_request(Command.FLUSH).check_end()


async def test_the_first_error_counts_and_says_where():
    pending = a_request(Command.WRITE)
    pending.fail(payloads.ErrorPayload(NbdErrno.ENOSPC, "full", 120))
    pending.fail(payloads.ErrorPayload(NbdErrno.EIO, "", None))
    assert isinstance(pending.error, NoSpaceError)
    assert (pending.error.offset, "full" in str(pending.error)) == (120, True)
    with pytest.raises(ProtocolError, match="an error at"):
        pending.fail(payloads.ErrorPayload(NbdErrno.EIO, "", 150))


async def test_a_caller_waits_for_the_reply_and_for_its_data():
    pending = a_request(Command.WRITE)
    pending.sent, pending.replied, pending.error = False, True, IOFailedError("x")
    pending.finish()
    assert not pending.future.done()
    pending.release()
    assert pending.future.result() is pending.error
    pending.release()
