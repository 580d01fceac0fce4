"""Options of the NBD driver: where they lead, and what contradicts itself."""

from __future__ import annotations

import ssl

import pytest

from blocklayer.base.errors import MissingFileError, OptionError, UnsupportedError
from blocklayer.drivers.nbd.options import client_context, parse, place_of


@pytest.mark.parametrize(
    ("options", "address", "export", "uri"),
    [
        ({"host": "a"}, ("a", 10809), "", "nbd://a/"),
        ({"host": "a", "port": "99", "export": "x y"}, ("a", 99), "x y", "nbd://a:99/x%20y"),
        ({"path": "/s", "export": "e"}, "/s", "e", "nbd+unix:///e?socket=/s"),
        ({"server": {"type": "inet", "host": "::1", "port": 7}}, ("::1", 7), "", "nbd://[::1]:7/"),
        ({"server": {"type": "unix", "path": "/s"}}, "/s", "", "nbd+unix:///?socket=/s"),
        ({"uri": "nbd://h:5/e"}, ("h", 5), "e", "nbd://h:5/e"),
        ({"uri": "nbd+unix:///e?socket=s"}, "s", "e", "nbd+unix:///e?socket=s"),
    ],
)
def test_where_options_lead(options, address, export, uri):
    place = place_of(parse(options))
    assert (place.address, place.export, place.tls, str(place)) == (address, export, None, uri)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "one of uri, host and path"),
        ({"host": "a", "path": "/s"}, "not by host and path"),
        ({"path": "/s", "port": 5}, "'port' needs 'host'"),
        ({"uri": "nbd://h", "export": "e"}, "part of 'uri'"),
        ({"uri": "nbd://h", "tls": "/x"}, "nbds:"),
        ({"host": "h", "tls-hostname": "x"}, "no effect"),
        ({"host": "h", "reconnect-delay": -1}, "negative"),
        ({"host": "h", "connections": 17}, "1 to 16"),
        ({"host": "h", "connections": 0}, "1 to 16"),
        ({"server": "h"}, "a group"),
        ({"server": {"type": "vsock"}}, "inet or unix"),
        ({"server": {"type": "unix", "host": "h"}}, r"server\.host"),
        ({"server": {"type": "inet", "host": "h"}, "host": "h"}, r"server\.host"),
        ({"host": "h", "speed": 1}, "unknown option 'speed'"),
    ],
)
def test_options_that_contradict_themselves(options, text):
    with pytest.raises(OptionError, match=text):
        place_of(parse(options))


def test_user_names_are_not_for_certificates():
    with pytest.raises(UnsupportedError, match="pre-shared"):
        place_of(parse({"uri": "nbds://me@h/"}))


def test_tls_verifies_the_server_unless_told_otherwise(tmp_path):
    place = place_of(parse({"uri": "nbds://h/"}))
    assert (place.hostname, place.tls.verify_mode, place.tls.check_hostname) == ("h", ssl.CERT_REQUIRED, True)
    assert place_of(parse({"uri": "nbds://h/", "tls-hostname": "other"})).hostname == "other"
    assert place_of(parse({"uri": "nbds://h/?tls-verify-peer=0"})).tls.verify_mode == ssl.CERT_NONE
    with pytest.raises(OptionError, match="needs tls-hostname"):
        place_of(parse({"uri": "nbds+unix:///?socket=s"}))


def test_files_of_tls_that_are_not_there_or_nonsense(tmp_path):
    with pytest.raises(MissingFileError):
        client_context(str(tmp_path))
    (tmp_path / "ca-cert.pem").write_text("nonsense")
    with pytest.raises(OptionError, match="cannot be used"):
        client_context(str(tmp_path))
