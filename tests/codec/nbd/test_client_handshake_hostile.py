"""The client's turns with servers that break the protocol, and with streams in any pieces."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import (
    ProtocolError,
)
from blocklayer.base.units import SIZE_MAX
from blocklayer.codec.nbd.client_handshake import (
    ClientHandshake,
    Failed,
    Listed,
    Mode,
    Ready,
    StartTls,
    Wish,
)
from blocklayer.codec.nbd.options import (
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    NameInfo,
    pack_export,
    pack_greeting,
    pack_option,
    pack_option_reply,
    pack_server,
)
from blocklayer.codec.nbd.protocol import (
    EXPORTS_MAX,
    OPTION_REPLY_MAX,
    HandshakeFlags,
    Option,
    OptionReply,
    TlsMode,
)
from tests.helpers.nbd_handshakes import GREETING, ack, context, feed, gone, info, no

R = OptionReply
GO = Wish("disk", structured=False, extended=False)
ABORT = pack_option(Option.ABORT)


def meet(wish, *answers, greeting=GREETING):
    return feed(ClientHandshake(wish), greeting + b"".join(answers))


def failure(wish, *answers, greeting=GREETING):
    """The error and whether the client took its leave."""
    sent, outcome, _ = meet(wish, *answers, greeting=greeting)
    assert type(outcome) is Failed, outcome
    return outcome.error, sent.endswith(ABORT)


# -- hostile servers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "no NBD server"),
        (b"NBDMAGICIHAVEOPS\0\3", "IHAVEOPT"),
        (GREETING + bytes(20), "option reply begins"),
        (GREETING + ack(Option.LIST), "while GO waits"),
        (GREETING + pack_option_reply(Option.GO, R.SERVER, pack_server("a")), "with type 2"),
        (GREETING + pack_option_reply(Option.GO, R.ACK, b"x"), "has 1 bytes"),
        (GREETING + ack(Option.GO), "did not tell"),
        (GREETING + info(ExportInfo(SIZE_MAX + 1, 1)) + ack(Option.GO), "more than"),
        (GREETING + pack_option_reply(Option.GO, R.INFO, b"\0\0\0"), "takes 10 bytes"),
        (GREETING + info(BlockSizeInfo(3, 512, 512)), "block size"),
        (GREETING + pack_option_reply(Option.GO, R.INFO, b"\0\1\xff"), "UTF-8"),
        (GREETING + ack(Option.GO)[:16] + b"\xff\xff\xff\xff", "has 4294967295 bytes"),
        (GREETING + no(Option.GO)[:16] + (OPTION_REPLY_MAX + 1).to_bytes(4, "big"), "bytes"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_left_without_a_word(stream, words):
    error, polite = failure(GO, greeting=stream)
    assert (type(error), polite) == (ProtocolError, False)
    assert words in str(error)


def test_contexts_that_were_not_chosen_are_refused():
    wish = Wish("disk", contexts=("a:b",))
    assert type(failure(wish, ack(Option.EXTENDED_HEADERS), context(0, "c:d"))[0]) is ProtocolError


def test_a_list_without_an_end_ends():
    one = pack_option_reply(Option.LIST, R.SERVER, pack_server("a"))
    error, _ = failure(Wish(mode=Mode.LIST), one * (EXPORTS_MAX + 2))
    assert "too many" in str(error)


def test_a_handshake_that_is_over_stays_over():
    client = ClientHandshake(GO)
    client.receive(GREETING + gone())
    step = client.receive(b"more")
    assert (step.consumed, step.send, type(step.outcome)) == (0, b"", Failed)


# -- streams ---------------------------------------------------------------------------------------------------

STREAMS = {
    "go": (GO, GREETING + gone()),
    "everything": (
        Wish("disk", contexts=("base:allocation", "a:b"), full_info=True),
        GREETING
        + no(Option.EXTENDED_HEADERS, message="too old")
        + ack(Option.STRUCTURED_REPLY)
        + context(3, "base:allocation")
        + context(4, "a:b")
        + ack(Option.SET_META_CONTEXT)
        + info(NameInfo("x"), DescriptionInfo("y"), BlockSizeInfo(1, 512, 512), ExportInfo(512, 1))
        + ack(Option.GO),
    ),
    "export name": (GO, pack_greeting(HandshakeFlags(1)) + no(Option.GO) + pack_export(512, 1, zeroes=True)),
    "list": (
        Wish(mode=Mode.LIST),
        GREETING + pack_option_reply(Option.LIST, R.SERVER, pack_server("a", "b")) + ack(Option.LIST),
    ),
    "failed": (GO, GREETING + no(Option.GO, R.ERR_UNKNOWN, "no")),
}


def told(outcome):
    return str(outcome.error) if isinstance(outcome, Failed) else outcome


@pytest.mark.parametrize("name", STREAMS)
def test_every_way_to_cut_a_stream_gives_the_same(name):
    wish, stream = STREAMS[name]
    sent, outcome, left = feed(ClientHandshake(wish), stream)
    assert type(outcome) is Failed or (outcome is not None and left == b"")
    for pieces in [*([at] for at in range(len(stream))), [1] * len(stream)]:
        again, other, _ = feed(ClientHandshake(wish), stream, pieces)
        assert (again, told(other)) == (sent, told(outcome))


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_ends_early_has_no_outcome(name):
    wish, stream = STREAMS[name]
    sent, _, _ = feed(ClientHandshake(wish), stream)
    for end in range(len(stream)):
        so_far, early, _ = feed(ClientHandshake(wish), stream[:end])
        assert (early, sent.startswith(so_far)) == (None, True)


def endure(wish, stream, seed):
    """Feed a stream in random pieces: it ends in an outcome or waits, and sends no more than it has options."""
    client = ClientHandshake(wish)
    sent, outcome, left = feed(client, stream, random.Random(seed).choices((1, 3, 20, 100), k=len(stream)))
    if type(outcome) is StartTls:
        _, outcome, left = feed(client, b"")
    assert outcome is None or type(outcome) in (Ready, Listed, Failed)
    assert len(sent) < 8192
    assert outcome is not None or len(left) < 134
    repr(client)


WISHES = [wish for wish, _ in STREAMS.values()] + [
    Wish("disk", tls=TlsMode.REQUIRE),
    Wish(mode=Mode.INFO, full_info=True),
]


@settings(max_examples=300)
@given(st.binary(max_size=300), st.sampled_from(WISHES), st.integers(0, 100))
def test_any_bytes_end_in_an_outcome_or_wait_for_more(data, wish, seed):
    endure(wish, GREETING + data, seed)
    endure(wish, data, seed)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from(Option), st.sampled_from(R), st.one_of(st.just(b""), st.binary(max_size=40)))),
    st.sampled_from(WISHES),
    st.integers(0, 100),
)
def test_any_replies_end_in_an_outcome_or_wait_for_more(answers, wish, seed):
    endure(wish, GREETING + b"".join(pack_option_reply(*answer) for answer in answers), seed)


@settings(max_examples=300)
@given(st.sampled_from(sorted(STREAMS)), st.data())
def test_any_change_of_a_stream_ends_in_an_outcome_or_waits_for_more(name, data):
    wish, whole = STREAMS[name]
    stream = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 5))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    endure(wish, bytes(stream), data.draw(st.integers(0, 100)))
