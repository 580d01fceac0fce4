"""Messages of the handshake: what is packed comes back, and malformed ones say what is wrong and where."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import OptionError, ProtocolError
from blocklayer.codec.nbd.options import (
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    NameInfo,
    OptionHeader,
    ReplyHeader,
    check_block_sizes,
    decode_text,
    encode_text,
    pack_client_flags,
    pack_export,
    pack_greeting,
    pack_info,
    pack_info_request,
    pack_meta_context,
    pack_meta_request,
    pack_option,
    pack_option_error,
    pack_option_reply,
    pack_server,
    parse_export,
    parse_info,
    parse_info_request,
    parse_meta_context,
    parse_meta_request,
    parse_option_header,
    parse_option_reply_header,
    parse_server,
)
from blocklayer.codec.nbd.protocol import NAME_MAX, HandshakeFlags, Option, OptionReply

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=NAME_MAX // 4)
INFOS = st.one_of(
    st.builds(ExportInfo, U64, U16),
    st.builds(NameInfo, TEXTS),
    st.builds(DescriptionInfo, TEXTS),
    st.builds(BlockSizeInfo, U32, U32, U32),
)

PARSERS = {
    "info request": parse_info_request,
    "meta request": parse_meta_request,
    "server": parse_server,
    "meta context": parse_meta_context,
    "info": parse_info,
}
EXAMPLES = {
    "info request": pack_info_request("dïsk", [1, 3]),
    "meta request": pack_meta_request("dïsk", ["base:allocation", "qemu:"]),
    "server": pack_server("dïsk", "the first"),
    "meta context": pack_meta_context(7, "base:allocation"),
    "info": pack_info(BlockSizeInfo(1, 4096, 1 << 25)),
}


def test_bytes_lie_where_the_specification_has_them():
    assert pack_greeting(HandshakeFlags(3)) == b"NBDMAGICIHAVEOPT\0\3"
    assert pack_client_flags(1) == b"\0\0\0\1"
    assert pack_option(Option.EXPORT_NAME, b"disk") == b"IHAVEOPT" + bytes.fromhex("00000001 00000004") + b"disk"
    assert pack_option_reply(Option.LIST, OptionReply.SERVER, b"x") == (
        bytes.fromhex("0003e889045565a9 00000003 00000002 00000001") + b"x"
    )
    assert pack_info_request("ab", [3]) == bytes.fromhex("00000002") + b"ab" + bytes.fromhex("0001 0003")
    assert pack_meta_request("ab", ["x:"]) == (
        bytes.fromhex("00000002") + b"ab" + bytes.fromhex("00000001 00000002") + b"x:"
    )
    assert pack_server("ab", "cd") == bytes.fromhex("00000002") + b"abcd"
    assert pack_meta_context(7, "x:y") == bytes.fromhex("00000007") + b"x:y"
    assert pack_info(ExportInfo(512, 1)) == bytes.fromhex("0000 0000000000000200 0001")
    assert pack_info(NameInfo("ab")) == b"\0\1ab"
    assert pack_info(DescriptionInfo("ab")) == b"\0\2ab"
    assert pack_info(BlockSizeInfo(1, 2, 3)) == bytes.fromhex("0003 00000001 00000002 00000003")


@given(U32, st.binary(max_size=100))
def test_options_come_back(option, payload):
    packed = pack_option(option, payload)
    assert parse_option_header(packed) == OptionHeader(option, len(payload))
    assert packed[16:] == payload


@given(U32, U32, st.binary(max_size=100))
def test_option_replies_come_back(option, kind, payload):
    packed = pack_option_reply(option, kind, payload)
    assert parse_option_reply_header(packed) == ReplyHeader(option, kind, len(payload))
    assert packed[20:] == payload


def test_a_header_with_another_magic_is_refused():
    with pytest.raises(ProtocolError, match="IHAVEOPT"):
        parse_option_header(pack_option_reply(1, 1))
    with pytest.raises(ProtocolError, match="option reply begins"):
        parse_option_reply_header(pack_option(1, bytes(4)))


@given(TEXTS, st.lists(U16, max_size=50))
def test_info_requests_come_back(name, wanted):
    assert parse_info_request(pack_info_request(name, wanted)) == (name, tuple(wanted))


@given(TEXTS, st.lists(TEXTS, max_size=5))
def test_meta_requests_come_back(name, queries):
    assert parse_meta_request(pack_meta_request(name, queries)) == (name, tuple(queries))


@given(TEXTS, TEXTS)
def test_listed_exports_come_back(name, description):
    assert parse_server(pack_server(name, description)) == (name, description)


@given(U32, TEXTS)
def test_contexts_come_back(context_id, name):
    assert parse_meta_context(pack_meta_context(context_id, name)) == (context_id, name)


@given(INFOS)
def test_information_comes_back(info):
    found = parse_info(pack_info(info))
    assert (type(found), found) == (type(info), info)


@given(U64, U16, st.booleans())
def test_answers_to_export_name_come_back(size, flags, zeroes):
    packed = pack_export(size, flags, zeroes=zeroes)
    assert parse_export(packed) == (size, flags)
    assert len(packed) == (134 if zeroes else 10)


def test_an_unknown_kind_of_information_is_none():
    assert parse_info(b"\x12\x34whatever") is None


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_payload_that_is_cut_anywhere_is_refused_or_has_a_shorter_text(name):
    whole = EXAMPLES[name]
    for end in range(len(whole)):
        with suppress(ProtocolError):
            assert PARSERS[name](whole[:end]) != PARSERS[name](whole)
            assert name in ("server", "meta context"), "only these end with a text of any length"


@pytest.mark.parametrize("name", ["info request", "meta request", "info"])
def test_a_payload_with_bytes_behind_it_is_refused(name):
    with pytest.raises(ProtocolError, match="1 bytes too many"):
        PARSERS[name](EXAMPLES[name] + b"x")


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.binary(max_size=100))
def test_any_bytes_are_a_value_or_a_protocol_error(name, data):
    with suppress(ProtocolError):
        PARSERS[name](data)


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
def test_any_change_of_a_payload_is_a_value_or_a_protocol_error(name, data):
    mutated = bytearray(EXAMPLES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        PARSERS[name](mutated)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (bytes.fromhex("ffffffff"), "the export's name at byte 4 takes 4294967295 bytes and 0 are left"),
        (bytes.fromhex("00000001") + b"a", "the number of requests at byte 5 takes 2 bytes and 0 are left"),
        (bytes.fromhex("00000001") + b"a" + bytes.fromhex("0002 0001"), "at byte 7 takes 4 bytes and 2 are left"),
    ],
)
def test_an_error_says_what_is_missing_and_where(payload, message):
    with pytest.raises(ProtocolError, match=message):
        parse_info_request(payload)


def test_a_count_of_queries_that_cannot_be_is_refused_without_a_list_of_them():
    payload = bytes.fromhex("00000000 ffffffff") + bytes(40)
    with pytest.raises(ProtocolError, match="4294967295 queries do not fit"):
        parse_meta_request(payload)


# -- texts -----------------------------------------------------------------------------------------------------


def test_a_text_of_4096_bytes_is_the_longest():
    assert encode_text("ä" * 2048, "it") == decode_text("ä".encode() * 2048, "it").encode()
    with pytest.raises(OptionError, match="4097 bytes"):
        encode_text("a" * 4097, "it")
    with pytest.raises(ProtocolError, match="4097 bytes"):
        decode_text(b"a" * 4097, "it")


@pytest.mark.parametrize("text", ["a\0b", "\0", "\udc80"])
def test_a_text_of_ours_that_cannot_be_sent_is_an_option_error(text):
    with pytest.raises(OptionError):
        encode_text(text, "the name")


@pytest.mark.parametrize("data", [b"a\0b", b"\xff", b"\xc3", b"\xed\xa0\x80"])
def test_a_text_of_the_other_side_that_is_none_is_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        decode_text(data, "the name")


def test_a_description_need_not_be_readable():
    assert parse_server(bytes.fromhex("00000001") + b"a\xff\0b").description == "��b"
    assert parse_info(b"\0\2\xffx") == DescriptionInfo("�x")
    with pytest.raises(ProtocolError, match="4097 bytes"):
        parse_info(b"\0\2" + b"a" * 4097)


def test_a_refusal_has_words_that_fit():
    packed = pack_option_error(Option.LIST, OptionReply.ERR_POLICY, "ä" * 5000)
    assert parse_option_reply_header(packed) == ReplyHeader(Option.LIST, OptionReply.ERR_POLICY, NAME_MAX)
    assert packed[20:].decode() == "ä" * 2048


# -- block sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [(1, 512, 1), (1, 4096, 1 << 25), (512, 512, 512), (65536, 1 << 20, 3 << 20), (512, 4096, 0xFFFFFFFF)],
)
def test_block_sizes_of_the_specification(sizes):
    check_block_sizes(*sizes)


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ((0, 4096, 4096), "minimum"),
        ((3, 4096, 4096), "minimum"),
        ((131072, 131072, 131072), "minimum"),
        ((1, 256, 4096), "preferred"),
        ((4096, 512, 4096), "preferred"),
        ((1, 3000, 4096), "preferred"),
        ((512, 4096, 1000), "maximum"),
        ((512, 4096, 0), "maximum"),
        ((1, 4096, 1 << 32), "maximum"),
    ],
)
def test_other_block_sizes_are_refused_by_name(sizes, word):
    with pytest.raises(OptionError, match=word):
        check_block_sizes(*sizes)
