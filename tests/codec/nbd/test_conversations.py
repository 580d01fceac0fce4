"""Both sides of a handshake together: whatever each of them can, they agree on the same."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import (
    AccessDeniedError,
    UnsupportedError,
)
from blocklayer.codec.nbd.client_handshake import (
    Failed,
    Listed,
    Mode,
    Ready,
    Wish,
)
from blocklayer.codec.nbd.protocol import (
    TlsMode,
)
from blocklayer.codec.nbd.server_handshake import Close
from blocklayer.codec.nbd.server_options import RULES
from tests.helpers.nbd_handshakes import BLOCKY, DISK, Exports, Talk

WISHES = [
    Wish("disk"),
    Wish("disk", contexts=("base:allocation", "a:b"), full_info=True),
    Wish("disk", tls=TlsMode.REQUIRE),
    Wish(mode=Mode.LIST),
    Wish(mode=Mode.INFO, full_info=True),
]

CHOICES = list(
    product((False, True), (False, True), ((), ("base:allocation", "x:unknown")), Mode, (False, True), TlsMode)
)


@pytest.mark.parametrize(("structured", "extended", "contexts", "mode", "full_info", "tls"), CHOICES)
def test_both_sides_agree_on_the_same(structured, extended, contexts, mode, full_info, tls):
    client_tls = TlsMode.OFF if tls is TlsMode.OFF else TlsMode.REQUIRE
    wish = Wish("", mode, client_tls, structured, extended, contexts, full_info)
    talk = Talk(wish, Exports(), tls=tls)
    assert talk.encrypted == [tls is not TlsMode.OFF] * 2
    if mode is Mode.LIST:
        assert talk.client_outcome.exports == (("disk", "the system disk"), ("blocky", ""))
        assert type(talk.server_outcome) is Close
        return
    export = talk.client_outcome.export
    assert (export.size, export.structured, export.extended) == (
        1 << 30, structured or extended or bool(contexts), extended,
    )  # fmt: skip
    assert export.contexts == ({0: "base:allocation"} if contexts else {})
    assert (export.name, export.description) == (("disk", "the system disk") if full_info else ("", ""))
    assert (export.minimum, export.preferred, export.maximum) == (1, 4096, 1 << 25)
    listed = mode is Mode.INFO and full_info and export.structured
    assert export.contexts_offered == (DISK.contexts if listed else ())
    if mode is Mode.INFO:
        assert type(talk.server_outcome) is Close
        return
    session = talk.server_outcome.session
    assert (session.structured, session.extended, session.contexts, session.flags, session.tls) == (
        export.structured, export.extended, export.contexts, export.flags, export.tls,
    )  # fmt: skip
    assert (talk.to_server, talk.to_client) == (b"", b"")


def test_both_sides_agree_on_block_sizes():
    export = Talk(Wish("blocky"), Exports()).client_outcome.export
    assert (export.minimum, export.preferred, export.maximum) == (BLOCKY.minimum, BLOCKY.preferred, BLOCKY.maximum)


def test_a_server_that_requires_tls_and_a_client_without_it_part():
    talk = Talk(Wish("disk"), Exports(), tls=TlsMode.REQUIRE)
    assert type(talk.client_outcome.error) is AccessDeniedError
    assert type(talk.server_outcome) is Close


def test_a_client_that_requires_tls_and_a_server_without_it_part():
    talk = Talk(Wish("disk", tls=TlsMode.REQUIRE), Exports())
    assert type(talk.client_outcome.error) is UnsupportedError
    assert b"disk" not in talk.said


@pytest.mark.parametrize("unknown", [(11,), (8, 11), (10,), (9, 10, 11), (7, 11), (6, 7, 8, 9, 10, 11)])
def test_both_sides_agree_although_the_server_is_older(unknown, monkeypatch):
    for option in unknown:
        monkeypatch.delitem(RULES, option)
    talk = Talk(Wish("disk", contexts=("base:allocation",)), Exports())
    export, session = talk.client_outcome.export, talk.server_outcome.session
    assert (export.extended, export.structured) == (11 not in unknown, not {8, 11} <= set(unknown))
    assert bool(export.contexts) == (export.structured and 10 not in unknown)
    assert (session.structured, session.extended, session.contexts, session.flags) == (
        export.structured, export.extended, export.contexts, export.flags,
    )  # fmt: skip
    assert (talk.to_server, talk.to_client) == (b"", b"")


@settings(max_examples=200)
@given(st.data())
def test_both_sides_survive_a_line_that_garbles(data):
    def mangle(sent):
        if not sent or not data.draw(st.booleans()):
            return sent
        garbled = bytearray(sent)
        garbled[data.draw(st.integers(0, len(sent) - 1))] ^= data.draw(st.integers(1, 255))
        return bytes(garbled)

    talk = Talk(data.draw(st.sampled_from(WISHES)), Exports(), tls=data.draw(st.sampled_from(TlsMode)), mangle=mangle)
    assert talk.client_outcome is None or type(talk.client_outcome) in (Ready, Listed, Failed)
