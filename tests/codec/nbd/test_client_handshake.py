"""The client's turns: the order of options, ways around old servers, TLS, hostile servers, and both sides together."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from blocklayer.base.errors import (
    AccessDeniedError,
    IOFailedError,
    NotFoundError,
    OptionError,
    ProtocolError,
    UnsupportedError,
)
from blocklayer.codec.nbd.client_handshake import (
    ClientHandshake,
    Failed,
    Listed,
    Mode,
    Ready,
    RemoteExport,
    StartTls,
    Wish,
)
from blocklayer.codec.nbd.options import (
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    NameInfo,
    pack_client_flags,
    pack_export,
    pack_greeting,
    pack_option,
    pack_option_reply,
    pack_server,
    parse_option_header,
)
from blocklayer.codec.nbd.protocol import (
    HandshakeFlags,
    Option,
    OptionReply,
    TlsMode,
    TransmissionFlags,
)
from tests.helpers.nbd_handshakes import GREETING, ack, context, feed, gone, info, no

R = OptionReply
F = TransmissionFlags
GO = Wish("disk", structured=False, extended=False)
ABORT = pack_option(Option.ABORT)


def options(sent):
    """The options in what a client sent after its flags."""
    found, sent = [], sent[4:]
    while sent:
        option, length = parse_option_header(sent)
        found.append(option)
        sent = sent[16 + length :]
    return found


def meet(wish, *answers, greeting=GREETING):
    return feed(ClientHandshake(wish), greeting + b"".join(answers))


def failure(wish, *answers, greeting=GREETING):
    """The error and whether the client took its leave."""
    sent, outcome, _ = meet(wish, *answers, greeting=greeting)
    assert type(outcome) is Failed, outcome
    return outcome.error, sent.endswith(ABORT)


# -- the order of options --------------------------------------------------------------------------------------


def test_flags_and_the_first_option_go_out_together():
    sent, outcome, _ = meet(GO)
    assert (sent[:4], options(sent), outcome) == (pack_client_flags(3), [Option.GO], None)


@pytest.mark.parametrize("flags", [1, 3])
def test_only_known_flags_of_the_server_are_repeated(flags):
    sent, _, _ = meet(GO, greeting=pack_greeting(HandshakeFlags(flags | 0x80)))
    assert sent[:4] == pack_client_flags(flags)


def test_an_option_waits_for_the_final_reply_to_the_one_before():
    wish = Wish("disk", contexts=("base:allocation",))
    client = ClientHandshake(wish)
    order = []
    for answer in (
        GREETING,
        no(Option.EXTENDED_HEADERS),
        ack(Option.STRUCTURED_REPLY),
        context(3, "base:allocation"),
        ack(Option.SET_META_CONTEXT),
        info(ExportInfo(512, 1)),
        ack(Option.GO),
    ):
        sent, outcome, _ = feed(client, answer)
        order.append(options(sent if answer is GREETING else bytes(4) + sent))
    assert order == [[11], [8], [10], [], [7], [], []]
    assert outcome.export == RemoteExport("disk", 512, F.HAS_FLAGS, structured=True, contexts={3: "base:allocation"})


def test_extended_headers_make_structured_replies_superfluous():
    sent, outcome, _ = meet(Wish("disk"), ack(Option.EXTENDED_HEADERS), gone())
    assert options(sent) == [Option.EXTENDED_HEADERS, Option.GO]
    assert (outcome.export.structured, outcome.export.extended) == (True, True)


def test_contexts_bring_structured_replies_with_them():
    wish = Wish("disk", structured=False, extended=False, contexts=("base:allocation",))
    sent, outcome, _ = meet(wish, ack(Option.STRUCTURED_REPLY), ack(Option.SET_META_CONTEXT), gone())
    assert options(sent) == [Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.GO]
    assert outcome.export.contexts == {}


def test_contexts_are_not_asked_for_without_structured_replies():
    wish = Wish("disk", contexts=("base:allocation",))
    sent, outcome, _ = meet(wish, no(Option.EXTENDED_HEADERS), no(Option.STRUCTURED_REPLY), gone())
    assert options(sent) == [Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY, Option.GO]
    assert (outcome.export.structured, outcome.export.contexts) == (False, {})


@pytest.mark.parametrize("kind", [R.ERR_UNSUP, R.ERR_POLICY, R.ERR_INVALID, R.ERR_TOO_BIG, R.ERR_UNKNOWN, 0x80001234])
def test_contexts_that_are_refused_are_done_without(kind):
    wish = Wish("disk", contexts=("base:allocation",))
    refusal = context(1, "base:allocation") + no(Option.SET_META_CONTEXT, kind)
    _, outcome, _ = meet(wish, ack(Option.EXTENDED_HEADERS), refusal, gone())
    assert outcome.export.contexts == {}


# -- what is learnt --------------------------------------------------------------------------------------------


def test_go_tells_of_the_export():
    wish = replace(GO, full_info=True)
    told = (ExportInfo(1 << 30, 0x8001), NameInfo("Disk"), DescriptionInfo("a disk"), BlockSizeInfo(512, 4096, 1 << 20))
    _, outcome, left = meet(wish, info(*told), ack(Option.GO), b"behind")
    assert outcome.export == RemoteExport(
        "Disk", 1 << 30, F.HAS_FLAGS, "a disk", minimum=512, preferred=4096, maximum=1 << 20, sizes_advertised=True
    )
    assert left == b"behind"


def test_a_server_that_tells_no_block_sizes_has_customary_ones():
    export = meet(GO, gone())[1].export
    assert (export.minimum, export.preferred, export.maximum, export.sizes_advertised) == (1, 4096, 1 << 25, False)


def test_flags_that_mean_nothing_here_are_not_believed():
    flags = F.HAS_FLAGS | F.SEND_DF | F.SEND_FAST_ZERO | F.BLOCK_STATUS_PAYLOAD | F.SEND_TRIM
    assert meet(GO, gone(flags=int(flags)))[1].export.flags == F.HAS_FLAGS | F.SEND_TRIM


def test_unknown_information_is_ignored():
    unknown = pack_option_reply(Option.GO, R.INFO, b"\x12\x34whatever")
    assert meet(GO, unknown, gone())[1].export.size == 512


def test_mode_info_ends_with_a_farewell():
    wish = Wish("disk", mode=Mode.INFO, structured=False, extended=False)
    sent, outcome, _ = meet(wish, info(ExportInfo(512, 1), option=Option.INFO), ack(Option.INFO))
    assert options(sent) == [Option.INFO, Option.ABORT]
    assert outcome == Ready(RemoteExport("disk", 512, F.HAS_FLAGS))


def test_mode_info_with_full_info_lists_the_contexts():
    wish = Wish("disk", mode=Mode.INFO, full_info=True)
    offered = context(0, "base:allocation", Option.LIST_META_CONTEXT) + ack(Option.LIST_META_CONTEXT)
    end = info(ExportInfo(512, 1), option=Option.INFO) + ack(Option.INFO)
    sent, outcome, _ = meet(wish, ack(Option.EXTENDED_HEADERS), offered, end)
    assert options(sent) == [Option.EXTENDED_HEADERS, Option.LIST_META_CONTEXT, Option.INFO, Option.ABORT]
    assert outcome.export.contexts_offered == ("base:allocation",)


def test_mode_list_asks_for_nothing_else():
    servers = b"".join(pack_option_reply(Option.LIST, R.SERVER, pack_server(name, "x")) for name in ("a", "b"))
    sent, outcome, _ = meet(Wish(mode=Mode.LIST), servers, ack(Option.LIST))
    assert options(sent) == [Option.LIST, Option.ABORT]
    assert outcome == Listed((("a", "x"), ("b", "x")))


# -- old servers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "zeroes"), [(3, b""), (1, bytes(124))])
def test_a_server_without_go_is_asked_by_export_name(flags, zeroes):
    greeting = pack_greeting(HandshakeFlags(flags))
    sent, outcome, left = meet(GO, no(Option.GO), pack_export(512, 1, zeroes=bool(zeroes)), b"x", greeting=greeting)
    assert options(sent) == [Option.GO, Option.EXPORT_NAME]
    assert (outcome, left) == (Ready(RemoteExport("disk", 512, F.HAS_FLAGS)), b"x")


def test_what_was_agreed_on_holds_after_export_name_too():
    wish = Wish("disk", extended=False, contexts=("base:allocation",))
    chosen = ack(Option.STRUCTURED_REPLY) + context(3, "base:allocation") + ack(Option.SET_META_CONTEXT)
    _, outcome, _ = meet(wish, chosen, no(Option.GO), pack_export(512, int(F.SEND_DF), zeroes=False))
    assert outcome.export == RemoteExport("disk", 512, F.SEND_DF, structured=True, contexts={3: "base:allocation"})


@pytest.mark.parametrize(("flags", "length"), [(0, 134), (2, 10)])
def test_a_server_without_fixed_newstyle_has_export_name_only(flags, length):
    greeting = pack_greeting(HandshakeFlags(flags))
    answer = pack_export(512, 1, zeroes=length == 134)
    sent, outcome, left = meet(Wish("disk", contexts=("a:b",)), answer, greeting=greeting)
    assert (sent[:4], options(sent)) == (pack_client_flags(flags), [Option.EXPORT_NAME])
    assert (outcome.export.size, left) == (512, b"")


@pytest.mark.parametrize("mode", [Mode.INFO, Mode.LIST])
def test_a_server_without_fixed_newstyle_cannot_tell_of_exports(mode):
    assert failure(Wish(mode=mode), greeting=pack_greeting(HandshakeFlags(0)))[0].message.endswith("its exports")


def test_an_oldstyle_server_is_named_as_such():
    greeting = b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(8 + 4 + 124)
    error, _ = failure(GO, greeting=greeting)
    assert (type(error), "oldstyle" in str(error)) == (UnsupportedError, True)


def test_go_cannot_be_unknown_after_extended_headers():
    assert type(failure(Wish("disk"), ack(Option.EXTENDED_HEADERS), no(Option.GO))[0]) is ProtocolError


# -- refusals --------------------------------------------------------------------------------------------------


def test_an_export_that_is_not_there_is_not_found_and_the_client_takes_its_leave():
    error, polite = failure(GO, no(Option.GO, R.ERR_UNKNOWN, "no such thing"))
    assert (type(error), polite) == (NotFoundError, True)
    assert str(error) == "the server has no export 'disk' (it says: no such thing)"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (R.ERR_POLICY, AccessDeniedError),
        (R.ERR_TLS_REQD, AccessDeniedError),
        (R.ERR_SHUTDOWN, IOFailedError),
        (R.ERR_INVALID, IOFailedError),
        (R.ERR_BLOCK_SIZE_REQD, UnsupportedError),
        (0x80001234, IOFailedError),
    ],
)
def test_other_refusals_of_go_are_errors(kind, expected):
    error, polite = failure(GO, no(Option.GO, kind))
    assert (type(error), polite) == (expected, True)


@pytest.mark.parametrize("kind", [R.ERR_SHUTDOWN, R.ERR_TLS_REQD])
def test_a_server_that_closes_down_or_demands_tls_is_left_at_the_first_option(kind):
    error, polite = failure(Wish("disk"), no(Option.EXTENDED_HEADERS, kind))
    assert (type(error) in (IOFailedError, AccessDeniedError), polite) == (True, True)


@pytest.mark.parametrize("mode", [Mode.INFO, Mode.LIST])
def test_a_server_that_does_not_tell_is_an_error(mode):
    wish = Wish(mode=mode, structured=False, extended=False)
    option = Option.INFO if mode is Mode.INFO else Option.LIST
    assert type(failure(wish, no(option))[0]) is UnsupportedError
    assert type(failure(wish, no(option, R.ERR_POLICY))[0]) is AccessDeniedError


def test_a_server_that_hangs_up_is_explained():
    client = ClientHandshake(GO)
    assert str(client.at_end()) == "the server hung up before the greeting"
    feed(client, GREETING)
    assert str(client.at_end()) == "the server hung up before the reply to GO"
    assert client.at_end().errno == errno.ECONNRESET
    feed(client, no(Option.GO))
    assert type(client.at_end()) is NotFoundError


# -- TLS -------------------------------------------------------------------------------------------------------


def test_tls_comes_first_and_the_rest_through_it():
    client = ClientHandshake(Wish("disk", tls=TlsMode.REQUIRE))
    sent, outcome, _ = feed(client, GREETING + ack(Option.STARTTLS))
    assert (options(sent), outcome) == ([Option.STARTTLS], StartTls())
    sent, outcome, _ = feed(client, b"")
    assert (sent, outcome) == (pack_option(Option.EXTENDED_HEADERS), None)
    _, outcome, _ = feed(client, ack(Option.EXTENDED_HEADERS) + gone())
    assert (outcome.export.tls, outcome.export.extended) == (True, True)


@pytest.mark.parametrize("kind", [R.ERR_UNSUP, R.ERR_POLICY, R.ERR_PLATFORM, R.ERR_INVALID, R.ERR_TLS_REQD, 0x80001234])
def test_a_server_that_refuses_tls_gets_nothing_without_it(kind):
    wish = Wish("secret", tls=TlsMode.REQUIRE)
    sent, outcome, _ = meet(wish, no(Option.STARTTLS, kind))
    assert options(sent) == [Option.STARTTLS, Option.ABORT]
    assert (type(outcome.error), "TLS is required" in str(outcome.error)) == (UnsupportedError, True)
    assert b"secret" not in sent


def test_a_server_too_old_for_tls_is_left_at_once():
    sent, outcome, _ = meet(Wish(tls=TlsMode.REQUIRE), greeting=pack_greeting(HandshakeFlags(2)))
    assert (sent, type(outcome.error)) == (b"", UnsupportedError)


@pytest.mark.parametrize("behind", [b"x", ack(Option.EXTENDED_HEADERS), gone()])
def test_bytes_behind_the_consent_to_tls_are_an_attack(behind):
    error, _ = failure(Wish(tls=TlsMode.REQUIRE), ack(Option.STARTTLS) + behind)
    assert (type(error), "without encryption" in str(error)) == (ProtocolError, True)


def test_tls_cannot_be_demanded_twice():
    client = ClientHandshake(Wish("disk", tls=TlsMode.REQUIRE))
    feed(client, GREETING + ack(Option.STARTTLS))
    feed(client, b"")
    _, outcome, _ = feed(client, no(Option.EXTENDED_HEADERS, R.ERR_TLS_REQD))
    assert type(outcome.error) is ProtocolError


# -- wishes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"export": "a" * 4097},
        {"export": "a\0"},
        {"contexts": ("a" * 4097,)},
        {"contexts": ("a:b", "a:b")},
        {"contexts": tuple(f"a:{number}" for number in range(65))},
        {"tls": TlsMode.ALLOW},
    ],
)
def test_a_wish_that_cannot_be_sent_is_refused(fields):
    with pytest.raises(OptionError):
        Wish(**fields)
