"""The server's turns: streams in any pieces, hostile clients, TLS, and the end of a handshake."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.codec.nbd import server_handshake
from blocklayer.codec.nbd.options import (
    GREETING,
    pack_client_flags,
    pack_info_request,
    pack_meta_request,
    pack_option,
    parse_info,
)
from blocklayer.codec.nbd.protocol import (
    NAME_MAX,
    OPTION_MAX,
    OPTIONS_MAX,
    SKIPPED_MAX,
    HandshakeFlags,
    Option,
    OptionReply,
    TlsMode,
)
from blocklayer.codec.nbd.server_handshake import Close, Ready, ServerHandshake, StartTls
from tests.helpers.nbd_handshakes import DISK, Exports, feed, replies

FIXED = pack_client_flags(3)
GO = pack_option(Option.GO, pack_info_request("disk", [3]))
SET = pack_option(Option.SET_META_CONTEXT, pack_meta_request("disk", ["base:allocation"]))
STRUCTURED = pack_option(Option.STRUCTURED_REPLY)
STARTTLS = pack_option(Option.STARTTLS)

CONVERSATIONS = {
    "go": FIXED + GO,
    "everything": FIXED
    + pack_option(77, b"unknown")
    + pack_option(Option.LIST)
    + pack_option(Option.LIST, b"with data")
    + STRUCTURED
    + pack_option(Option.SET_META_CONTEXT, b"malformed")
    + SET
    + pack_option(Option.LIST_META_CONTEXT, pack_meta_request("", []))
    + pack_option(Option.INFO, pack_info_request("other", []))
    + pack_option(Option.EXTENDED_HEADERS)
    + GO,
    "export name": pack_client_flags(0) + pack_option(Option.EXPORT_NAME, b"disk"),
    "abort": FIXED + pack_option(Option.ABORT, b"for no reason"),
    "wrong magic": FIXED + STRUCTURED + b"IHAVEOPS" + bytes(8),
}


def handshake(**options):
    return ServerHandshake(Exports(), **options)


def kinds(sent):
    return [kind for _, kind, _ in replies(sent)]


def closed(stream, **options):
    """What was sent before the connection ended, and why."""
    sent, outcome, _ = feed(handshake(**options), stream)
    assert type(outcome) is Close, outcome
    return kinds(sent), outcome.reason


# -- streams ---------------------------------------------------------------------------------------------------


def test_the_greeting_is_that_of_fixed_newstyle():
    magic, second, flags = GREETING.unpack(handshake().greeting())
    assert magic.to_bytes(8, "big") + second.to_bytes(8, "big") == b"NBDMAGICIHAVEOPT"
    assert flags == HandshakeFlags.FIXED_NEWSTYLE | HandshakeFlags.NO_ZEROES


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_way_to_cut_a_stream_in_two_gives_the_same(name):
    stream = CONVERSATIONS[name]
    sent, outcome, _ = feed(handshake(), stream)
    assert outcome is not None
    for at in range(len(stream)):
        assert feed(handshake(), stream, [at])[:2] == (sent, outcome)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_stream_of_single_bytes_gives_the_same(name):
    stream = CONVERSATIONS[name]
    sent, outcome, _ = feed(handshake(), stream)
    assert feed(handshake(), stream, [1] * len(stream))[:2] == (sent, outcome)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_stream_that_ends_early_has_no_outcome_and_a_part_of_the_answers(name):
    stream = CONVERSATIONS[name]
    sent, outcome, left = feed(handshake(), stream)
    for end in range(len(stream) - len(left)):
        so_far, early, _ = feed(handshake(), stream[:end])
        assert sent.startswith(so_far)
        assert early is None or early == outcome


def test_bytes_behind_go_are_left_for_the_transmission_phase():
    for name in ("go", "export name"):
        stream = CONVERSATIONS[name]
        step = handshake().receive(stream + b"requests")
        assert (step.consumed, type(step.outcome)) == (len(stream), Ready)


def test_an_option_is_taken_in_although_the_buffer_of_the_caller_is_small():
    names = [f"x-long:{'n' * 4000}{number}" for number in range(60)]
    option = pack_option(Option.SET_META_CONTEXT, pack_meta_request("disk", [*names, "base:allocation"]))
    sent, outcome, left = feed(handshake(), FIXED + STRUCTURED + option + GO, [512] * 600)
    assert (outcome.session.contexts, left) == ({0: "base:allocation"}, b"")


def test_a_session_is_what_was_agreed_on():
    _, outcome, _ = feed(handshake(), CONVERSATIONS["everything"])
    session = outcome.session
    assert (session.export, session.structured, session.extended, session.no_zeroes, session.tls) == (
        DISK, True, True, True, False,
    )  # fmt: skip
    assert session.contexts == {0: "base:allocation"}


def test_a_plain_client_gets_a_plain_session():
    session = feed(handshake(), CONVERSATIONS["export name"])[1].session
    assert (session.structured, session.extended, session.no_zeroes, session.contexts) == (False, False, False, {})


def test_each_option_has_its_answer():
    sent, _, _ = feed(handshake(), CONVERSATIONS["everything"])
    finals = [(option, kind) for option, kind, _ in replies(sent) if kind == 1 or kind >> 31]
    assert finals == [
        (77, OptionReply.ERR_UNSUP),
        (Option.LIST, OptionReply.ACK),
        (Option.LIST, OptionReply.ERR_INVALID),
        (Option.STRUCTURED_REPLY, OptionReply.ACK),
        (Option.SET_META_CONTEXT, OptionReply.ERR_INVALID),
        (Option.SET_META_CONTEXT, OptionReply.ACK),
        (Option.LIST_META_CONTEXT, OptionReply.ACK),
        (Option.INFO, OptionReply.ERR_UNKNOWN),
        (Option.EXTENDED_HEADERS, OptionReply.ACK),
        (Option.GO, OptionReply.ACK),
    ]


def test_nothing_is_looked_up_before_a_client_names_it():
    offer = Exports()
    feed(ServerHandshake(offer), FIXED + pack_option(Option.LIST) + STRUCTURED)
    assert offer.asked == []


# -- the end ---------------------------------------------------------------------------------------------------


def test_abort_is_acknowledged_and_its_data_ignored():
    for payload in (b"", b"for no reason"):
        sent, _ = closed(FIXED + pack_option(Option.ABORT, payload))
        assert sent == [OptionReply.ACK]


def test_abort_needs_no_tls():
    assert closed(FIXED + pack_option(Option.ABORT), tls=TlsMode.REQUIRE)[0] == [OptionReply.ACK]


@pytest.mark.parametrize("flags", [4, 8, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_end_the_connection(flags):
    assert "flags" in closed(pack_client_flags(flags))[1]


def test_a_wrong_magic_ends_the_connection():
    assert "IHAVEOPT" in closed(FIXED + b"GET / HTTP/1.1\r\n\r\n")[1]


def test_a_client_without_fixed_newstyle_can_only_name_its_export():
    assert "fixed newstyle" in closed(pack_client_flags(2) + GO)[1]
    assert closed(pack_client_flags(2) + pack_option(Option.ABORT))[0] == []
    sent, outcome, _ = feed(handshake(), pack_client_flags(2) + pack_option(Option.EXPORT_NAME, b"disk"))
    assert (len(sent), type(outcome)) == (10, Ready)


@pytest.mark.parametrize("name", [b"a" * (NAME_MAX + 1), b"\xff", b"a\0b", b"other"])
def test_an_export_name_that_cannot_be_ends_the_connection(name):
    assert closed(FIXED + pack_option(Option.EXPORT_NAME, name))[0] == []


def test_export_name_after_extended_headers_ends_the_connection():
    stream = FIXED + pack_option(Option.EXTENDED_HEADERS) + pack_option(Option.EXPORT_NAME, b"disk")
    assert closed(stream)[0] == [OptionReply.ACK]


def test_a_handshake_that_is_over_stays_over():
    over = handshake()
    over.receive(FIXED + GO)
    assert over.receive(GO) == (0, b"", Close("the handshake is over"))


# -- work and memory -------------------------------------------------------------------------------------------


def test_an_option_of_4_gib_ends_the_connection_at_once():
    for option in (99, Option.LIST, Option.GO, Option.SET_META_CONTEXT):
        header = pack_option(option)[:12] + b"\xff\xff\xff\xff"
        sent, reason = closed(FIXED + header)
        assert (sent, "not wanted" in reason) == ([], True)


def test_unwanted_options_are_skipped_without_being_kept():
    server = handshake()
    length = 8 << 20
    server.receive(FIXED + pack_option(99)[:12] + length.to_bytes(4, "big"))
    piece = bytes(1 << 20)
    for number in range(8):
        step = server.receive(piece)
        assert (step.consumed, bool(step.send)) == (len(piece), number == 7)
    assert kinds(step.send) == [OptionReply.ERR_UNSUP]
    assert server._payload == b""


def test_skipping_has_an_end_over_many_options():
    server = handshake()
    server.receive(FIXED)
    unwanted = pack_option(99, bytes(1 << 20))
    for _ in range(SKIPPED_MAX >> 20):
        assert server.receive(unwanted).outcome is None
    assert type(server.receive(pack_option(99, b"x")).outcome) is Close


def test_an_option_that_is_too_long_is_refused_and_the_handshake_goes_on():
    long = pack_option(Option.GO, bytes(OPTION_MAX + 1))
    sent, outcome, _ = feed(handshake(), FIXED + long + GO)
    assert (kinds(sent)[0], type(outcome)) == (OptionReply.ERR_TOO_BIG, Ready)


def test_options_have_an_end():
    sent, reason = closed(FIXED + STRUCTURED * (OPTIONS_MAX + 1))
    assert (len(sent), str(OPTIONS_MAX) in reason) == (OPTIONS_MAX, True)


def test_a_turn_ends_when_it_has_much_to_send():
    server = handshake()
    stream = FIXED + pack_option(Option.LIST) * 2000
    at = turns = 0
    while at < len(stream):
        step = server.receive(stream[at:])
        assert step.consumed > 0
        assert len(step.send) < server_handshake.SEND_STOP + 1000
        at, turns = at + step.consumed, turns + 1
    assert turns > 2


# -- TLS -------------------------------------------------------------------------------------------------------


def test_where_tls_is_required_nothing_is_told_before_it():
    offer = Exports()
    stream = FIXED + pack_option(Option.LIST) + STRUCTURED + SET + pack_option(99, b"x") + GO + STARTTLS
    sent, outcome, _ = feed(ServerHandshake(offer, tls=TlsMode.REQUIRE), stream)
    assert kinds(sent) == [OptionReply.ERR_TLS_REQD] * 5 + [OptionReply.ACK]
    assert (outcome, offer.asked) == (StartTls(), [])


def test_where_tls_is_required_export_name_ends_the_connection():
    assert "without TLS" in closed(FIXED + pack_option(Option.EXPORT_NAME, b"disk"), tls=TlsMode.REQUIRE)[1]


@pytest.mark.parametrize("mode", [TlsMode.ALLOW, TlsMode.REQUIRE])
def test_after_tls_the_handshake_goes_on_and_knows_nothing_of_before(mode):
    server = handshake(tls=mode)
    sent, outcome, _ = feed(server, FIXED + STRUCTURED + SET + STARTTLS)
    assert outcome == StartTls()
    sent, outcome, _ = feed(server, SET + GO)
    assert kinds(sent)[0] == OptionReply.ERR_INVALID
    session = outcome.session
    assert (session.tls, session.structured, session.contexts, session.no_zeroes) == (True, False, {}, True)


def test_bytes_behind_starttls_end_the_connection_without_an_answer():
    for behind in (b"\x16", GO, b"\x16\x03\x01" + bytes(500)):
        server = handshake(tls=TlsMode.ALLOW)
        step = server.receive(FIXED + STRUCTURED + STARTTLS + behind)
        assert kinds(step.send) == [OptionReply.ACK]
        assert "behind STARTTLS" in step.outcome.reason


def test_a_second_starttls_and_one_with_data_are_invalid():
    server = handshake(tls=TlsMode.ALLOW)
    sent, _, _ = feed(server, FIXED + pack_option(Option.STARTTLS, b"x"))
    assert kinds(sent) == [OptionReply.ERR_INVALID]
    feed(server, STARTTLS)
    sent, outcome, _ = feed(server, STARTTLS + GO)
    assert (kinds(sent)[0], type(outcome)) == (OptionReply.ERR_INVALID, Ready)


def test_a_server_without_tls_refuses_it_and_goes_on():
    sent, outcome, _ = feed(handshake(), FIXED + STARTTLS + GO)
    assert (kinds(sent)[0], outcome.session.tls) == (OptionReply.ERR_POLICY, False)


def test_a_failed_choice_of_contexts_forgets_the_ones_before():
    for failing in (
        pack_option(Option.SET_META_CONTEXT, b"malformed"),
        pack_option(Option.SET_META_CONTEXT, pack_meta_request("other", ["base:allocation"])),
        pack_option(Option.SET_META_CONTEXT, bytes(OPTION_MAX + 1)),
    ):
        outcome = feed(handshake(), FIXED + STRUCTURED + SET + failing + GO)[1]
        assert outcome.session.contexts == {}


# -- anything --------------------------------------------------------------------------------------------------


def endure(stream, mode, seed):
    """Feed a stream in random pieces: it ends, and what is sent stays in proportion to what was received."""
    pieces = random.Random(seed).choices((1, 2, 7, 16, 20, 300), k=len(stream))
    server = handshake(tls=mode)
    sent, outcome, left = feed(server, stream, pieces)
    assert outcome is None or type(outcome) in (StartTls, Ready, Close)
    assert len(sent) <= 64 * (len(stream) + 16)
    if outcome is None:
        assert len(left) < 16
    repr(server)


@settings(max_examples=300)
@given(st.binary(max_size=300), st.sampled_from(TlsMode), st.integers(0, 100))
def test_any_bytes_end_in_an_outcome_or_wait_for_more(data, mode, seed):
    endure(FIXED + data, mode, seed)
    endure(data, mode, seed)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.one_of(st.sampled_from(Option), st.integers(0, 20)), st.binary(max_size=60))), st.data())
def test_any_options_end_in_an_outcome_or_wait_for_more(options, data):
    stream = FIXED + b"".join(pack_option(option, payload) for option, payload in options)
    endure(stream, data.draw(st.sampled_from(TlsMode)), data.draw(st.integers(0, 100)))


@settings(max_examples=300)
@given(st.sampled_from(sorted(CONVERSATIONS)), st.data())
def test_any_change_of_a_conversation_ends_in_an_outcome_or_waits_for_more(name, data):
    stream = bytearray(CONVERSATIONS[name])
    for _ in range(data.draw(st.integers(1, 5))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    endure(bytes(stream), data.draw(st.sampled_from(TlsMode)), data.draw(st.integers(0, 100)))


def test_the_size_is_asked_for_anew_each_time():
    class Growing(Exports):
        def find(self, name):
            found = super().find(name)
            return found and server_handshake.ExportOffer(found.name, "", len(self.asked) << 20, found.flags)

    info = pack_option(Option.INFO, pack_info_request("disk", []))
    sent, _, _ = feed(ServerHandshake(Growing()), FIXED + info + info)
    assert [parse_info(data).size >> 20 for _, kind, data in replies(sent) if kind == OptionReply.INFO] == [1, 2]
