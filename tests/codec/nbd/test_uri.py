"""Names of exports: what is parsed is formatted back, and what would not be heeded is refused."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blocklayer.base.errors import OptionError, UnsupportedError
from blocklayer.codec.nbd.uri import NbdUri, is_nbd_uri

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30)
SOME_TEXT = TEXTS.filter(bool)
HOSTS = st.one_of(
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True),
    st.sampled_from(["::1", "2001:db8::7", "fe80::1%eth0", "127.0.0.1", "bücher.example"]),
)
TLS_FIELDS = {
    "username": st.none() | SOME_TEXT,
    "hostname": st.none() | SOME_TEXT,
    "certificates": st.none() | SOME_TEXT,
    "verify_peer": st.booleans(),
}
PLACES = st.one_of(
    st.fixed_dictionaries({"host": HOSTS, "port": st.integers(1, 65535)}),
    st.fixed_dictionaries({"socket": SOME_TEXT}),
    st.fixed_dictionaries({"socket": SOME_TEXT.map("\0".__add__)}),
)
URIS = st.one_of(
    st.builds(lambda place, export: NbdUri(**place, export=export), PLACES, TEXTS),
    st.builds(
        lambda place, export, tls: NbdUri(**place, export=export, tls=True, **tls),
        PLACES,
        TEXTS,
        st.fixed_dictionaries(TLS_FIELDS),
    ),
)


@given(URIS)
def test_what_is_formatted_is_parsed_back(uri: NbdUri) -> None:
    text = str(uri)
    assert NbdUri.parse(text) == uri
    assert (text.isascii(), is_nbd_uri(text)) == (True, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://example.com", NbdUri("example.com")),
        ("nbd://example.com/", NbdUri("example.com")),
        ("nbd://example.com:10810/disk", NbdUri("example.com", 10810, export="disk")),
        ("nbd://example.com:/disk", NbdUri("example.com", export="disk")),
        ("nbd://example.com//disk", NbdUri("example.com", export="/disk")),
        ("nbd://example.com/a/b@c:d", NbdUri("example.com", export="a/b@c:d")),
        ("nbd://example.com/hello%20world", NbdUri("example.com", export="hello world")),
        ("nbd://example.com/1+1", NbdUri("example.com", export="1+1")),
        ("nbd://example.com/%C3%A4?", NbdUri("example.com", export="ä")),
        ("NBD://example.com", NbdUri("example.com")),
        ("nbd:///disk", NbdUri("localhost", export="disk")),
        ("nbd://:10810/disk", NbdUri("localhost", 10810, export="disk")),
        ("nbd://[::1]/", NbdUri("::1")),
        ("nbd://[fe80::1%25eth0]:1/", NbdUri("fe80::1%eth0", 1)),
        ("nbd://127.0.0.1:80/x", NbdUri("127.0.0.1", 80, export="x")),
        ("nbds://example.com/x", NbdUri("example.com", export="x", tls=True)),
        ("nbds://bob@example.com/", NbdUri("example.com", tls=True, username="bob")),
        ("nbds://h/?tls-username=bob", NbdUri("h", tls=True, username="bob")),
        ("nbds://bob@h/?tls-username=bob&tls-type=x509", NbdUri("h", tls=True, username="bob")),
        ("nbds://h/?tls-verify-peer=0", NbdUri("h", tls=True, verify_peer=False)),
        ("nbds://h/?tls-verify-peer=1&", NbdUri("h", tls=True)),
        (
            "nbds://h/?tls-certificates=/etc/pki/a%20b&tls-hostname=other",
            NbdUri("h", tls=True, certificates="/etc/pki/a b", hostname="other"),
        ),
        ("nbd+unix:///?socket=nbd.sock", NbdUri(socket="nbd.sock")),
        ("nbd+unix:///disk?socket=/run/a%26b=c.sock", NbdUri(socket="/run/a&b=c.sock", export="disk")),
        ("nbd+unix:///?socket=%00/abstract", NbdUri(socket="\0/abstract")),
        ("nbd+unix:///?socket=/run/%FF", NbdUri(socket="/run/\udcff")),
        ("nbds+unix://bob@/x?socket=s", NbdUri(socket="s", export="x", tls=True, username="bob")),
    ],
)
def test_a_uri_means(text: str, expected: NbdUri) -> None:
    uri = NbdUri.parse(text)
    assert uri == expected
    assert NbdUri.parse(str(uri)) == expected


def test_defaults_are_not_spelled_out() -> None:
    assert str(NbdUri("::1", export="/a b")) == "nbd://[::1]//a%20b"
    assert str(NbdUri(socket="/run/x", tls=True, verify_peer=False)) == (
        "nbds+unix:///?socket=/run/x&tls-verify-peer=0"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("example.com:10809", "no URI"),
        ("nbd:example.com:10809:exportname=x", "no URI"),
        ("nbd://a b/", "written as %XX"),
        ("nbd://h/ä", "written as %XX"),
        ("nbd://h/x\n", "written as %XX"),
        ("http://h/x", "'http' is not one of nbd, nbds"),
        ("nbd://h/x#y", "fragment"),
        ("nbd://h/x%2", "two hexadecimal digits"),
        ("nbd://h/100%", "two hexadecimal digits"),
        ("nbd://h/%FF", "not UTF-8"),
        ("nbd://h/a%00b", "zero byte"),
        ("nbd://h/" + "a" * 4097, "4097 bytes"),
        ("nbd://h:0/", "0 is no port"),
        ("nbd://h:65536/", "65536 is no port"),
        ("nbd://h:" + "1" * 5000 + "/", "is no port"),
        ("nbd://h:x/", "IPv6 address stands in brackets"),
        ("nbd://::1/", "IPv6 address stands in brackets"),
        ("nbd://[::1/", "IPv6 address stands in brackets"),
        ("nbd://[::x]/", "no IPv6 address"),
        ("nbd://[example.com]/", "no IPv6 address"),
        ("nbd://a%20b/", "no name of a host"),
        ("nbds://bob:secret@h/", "no passwords"),
        ("nbds://bob@h/?tls-username=eve", "two user names"),
        ("nbds://@h/", "no user name"),
        ("nbd://bob@h/", "no effect without TLS"),
        ("nbd://h/?tls-certificates=/etc/pki", "tls-certificates has no effect"),
        ("nbd://h/?tls-verify-peer=0", "tls-verify-peer has no effect"),
        ("nbd+unix:///?socket=s&tls-hostname=h", "tls-hostname has no effect"),
        ("nbds://h/?tls-verify-peer=no", "is 0 or 1"),
        ("nbds://h/?tls-hostname=", "no host name"),
        ("nbds://h/?tls-hostname", "no value"),
        ("nbds://h/?tls-hostname=a&tls-hostname=b", "twice"),
        ("nbd://h/?colour=red", "'colour' is not known"),
        ("nbd://h/?socket=s", "socket= is for nbd+unix"),
        ("nbd+unix:///x", "which need it"),
        ("nbd+unix:///x?socket=", "no path"),
        ("nbd+unix:///x?socket=a%00b", "no path"),
        ("nbd+unix://h/x?socket=s", "has no host"),
        ("nbd+unix://:1/x?socket=s", "has no host"),
    ],
)
def test_a_wrong_uri_is_refused_and_told_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        NbdUri.parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["nbd+vsock://2:10809/x", "nbds+vsock://2/", "nbd+ssh://h/x", "nbds://h/?tls-type=psk", "nbds://h/?tls-type=anon"],
)
def test_transports_that_are_not_here_are_known_by_name(text: str) -> None:
    with pytest.raises(UnsupportedError, match="not supported"):
        NbdUri.parse(text)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"host": "h", "socket": "s"},
        {"host": ""},
        {"host": "a:b"},
        {"host": "h", "port": 0},
        {"socket": "s", "port": 1},
    ],
)
def test_a_server_is_in_one_place(fields: dict) -> None:
    with pytest.raises(OptionError):
        NbdUri(**fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("nbd://h", True), ("nbds+unix://", True), ("nbd+vsock://2", True), ("nbd:h", False), ("x.qcow2", False)],
)
def test_a_name_is_meant_as_a_uri(text: str, expected: bool) -> None:
    assert is_nbd_uri(text) == expected


@given(st.one_of(st.text(max_size=60), st.text("nbds+unix:/?=&%[]@#.0:ax-tlsocke", max_size=60).map("nbd".__add__)))
@example("nbd://h:٣/")
def test_any_text_is_a_uri_or_a_typed_error(text: str) -> None:
    with suppress(OptionError, UnsupportedError):
        assert NbdUri.parse(str(NbdUri.parse(text))) == NbdUri.parse(text)
