"""What a server answers to each option, by the rules of the specification."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blocklayer.base.errors import OptionError, ProtocolError
from blocklayer.codec.nbd.options import (
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    ListedExport,
    NameInfo,
    OptionHeader,
    pack_info_request,
    pack_meta_request,
    parse_export,
    parse_info,
    parse_meta_context,
    parse_server,
)
from blocklayer.codec.nbd.protocol import (
    CONTEXTS_MAX,
    NAME_MAX,
    OPTION_MAX,
    HandshakeFlags,
    Info,
    Option,
    OptionReply,
    TlsMode,
    TransmissionFlags,
)
from blocklayer.codec.nbd.server_options import (
    RULES,
    Agreed,
    Close,
    ExportOffer,
    Ready,
    StartTls,
    hang_up,
    refusal,
)
from tests.helpers.nbd_handshakes import BLOCKY, DISK, FLAGS, Exports, replies

BOTH = HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES
PLAIN = Agreed(BOTH)
CHUNKS = replace(PLAIN, structured=True)
EXTENDED = replace(CHUNKS, extended=True)


def answer(option, payload=b"", *, agreed=PLAIN, offer=None):
    return RULES[option].handler(agreed, offer or Exports(), payload)


def kinds(found):
    return [kind for _, kind, _ in replies(found.send)]


def infos(found):
    return [parse_info(payload) for _, kind, payload in replies(found.send) if kind == OptionReply.INFO]


def contexts(found):
    return [parse_meta_context(data) for _, kind, data in replies(found.send) if kind == OptionReply.META_CONTEXT]


def choose(*queries, agreed=CHUNKS, name="disk"):
    return answer(Option.SET_META_CONTEXT, pack_meta_request(name, queries), agreed=agreed)


def offered(*queries, agreed=CHUNKS):
    found = answer(Option.LIST_META_CONTEXT, pack_meta_request("disk", queries), agreed=agreed)
    assert kinds(found)[-1] == OptionReply.ACK
    return contexts(found)


# -- EXPORT_NAME -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("client", "length"), [(BOTH, 10), (HandshakeFlags.FIXED_NEWSTYLE, 134)])
def test_export_name_is_answered_with_124_zeroes_unless_the_client_does_without(client, length):
    found = answer(Option.EXPORT_NAME, b"disk", agreed=Agreed(client))
    assert parse_export(found.send) == (1 << 30, TransmissionFlags.HAS_FLAGS | TransmissionFlags.SEND_FLUSH)
    assert (len(found.send), found.send[10:].strip(b"\0")) == (length, b"")
    assert found.outcome.session.export is DISK
    assert found.outcome.session.no_zeroes == (client == BOTH)


def test_export_name_of_nothing_is_the_default_export():
    assert answer(Option.EXPORT_NAME).outcome.session.export is DISK


def test_export_name_of_an_unknown_export_ends_the_connection():
    found = answer(Option.EXPORT_NAME, b"other")
    assert (found.send, type(found.outcome)) == (b"", Close)


def test_export_name_cannot_tell_block_sizes_that_must_be_kept():
    assert type(answer(Option.EXPORT_NAME, b"blocky").outcome) is Close


def test_export_name_keeps_the_contexts_that_were_chosen_for_the_export():
    agreed = choose("base:allocation").state
    assert answer(Option.EXPORT_NAME, b"disk", agreed=agreed).outcome.session.contexts == {0: "base:allocation"}


# -- LIST ------------------------------------------------------------------------------------------------------


def test_list_has_a_reply_for_each_export_and_an_ack():
    found = answer(Option.LIST)
    assert kinds(found) == [OptionReply.SERVER, OptionReply.SERVER, OptionReply.ACK]
    assert [parse_server(payload) for _, _, payload in replies(found.send)[:2]] == [
        ListedExport("disk", "the system disk"),
        ListedExport("blocky", ""),
    ]


# -- INFO and GO -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_size_and_flags_come_without_being_asked_for(option):
    found = answer(option, pack_info_request("disk", []))
    assert infos(found) == [ExportInfo(1 << 30, TransmissionFlags.HAS_FLAGS | TransmissionFlags.SEND_FLUSH)]
    assert kinds(found)[-1] == OptionReply.ACK


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Info.NAME, NameInfo("disk")),
        (Info.DESCRIPTION, DescriptionInfo("the system disk")),
        (Info.BLOCK_SIZE, BlockSizeInfo(1, 4096, 1 << 25)),
    ],
)
def test_what_is_asked_for_is_told(wanted, expected):
    assert infos(answer(Option.INFO, pack_info_request("", [wanted, 999, wanted])))[1:] == [expected]


def test_go_begins_the_session_and_info_does_not():
    request = pack_info_request("disk", [Info.BLOCK_SIZE])
    assert type(answer(Option.GO, request).outcome) is Ready
    info = answer(Option.INFO, request)
    assert (info.outcome, info.state) == (None, PLAIN)


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_an_unknown_export_is_an_error_without_information(option):
    found = answer(option, pack_info_request("other", [3]))
    assert (kinds(found), found.outcome) == ([OptionReply.ERR_UNKNOWN], None)


def test_go_insists_that_block_sizes_are_asked_for_and_tells_them():
    found = answer(Option.GO, pack_info_request("blocky", []))
    assert kinds(found)[-1] == OptionReply.ERR_BLOCK_SIZE_REQD
    assert BlockSizeInfo(4096, 65536, 1 << 20) in infos(found)
    assert found.outcome is None
    assert type(answer(Option.GO, pack_info_request("blocky", [Info.BLOCK_SIZE])).outcome) is Ready
    assert kinds(answer(Option.INFO, pack_info_request("blocky", [])))[-1] == OptionReply.ACK


def test_go_tells_the_same_as_info_before_it():
    request = pack_info_request("disk", [1, 2, 3])
    assert infos(answer(Option.GO, request, agreed=EXTENDED)) == infos(answer(Option.INFO, request, agreed=EXTENDED))


@pytest.mark.parametrize(
    ("agreed", "flags"),
    [
        (PLAIN, TransmissionFlags(0)),
        (CHUNKS, TransmissionFlags.SEND_DF),
        (EXTENDED, TransmissionFlags.SEND_DF),
        (
            replace(EXTENDED, contexts=((0, "base:allocation"),), contexts_of="disk"),
            TransmissionFlags.SEND_DF | TransmissionFlags.BLOCK_STATUS_PAYLOAD,
        ),
        (replace(EXTENDED, contexts=((0, "base:allocation"),), contexts_of="blocky"), TransmissionFlags.SEND_DF),
    ],
)
def test_flags_are_those_that_mean_something_in_what_was_agreed(agreed, flags):
    found = answer(Option.GO, pack_info_request("disk", []), agreed=agreed)
    expected = TransmissionFlags.HAS_FLAGS | TransmissionFlags.SEND_FLUSH | flags
    assert infos(found) == [ExportInfo(1 << 30, expected)]
    assert found.outcome.session.flags == expected


# -- structured replies and extended headers -------------------------------------------------------------------


def test_structured_replies_are_agreed_on_once_or_more_often():
    found = answer(Option.STRUCTURED_REPLY)
    assert (kinds(found), found.state) == ([OptionReply.ACK], CHUNKS)
    assert answer(Option.STRUCTURED_REPLY, agreed=CHUNKS) == found


@pytest.mark.parametrize("before", [PLAIN, CHUNKS, EXTENDED])
def test_extended_headers_imply_structured_replies(before):
    found = answer(Option.EXTENDED_HEADERS, agreed=before)
    assert (kinds(found), found.state) == ([OptionReply.ACK], EXTENDED)


def test_there_is_no_way_back_from_extended_headers():
    found = answer(Option.STRUCTURED_REPLY, agreed=EXTENDED)
    assert (kinds(found), found.state) == ([OptionReply.ERR_EXT_HEADER_REQD], EXTENDED)


# -- metadata contexts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ((), list(DISK.contexts)),
        (("base:",), ["base:allocation"]),
        (("base:allocation",), ["base:allocation"]),
        (("qemu:",), list(DISK.contexts[1:])),
        (("qemu:dirty-bitmap:",), list(DISK.contexts[2:])),
        (("qemu:dirty-bitmap:tuesday", "base:"), ["base:allocation", "qemu:dirty-bitmap:tuesday"]),
        (("base:", "base:allocation"), ["base:allocation"]),
        (("base:alloc",), []),
        (("base",), []),
        ((":", "", "unknown:", "x-other:thing", "base:nothing"), []),
    ],
)
def test_contexts_are_listed_by_name_and_by_namespace(queries, expected):
    assert offered(*queries) == [(0, name) for name in expected]


def test_contexts_are_listed_even_before_structured_replies():
    assert len(offered(agreed=PLAIN)) == 4


def test_contexts_are_chosen_by_name_with_ids_of_their_own():
    found = choose("qemu:dirty-bitmap:monday", "base:allocation", "unknown:thing", "base:nothing")
    assert contexts(found) == [(0, "base:allocation"), (2, "qemu:dirty-bitmap:monday")]
    assert found.state == replace(CHUNKS, contexts=tuple(contexts(found)), contexts_of="disk")


@pytest.mark.parametrize("queries", [(), ("base:",), ("qemu:dirty-bitmap:",), ("nothing:at-all",)])
def test_no_context_is_chosen_by_its_namespace(queries):
    found = choose(*queries, agreed=choose("base:allocation").state)
    assert (kinds(found), found.state.contexts) == ([OptionReply.ACK], ())


def test_contexts_need_structured_replies():
    assert kinds(choose("base:allocation", agreed=PLAIN)) == [OptionReply.ERR_INVALID]


def test_contexts_of_an_unknown_export_are_an_error_and_the_ones_before_are_lost():
    found = choose("base:allocation", agreed=choose("base:allocation").state, name="other")
    assert (kinds(found), found.state) == ([OptionReply.ERR_UNKNOWN], CHUNKS)
    found = answer(Option.LIST_META_CONTEXT, pack_meta_request("other", []))
    assert kinds(found) == [OptionReply.ERR_UNKNOWN]


def test_contexts_chosen_for_another_export_do_not_count():
    agreed = choose("base:allocation").state
    same = answer(Option.GO, pack_info_request("", []), agreed=agreed).outcome.session
    other = answer(Option.GO, pack_info_request("blocky", [3]), agreed=agreed).outcome.session
    assert (same.contexts, other.contexts) == ({0: "base:allocation"}, {})


def test_too_many_contexts_are_too_big():
    many = tuple(f"x-many:{number}" for number in range(CONTEXTS_MAX + 1))
    offer = Exports(replace(DISK, contexts=many))
    for count, kind in ((CONTEXTS_MAX, OptionReply.ACK), (CONTEXTS_MAX + 1, OptionReply.ERR_TOO_BIG)):
        payload = pack_meta_request("disk", many[:count])
        assert kinds(answer(Option.SET_META_CONTEXT, payload, agreed=CHUNKS, offer=offer))[-1] == kind


# -- TLS -------------------------------------------------------------------------------------------------------


def test_starttls_forgets_what_was_agreed_on():
    found = answer(Option.STARTTLS, agreed=replace(choose("base:allocation").state, extended=True))
    assert (kinds(found), found.outcome) == ([OptionReply.ACK], StartTls())
    assert found.state == Agreed(BOTH, tls=True)


def test_a_second_starttls_is_invalid():
    found = answer(Option.STARTTLS, agreed=Agreed(BOTH, tls=True))
    assert (kinds(found), found.outcome) == ([OptionReply.ERR_INVALID], None)


# -- what is decided by a header -------------------------------------------------------------------------------


def said(option, length=0, *, agreed=PLAIN, tls=TlsMode.OFF):
    packed = refusal(OptionHeader(option, length), agreed, tls)
    return None if packed is None else replies(packed)[0][1]


@pytest.mark.parametrize("option", [4, 12, 0, 2**32 - 1])
def test_an_unknown_option_is_unsupported(option):
    assert said(option) == said(option, 1000) == OptionReply.ERR_UNSUP


@pytest.mark.parametrize("option", [Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.STARTTLS])
def test_an_option_without_data_is_invalid_with_data(option):
    assert said(option, tls=TlsMode.ALLOW) is None
    assert said(option, 1, tls=TlsMode.ALLOW) == OptionReply.ERR_INVALID


@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_an_option_that_is_too_long_is_too_big(option):
    assert said(option, OPTION_MAX) is None
    assert said(option, OPTION_MAX + 1) == OptionReply.ERR_TOO_BIG


def test_a_server_without_tls_says_so():
    assert said(Option.STARTTLS) == OptionReply.ERR_POLICY
    assert said(Option.STARTTLS, tls=TlsMode.REQUIRE) is None


@pytest.mark.parametrize("option", [*(option for option in Option if option != Option.STARTTLS), 4, 99])
def test_everything_needs_tls_where_it_is_required_and_nothing_afterwards(option):
    assert said(option, 2**32 - 1, tls=TlsMode.REQUIRE) == OptionReply.ERR_TLS_REQD
    encrypted = Agreed(BOTH, tls=True)
    for mode in TlsMode:
        assert said(option, agreed=encrypted, tls=mode) != OptionReply.ERR_TLS_REQD
    assert said(option) != OptionReply.ERR_TLS_REQD


@pytest.mark.parametrize(
    ("length", "agreed", "tls", "fine"),
    [
        (NAME_MAX, PLAIN, TlsMode.OFF, True),
        (NAME_MAX + 1, PLAIN, TlsMode.OFF, False),
        (4, EXTENDED, TlsMode.OFF, False),
        (4, PLAIN, TlsMode.ALLOW, True),
        (4, PLAIN, TlsMode.REQUIRE, False),
        (4, Agreed(BOTH, tls=True), TlsMode.REQUIRE, True),
        (4, Agreed(HandshakeFlags(0)), TlsMode.OFF, True),
    ],
)
def test_export_name_has_no_error_but_the_end(length, agreed, tls, fine):
    assert (hang_up(OptionHeader(Option.EXPORT_NAME, length), agreed, tls) is None) == fine


@pytest.mark.parametrize("option", [*(option for option in Option if option != Option.EXPORT_NAME), 99])
def test_a_client_without_fixed_newstyle_has_no_other_option(option):
    assert hang_up(OptionHeader(option, 0), Agreed(HandshakeFlags(0)), TlsMode.OFF)
    assert hang_up(OptionHeader(option, 0), PLAIN, TlsMode.OFF) is None


@pytest.mark.parametrize("option", [Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_a_malformed_payload_is_a_protocol_error(option):
    with pytest.raises(ProtocolError):
        answer(option, b"\xff\xff", agreed=CHUNKS)


# -- offers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "a" * 4097},
        {"name": "a\0"},
        {"description": "a" * 4097},
        {"contexts": ("a" * 4097,)},
        {"contexts": ("without-namespace",)},
        {"contexts": (":x",)},
        {"minimum": 3},
        {"preferred": 100},
    ],
)
def test_an_offer_that_no_client_could_take_is_refused(fields):
    with pytest.raises(OptionError):
        ExportOffer(**{"name": "disk", "description": "", "size": 0, "flags": FLAGS, **fields})


def test_the_longest_name_is_a_name():
    longest = replace(BLOCKY, name="a" * NAME_MAX, minimum=1)
    found = answer(Option.EXPORT_NAME, b"a" * NAME_MAX, offer=Exports(longest))
    assert found.outcome.session.export is longest
