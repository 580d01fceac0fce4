"""Small payloads: what is packed comes back, and what cannot be is refused by type."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import ProtocolError
from blocklayer.codec.nbd import payloads
from blocklayer.codec.nbd.payloads import (
    BlockStatus,
    ErrorPayload,
    check_extents,
    cut_text,
    pack_block_status,
    pack_block_status_ext,
    pack_data_offset,
    pack_error,
    pack_filter,
    pack_hole,
    parse_block_status,
    parse_block_status_ext,
    parse_data_offset,
    parse_error,
    parse_filter,
    parse_hole,
    printable,
)
from blocklayer.codec.nbd.protocol import NAME_MAX, ReplyType

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
LINES = st.text(st.characters(categories=("L", "N", "P")), max_size=1000)

PARSERS = {
    "data offset": parse_data_offset,
    "hole": parse_hole,
    "error": parse_error,
    "error with offset": lambda data: parse_error(data, type=ReplyType.ERROR_OFFSET),
    "status": parse_block_status,
    "extended status": parse_block_status_ext,
    "filter": parse_filter,
}

EXAMPLES = {
    "hole": pack_hole(65536, 4096),
    "error": pack_error(5, "it broke"),
    "error with offset": pack_error(5, "it broke", offset=512),
    "status": pack_block_status(7, [(4096, 3), (512, 0)]),
    "extended status": pack_block_status_ext(7, [(1 << 40, 3), (512, 0)]),
    "filter": pack_filter(1 << 40, [1, 7]),
}


def test_bytes_lie_where_the_specification_has_them() -> None:
    assert EXAMPLES["hole"].hex(" ", 4) == "00000000 00010000 00001000"
    assert EXAMPLES["error"] == bytes.fromhex("00000005 0008") + b"it broke"
    assert EXAMPLES["error with offset"] == bytes.fromhex("00000005 0008") + b"it broke" + (512).to_bytes(8, "big")
    assert EXAMPLES["status"].hex(" ", 4) == "00000007 00001000 00000003 00000200 00000000"
    assert EXAMPLES["extended status"].hex(" ", 4) == (
        "00000007 00000002 00000100 00000000 00000000 00000003 00000000 00000200 00000000 00000000"
    )
    assert EXAMPLES["filter"].hex(" ", 4) == "00000100 00000000 00000001 00000007"


@given(U64)
def test_offsets_of_data_come_back(offset: int) -> None:
    assert parse_data_offset(pack_data_offset(offset) + b"data") == offset


@given(U64, st.integers(1, 2**32 - 1))
def test_holes_come_back(offset: int, length: int) -> None:
    assert parse_hole(pack_hole(offset, length)) == (offset, length)


@given(st.integers(1, 2**32 - 1), LINES, U64)
def test_errors_come_back(error: int, message: str, offset: int) -> None:
    assert parse_error(pack_error(error, message)) == ErrorPayload(error, message, None)
    located = parse_error(pack_error(error, message, offset=offset), type=ReplyType.ERROR_OFFSET)
    assert located == ErrorPayload(error, message, offset)


@given(U32, st.lists(st.tuples(st.integers(1, 2**32 - 1), U32), min_size=1, max_size=50))
def test_block_status_comes_back(context_id: int, extents: list[tuple[int, int]]) -> None:
    assert parse_block_status(pack_block_status(context_id, extents)) == (context_id, extents)


@given(U32, st.lists(st.tuples(st.integers(1, 2**64 - 1), U64), min_size=1, max_size=50))
def test_extended_block_status_comes_back(context_id: int, extents: list[tuple[int, int]]) -> None:
    assert parse_block_status_ext(pack_block_status_ext(context_id, extents)) == (context_id, extents)


@given(U64, st.lists(U32, unique=True, max_size=20))
def test_filters_come_back(length: int, ids: list[int]) -> None:
    assert parse_filter(pack_filter(length, ids)) == (length, ids)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_payload_that_is_cut_anywhere_is_refused_or_a_shorter_list(name: str) -> None:
    whole = EXAMPLES[name]
    for end in range(len(whole)):
        with suppress(ProtocolError):
            assert PARSERS[name](whole[:end]) != PARSERS[name](whole)
            assert name in ("status", "filter"), "nothing else has a shorter form"


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.binary(max_size=64))
def test_any_bytes_are_a_value_or_a_protocol_error(name: str, data: bytes) -> None:
    with suppress(ProtocolError):
        PARSERS[name](data)


def test_a_hole_has_a_length() -> None:
    with pytest.raises(ProtocolError, match="no length"):
        parse_hole(pack_hole(512, 0))


def test_an_error_is_not_zero() -> None:
    with pytest.raises(ProtocolError, match="error 0"):
        parse_error(pack_error(0))


def test_a_message_longer_than_its_payload_is_refused() -> None:
    with pytest.raises(ProtocolError, match="does not fit"):
        parse_error(bytes.fromhex("00000005 0009") + b"it broke")


def test_a_message_longer_than_texts_may_be_is_refused() -> None:
    with pytest.raises(ProtocolError, match="does not fit"):
        parse_error(bytes.fromhex("00000005 1001") + bytes(4097))


def test_of_unknown_errors_the_known_part_is_read() -> None:
    assert parse_error(EXAMPLES["error"] + b"further fields", type=0x8077) == ErrorPayload(5, "it broke", None)


def test_an_offset_must_follow_the_message() -> None:
    with pytest.raises(ProtocolError, match="ERROR_OFFSET"):
        parse_error(EXAMPLES["error"], type=ReplyType.ERROR_OFFSET)


def test_a_message_is_cut_between_characters() -> None:
    message = parse_error(pack_error(5, "ä" * 5000)).message
    assert message == "ä" * (NAME_MAX // 2)
    assert cut_text("a" + "ä" * 5000).decode() == "a" + "ä" * (NAME_MAX // 2 - 1)


def test_the_other_sides_words_cannot_fake_lines_or_control_a_terminal() -> None:
    assert (
        printable(b"a\n\x1b[31mb\xff")
        == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}"
    )


def test_every_extent_has_a_length() -> None:
    for data, parse in (
        (pack_block_status(0, [(1, 0), (0, 0)]), parse_block_status),
        (pack_block_status_ext(0, [(0, 0)]), parse_block_status_ext),
    ):
        with pytest.raises(ProtocolError, match="without length"):
            parse(data)


def test_the_count_of_extents_is_right_or_left_out() -> None:
    packed = bytearray(EXAMPLES["extended status"])
    packed[4:8] = bytes(4)
    assert parse_block_status_ext(packed) == parse_block_status_ext(EXAMPLES["extended status"])
    packed[7] = 3
    with pytest.raises(ProtocolError, match="counts 3"):
        parse_block_status_ext(packed)


def test_more_extents_than_a_client_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "EXTENTS_MAX", 2)
    assert len(parse_block_status(pack_block_status(0, [(1, 0)] * 2)).extents) == 2
    with pytest.raises(ProtocolError):
        parse_block_status(pack_block_status(0, [(1, 0)] * 3))


@pytest.mark.parametrize(
    ("lengths", "one", "fine"),
    [
        ([100], True, True),
        ([50], True, True),
        ([101], True, False),
        ([50, 50], True, False),
        ([50, 50], False, True),
        ([50, 5000], False, True),
        ([5000], False, True),
        ([50], False, True),
        ([100, 1], False, False),
        ([50, 50, 1], False, False),
    ],
)
def test_only_the_last_extent_reaches_beyond_the_range(lengths: list[int], one: bool, fine: bool) -> None:
    status = BlockStatus(0, [(length, 0) for length in lengths])
    if fine:
        check_extents(status, 100, one=one)
    else:
        with pytest.raises(ProtocolError):
            check_extents(status, 100, one=one)


def test_a_filter_names_no_context_twice() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        parse_filter(pack_filter(512, [1, 2, 1]))
