"""Requests and replies: headers come back, and a client finds out when a server breaks the rules."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import ProtocolError
from blocklayer.codec.nbd.protocol import REQUEST_MAX, Command, CommandFlags, ReplyFlags, ReplyType
from blocklayer.codec.nbd.transmission import (
    EXTENDED_REPLY,
    EXTENDED_REQUEST,
    REQUEST,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
    Chunk,
    ReplyKind,
    Request,
    check_answer,
    check_content,
    pack_chunk,
    pack_request,
    pack_simple_reply,
    parse_chunk,
    parse_request,
    payload_length,
)

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
DONE = int(ReplyFlags.DONE)
SHAPES = {"simple": (False, False), "structured": (True, False), "extended": (True, True)}


def parse(data, shape, **options):
    structured, extended = SHAPES[shape]
    return parse_chunk(data, 0, structured=structured, extended=extended, **options)


def chunk(type, length, *, shape="structured", done=True):
    return parse(pack_chunk(7, type, length, done=done, extended=shape == "extended", offset=512), shape)


def read(offset=512, length=4096):
    return Request(Command.READ, 0, 7, offset, length)


# -- layout ----------------------------------------------------------------------------------------------------


def test_headers_have_the_sizes_of_the_specification():
    layouts = (REQUEST, EXTENDED_REQUEST, SIMPLE_REPLY, STRUCTURED_REPLY, EXTENDED_REPLY)
    assert [layout.size for layout in layouts] == [28, 32, 16, 20, 32]


def test_bytes_lie_where_the_specification_has_them():
    assert pack_request(Command.WRITE, 1, 0x0123456789ABCDEF, 512, 4096, extended=False).hex(" ", 4) == (
        "25609513 00010001 01234567 89abcdef 00000000 00000200 00001000"
    )
    assert pack_request(Command.TRIM, 0, 7, 512, 1 << 40, extended=True).hex(" ", 4) == (
        "21e41c71 00000004 00000000 00000007 00000000 00000200 00000100 00000000"
    )
    assert pack_simple_reply(7, 5).hex(" ", 4) == "67446698 00000005 00000000 00000007"
    assert pack_chunk(7, ReplyType.NONE, 0, done=True, extended=False).hex(" ", 4) == (
        "668e33ef 00010000 00000000 00000007 00000000"
    )
    assert pack_chunk(7, ReplyType.OFFSET_DATA, 520, done=False, extended=True, offset=512).hex(" ", 4) == (
        "6e8a278c 00000001 00000000 00000007 00000000 00000200 00000000 00000208"
    )


# -- requests --------------------------------------------------------------------------------------------------


@given(U16, U16, U64, U64, U32)
def test_compact_requests_come_back(command, flags, cookie, offset, length):
    request = Request(command, flags, cookie, offset, length)
    assert parse_request(b"xx" + pack_request(*request, extended=False), 2, extended=False) == request


@given(st.sampled_from([command for command in Command if command != Command.WRITE]), U16, U64, U64, U64)
def test_extended_requests_come_back(command, flags, cookie, offset, length):
    request = Request(command, flags, cookie, offset, length)
    assert parse_request(pack_request(*request, extended=True), 0, extended=True) == request


def test_an_extended_write_says_that_its_length_is_that_of_its_payload():
    request = parse_request(pack_request(Command.WRITE, 0, 7, 0, 512, extended=True), 0, extended=True)
    assert request.flags == CommandFlags.PAYLOAD_LEN


@pytest.mark.parametrize("extended", [False, True])
def test_a_request_that_is_cut_anywhere_is_refused(extended):
    whole = pack_request(Command.READ, 0, 7, 0, 512, extended=extended)
    for end in range(len(whole)):
        with pytest.raises(ProtocolError, match="fewer are there"):
            parse_request(whole[:end], 0, extended=extended)


@pytest.mark.parametrize("extended", [False, True])
def test_the_other_shape_is_not_taken_for_a_request(extended):
    other = pack_request(Command.READ, 0, 7, 0, 512, extended=not extended)
    with pytest.raises(ProtocolError, match="in place of"):
        parse_request(other + bytes(8), 0, extended=extended)


@pytest.mark.parametrize(
    ("command", "flags", "extended", "expected"),
    [
        (Command.WRITE, 0, False, 512),
        (Command.WRITE, CommandFlags.FUA, False, 512),
        (Command.READ, 0, False, 0),
        (Command.TRIM, CommandFlags.PAYLOAD_LEN, False, 0),
        (Command.WRITE, 0, True, 0),
        (Command.WRITE, CommandFlags.PAYLOAD_LEN, True, 512),
        (Command.TRIM, CommandFlags.PAYLOAD_LEN, True, 512),
        (99, CommandFlags.PAYLOAD_LEN, True, 512),
    ],
)
def test_what_follows_a_request_is_told_by_its_command_or_by_its_flag(command, flags, extended, expected):
    assert payload_length(Request(command, flags, 7, 0, 512), extended=extended) == expected


# -- replies ---------------------------------------------------------------------------------------------------


@given(U64, U32, st.sampled_from(["simple", "structured"]))
def test_simple_replies_come_back(cookie, error, shape):
    found = parse(pack_simple_reply(cookie, error), shape)
    assert found == Chunk(ReplyKind.SIMPLE, 0, 0, cookie, 0, 0, error)
    assert found.done
    assert found.is_error == bool(error)


@given(U64, st.integers(9, REQUEST_MAX + 8), st.booleans())
def test_chunks_come_back(cookie, length, done):
    found = parse(pack_chunk(cookie, ReplyType.OFFSET_DATA, length, done=done, extended=False), "structured")
    assert found == Chunk(ReplyKind.STRUCTURED, DONE if done else 0, 1, cookie, 0, length, 0)
    assert found.done == done
    assert not found.is_error


@given(U64, U64, st.integers(9, REQUEST_MAX + 8))
def test_extended_chunks_come_back_with_the_offset_of_the_request(cookie, offset, length):
    packed = pack_chunk(cookie, ReplyType.OFFSET_DATA, length, done=True, extended=True, offset=offset)
    assert parse(packed, "extended") == Chunk(ReplyKind.EXTENDED, DONE, 1, cookie, offset, length, 0)


@pytest.mark.parametrize(
    ("shape", "whole"),
    [
        ("simple", pack_simple_reply(7, 5)),
        ("structured", pack_simple_reply(7, 5)),
        ("structured", pack_chunk(7, ReplyType.NONE, 0, done=True, extended=False)),
        ("extended", pack_chunk(7, ReplyType.NONE, 0, done=True, extended=True)),
    ],
)
def test_a_header_that_is_not_wholly_there_is_waited_for(shape, whole):
    assert [parse(whole[:end], shape) for end in range(len(whole))] == [None] * len(whole)
    assert parse(whole, shape).kind == len(whole)
    assert parse_chunk(b"xyz" + whole, 3, structured=shape != "simple", extended=shape == "extended") is not None


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ("simple", pack_chunk(7, ReplyType.NONE, 0, done=True, extended=False)),
        ("simple", pack_chunk(7, ReplyType.NONE, 0, done=True, extended=True)),
        ("structured", pack_chunk(7, ReplyType.NONE, 0, done=True, extended=True)),
        ("extended", pack_chunk(7, ReplyType.NONE, 0, done=True, extended=False)),
        ("extended", pack_simple_reply(7)),
        ("structured", bytes(32)),
    ],
)
def test_a_shape_that_was_not_negotiated_is_refused(shape, data):
    with pytest.raises(ProtocolError, match="not negotiated"):
        parse(data, shape)


@pytest.mark.parametrize(
    ("type", "good", "bad"),
    [
        (ReplyType.NONE, [0], [1, 8]),
        (ReplyType.OFFSET_DATA, [9, REQUEST_MAX + 8], [0, 8, REQUEST_MAX + 9, 2**32 - 1]),
        (ReplyType.OFFSET_HOLE, [12], [0, 11, 13]),
        (ReplyType.BLOCK_STATUS, [12, 20, 4 + 8 * 2**20], [0, 4, 8, 13, 4 + 8 * (2**20 + 1)]),
        (ReplyType.ERROR, [6, 4102], [0, 5, 4103]),
        (ReplyType.ERROR_OFFSET, [14, 4110], [0, 13, 4111]),
        (0x8077, [6, 4102], [5, 2**32 - 1]),
    ],
)
def test_a_type_has_its_lengths(type, good, bad):
    assert [chunk(type, length).length for length in good] == good
    for length in bad:
        with pytest.raises(ProtocolError, match="cannot be"):
            chunk(type, length)


def test_extended_block_status_is_for_extended_replies_and_has_its_lengths():
    assert chunk(ReplyType.BLOCK_STATUS_EXT, 24, shape="extended").length == 24
    for length in (8, 16, 25, 2**40):
        with pytest.raises(ProtocolError, match="cannot be"):
            chunk(ReplyType.BLOCK_STATUS_EXT, length, shape="extended")
    with pytest.raises(ProtocolError, match="without extended headers"):
        chunk(ReplyType.BLOCK_STATUS_EXT, 24)


def test_extended_replies_may_carry_the_compact_block_status():
    assert chunk(ReplyType.BLOCK_STATUS, 12, shape="extended").type == ReplyType.BLOCK_STATUS


@pytest.mark.parametrize("type", [3, 4, 7, 0x7FFF])
def test_an_unknown_type_is_refused(type):
    with pytest.raises(ProtocolError, match="unknown type"):
        chunk(type, 0)


def test_an_unknown_error_is_an_error():
    assert chunk(0x8077, 6).is_error


def test_none_is_always_the_last_chunk():
    with pytest.raises(ProtocolError, match="not the last"):
        chunk(ReplyType.NONE, 0, done=False)


def test_unknown_flags_are_ignored():
    data = bytearray(pack_chunk(7, ReplyType.NONE, 0, done=True, extended=False))
    data[4:6] = b"\xff\xff"
    assert parse(data, "structured").done


def test_a_client_says_how_long_its_longest_read_is():
    data = pack_chunk(7, ReplyType.OFFSET_DATA, 8 + 513, done=True, extended=False)
    assert parse(data, "structured", data_max=513).length == 521
    with pytest.raises(ProtocolError):
        parse(data, "structured", data_max=512)


@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.binary(max_size=40))
def test_any_bytes_are_a_header_or_none_yet_or_a_protocol_error(shape, data):
    with suppress(ProtocolError):
        assert parse(data, shape) is None or len(data) >= 16


@pytest.mark.parametrize("shape", SHAPES)
@given(flags=U16, type=st.one_of(U16, st.sampled_from(ReplyType)), length=U32)
def test_what_passes_can_be_received_in_bounded_memory(shape, flags, type, length):
    data = bytearray(pack_chunk(7, type, length, done=False, extended=shape == "extended"))
    data[4:6] = flags.to_bytes(2, "big")
    with suppress(ProtocolError):
        assert parse(data, shape).length <= REQUEST_MAX + 8


# -- a reply and its request -----------------------------------------------------------------------------------


def test_a_simple_reply_does_not_answer_a_read_where_chunks_were_negotiated():
    simple = parse(pack_simple_reply(7), "structured")
    failed = parse(pack_simple_reply(7, 5), "structured")
    check_answer(simple, read(), structured=False)
    check_answer(simple, Request(Command.WRITE, 0, 7, 0, 512), structured=True)
    check_answer(failed, Request(Command.BLOCK_STATUS, 0, 7, 0, 512), structured=True)
    for reply, command in ((simple, Command.READ), (failed, Command.READ), (simple, Command.BLOCK_STATUS)):
        with pytest.raises(ProtocolError, match="although chunks"):
            check_answer(reply, Request(command, 0, 7, 0, 512), structured=True)


@pytest.mark.parametrize(
    ("type", "length", "command"),
    [
        (ReplyType.OFFSET_DATA, 9, Command.READ),
        (ReplyType.OFFSET_HOLE, 12, Command.READ),
        (ReplyType.BLOCK_STATUS, 12, Command.BLOCK_STATUS),
    ],
)
def test_content_answers_its_command_and_no_other(type, length, command):
    for other in Command:
        request = Request(other, 0, 7, 512, 4096)
        if other == command:
            check_answer(chunk(type, length), request, structured=True)
        else:
            with pytest.raises(ProtocolError, match="answers command"):
                check_answer(chunk(type, length), request, structured=True)


@pytest.mark.parametrize(("type", "length"), [(ReplyType.NONE, 0), (ReplyType.ERROR, 6), (ReplyType.ERROR_OFFSET, 14)])
def test_the_end_and_errors_answer_every_command(type, length):
    for command in Command:
        check_answer(chunk(type, length), Request(command, 0, 7, 512, 4096), structured=True)


def test_an_extended_reply_repeats_the_offset_of_its_request():
    check_answer(chunk(ReplyType.NONE, 0, shape="extended"), read(512), structured=True)
    with pytest.raises(ProtocolError, match="names offset"):
        check_answer(chunk(ReplyType.NONE, 0, shape="extended"), read(1024), structured=True)


@pytest.mark.parametrize(
    ("offset", "length", "fine"),
    [
        (512, 4096, True),
        (4607, 1, True),
        (512, 1, True),
        (511, 2, False),
        (4608, 1, False),
        (512, 4097, False),
        (600, 0, False),
        (2**64 - 1, 4096, False),
    ],
)
def test_content_lies_inside_the_read(offset, length, fine):
    if fine:
        check_content(offset, length, read())
    else:
        with pytest.raises(ProtocolError, match="for a read of"):
            check_content(offset, length, read())
