"""Replies to one option: collected, counted, and refused where a server breaks the rules."""

from __future__ import annotations

import errno

import pytest

from blocklayer.base.errors import (
    AccessDeniedError,
    IOFailedError,
    NotFoundError,
    ProtocolError,
    UnsupportedError,
)
from blocklayer.codec.nbd.client_replies import Refusal, Replies, refused
from blocklayer.codec.nbd.options import (
    BlockSizeInfo,
    DescriptionInfo,
    ExportInfo,
    NameInfo,
    ReplyHeader,
    pack_info,
    pack_meta_context,
    pack_server,
)
from blocklayer.codec.nbd.protocol import (
    EXPORTS_MAX,
    OPTION_REPLIES_BYTES_MAX,
    OPTION_REPLIES_MAX,
    OPTION_REPLY_MAX,
    Option,
    OptionReply,
)

R = OptionReply


def tell(replies, option, kind, payload=b""):
    replies.admit(ReplyHeader(option, kind, len(payload)))
    return replies.add(kind, payload)


def test_information_is_collected_until_the_ack():
    replies = Replies(Option.GO, ())
    for info in (ExportInfo(512, 1), NameInfo("disk"), DescriptionInfo("a disk"), BlockSizeInfo(1, 512, 512)):
        assert not tell(replies, Option.GO, R.INFO, pack_info(info))
    assert not tell(replies, Option.GO, R.INFO, b"\x12\x34unknown")
    assert tell(replies, Option.GO, R.ACK)
    assert (replies.export, replies.name, replies.description) == (ExportInfo(512, 1), "disk", "a disk")
    assert (replies.block_sizes, replies.refusal) == (BlockSizeInfo(1, 512, 512), None)


def test_exports_are_collected_until_the_ack():
    replies = Replies(Option.LIST, ())
    assert not tell(replies, Option.LIST, R.SERVER, pack_server("disk", "a disk"))
    assert tell(replies, Option.LIST, R.ACK)
    assert replies.exports == [("disk", "a disk")]


def test_an_error_is_final_and_its_words_are_kept_printable():
    replies = Replies(Option.LIST, ())
    assert tell(replies, Option.LIST, R.ERR_POLICY, b"not\nfor you")
    assert replies.refusal == Refusal(Option.LIST, R.ERR_POLICY, "not\N{REPLACEMENT CHARACTER}for you")


def test_an_unknown_error_is_an_error():
    replies = Replies(Option.LIST, ())
    assert tell(replies, Option.LIST, 0x80001234)
    assert replies.refusal == Refusal(Option.LIST, 0x80001234, "")


def test_chosen_contexts_have_ids_and_offered_ones_names():
    chosen, offered = Replies(Option.SET_META_CONTEXT, ("a:b", "c:d")), Replies(Option.LIST_META_CONTEXT, ())
    for number, name in ((7, "c:d"), (1, "a:b")):
        tell(chosen, Option.SET_META_CONTEXT, R.META_CONTEXT, pack_meta_context(number, name))
        tell(offered, Option.LIST_META_CONTEXT, R.META_CONTEXT, pack_meta_context(0, name))
    assert (chosen.contexts, offered.offered) == ({7: "c:d", 1: "a:b"}, ["c:d", "a:b"])


@pytest.mark.parametrize(("number", "name"), [(1, "e:f"), (2, "a:b"), (1, "c:d")])
def test_contexts_that_were_not_asked_for_or_come_twice_are_refused(number, name):
    replies = Replies(Option.SET_META_CONTEXT, ("a:b", "c:d"))
    tell(replies, Option.SET_META_CONTEXT, R.META_CONTEXT, pack_meta_context(1, "a:b"))
    with pytest.raises(ProtocolError, match="unasked or twice"):
        tell(replies, Option.SET_META_CONTEXT, R.META_CONTEXT, pack_meta_context(number, name))


def test_a_reply_to_another_option_is_refused():
    with pytest.raises(ProtocolError, match="while LIST waits"):
        tell(Replies(Option.LIST, ()), Option.GO, R.ACK)


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        (Option.LIST, R.INFO),
        (Option.GO, R.SERVER),
        (Option.GO, R.META_CONTEXT),
        (Option.SET_META_CONTEXT, R.INFO),
        (Option.STRUCTURED_REPLY, R.INFO),
        (Option.STARTTLS, R.SERVER),
        (Option.LIST, 5),
        (Option.LIST, 0),
    ],
)
def test_a_reply_of_a_type_that_the_option_does_not_have_is_refused(option, kind):
    with pytest.raises(ProtocolError, match="with type"):
        tell(Replies(option, ()), option, kind)


@pytest.mark.parametrize(("kind", "length"), [(R.ACK, 1), (R.SERVER, OPTION_REPLY_MAX + 1), (R.ERR_POLICY, 2**32 - 1)])
def test_a_reply_that_is_too_long_is_refused_by_its_header(kind, length):
    with pytest.raises(ProtocolError, match="has"):
        Replies(Option.LIST, ()).admit(ReplyHeader(Option.LIST, kind, length))


@pytest.mark.parametrize(
    ("option", "kind", "length", "count_max"),
    [
        (Option.LIST, R.SERVER, 5, EXPORTS_MAX),
        (Option.GO, R.INFO, 2, OPTION_REPLIES_MAX),
        (Option.LIST_META_CONTEXT, R.META_CONTEXT, 5, OPTION_REPLIES_MAX),
        (Option.LIST, R.SERVER, OPTION_REPLY_MAX, OPTION_REPLIES_BYTES_MAX // (OPTION_REPLY_MAX + 20)),
    ],
)
def test_a_server_that_never_ends_is_cut_off(option, kind, length, count_max):
    replies = Replies(option, ())
    for _ in range(count_max):
        replies.admit(ReplyHeader(option, kind, length))
    with pytest.raises(ProtocolError, match="too many"):
        for _ in range(2):
            replies.admit(ReplyHeader(option, kind, length))


@pytest.mark.parametrize("sizes", [(0, 512, 512), (3, 512, 512), (1 << 17, 1 << 17, 1 << 17), (1, 0, 0), (512, 512, 1)])
def test_block_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(ProtocolError, match="the server's .* block size"):
        tell(Replies(Option.GO, ()), Option.GO, R.INFO, pack_info(BlockSizeInfo(*sizes)))


@pytest.mark.parametrize(
    ("kind", "expected", "code"),
    [
        (R.ERR_UNSUP, UnsupportedError, None),
        (R.ERR_POLICY, AccessDeniedError, errno.EACCES),
        (R.ERR_INVALID, IOFailedError, errno.EINVAL),
        (R.ERR_PLATFORM, UnsupportedError, None),
        (R.ERR_TLS_REQD, AccessDeniedError, errno.EACCES),
        (R.ERR_UNKNOWN, NotFoundError, None),
        (R.ERR_SHUTDOWN, IOFailedError, errno.ESHUTDOWN),
        (R.ERR_BLOCK_SIZE_REQD, UnsupportedError, None),
        (R.ERR_TOO_BIG, IOFailedError, errno.EINVAL),
        (R.ERR_EXT_HEADER_REQD, UnsupportedError, None),
        (0x80001234, IOFailedError, errno.EINVAL),
    ],
)
def test_each_refusal_has_its_exception(kind, expected, code):
    error = refused(Refusal(Option.GO, kind, ""), "disk")
    assert (type(error), getattr(error, "errno", None)) == (expected, code)


def test_a_refusal_names_the_export_or_the_option_and_keeps_the_servers_words():
    assert str(refused(Refusal(Option.GO, R.ERR_UNKNOWN, "try {x}"), "d{0}")) == (
        "the server has no export 'd{0}' (it says: try {x})"
    )
    assert str(refused(Refusal(Option.LIST, R.ERR_POLICY, ""), "")) == "the server's policy forbids LIST"
    assert "0x80001234" in str(refused(Refusal(Option.LIST, 0x80001234, ""), ""))
