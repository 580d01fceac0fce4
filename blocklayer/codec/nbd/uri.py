"""Names of exports on servers: ``nbd://host:port/export`` and its kin.

Layer ``codec``: text only, nothing is looked up. ``NbdUri.parse`` and ``str`` are inverse to each other; what cannot
be parsed, or says something that would not be heeded, is an ``OptionError`` that names the part.

    nbd://HOST[:PORT]/EXPORT            TCP, without TLS
    nbds://[USER@]HOST[:PORT]/EXPORT    TCP, TLS required
    nbd+unix:///EXPORT?socket=PATH      Unix socket; a PATH that begins with %00 is one without a file
    nbds+unix://[USER@]/EXPORT?socket=PATH

    socket            path of the Unix socket
    tls-certificates  directory of ca-cert.pem, and of client-cert.pem and client-key.pem
    tls-username      the same as USER
    tls-hostname      name that the server's certificate must have, if it is not HOST
    tls-verify-peer   0 or 1 (the default): whether the certificate is verified
    tls-type          x509 is the only one here

Everything behind the first "/" is the export's name: "//disk" means "/disk", and nothing means the default export. "+"
is a plus sign everywhere. TLS is never optional: parameters for it under ``nbd:`` are an error, lest someone believe
that they help. Source: NBD, doc/uri.md; RFC 3986; parameters as in libnbd.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from blocklayer.base.errors import OptionError, UnsupportedError
from blocklayer.codec.nbd.options import encode_text
from blocklayer.codec.nbd.protocol import DEFAULT_PORT

_SCHEMES: Final = {"nbd": (False, False), "nbds": (True, False), "nbd+unix": (False, True), "nbds+unix": (True, True)}
"""Whether it means TLS, and whether a Unix socket."""

_OTHER_SCHEMES: Final = {
    "nbd+vsock": "vsock",
    "nbds+vsock": "vsock",
    "nbd+ssh": "ssh",
    "nbds+ssh": "ssh",
}

_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)(?:/([^?#]*))?(?:\?([^#]*))?(#.*)?", re.DOTALL)
_AUTHORITY = re.compile(r"(?:([^@]*)@)?(\[[^\]]*\]|[^:\[\]@]*)(?::([0-9]*))?", re.ASCII)
_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PLAIN = re.compile(r"[\x21-\x7e]*")
"""Characters that stand in a URI at all; others are written as %XX."""

_LOCALHOST: Final = "localhost"


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is, and how to get to it safely. Raises ``OptionError`` for what contradicts itself.

    Either ``host`` (a name or an address, IPv6 without brackets) and ``port``, or ``socket``, a path; an abstract
    socket's begins with NUL. The fields behind ``tls`` need it.
    """

    host: str | None = None
    port: int = DEFAULT_PORT
    socket: str | None = None
    export: str = ""
    tls: bool = False
    username: str | None = None
    hostname: str | None = None
    certificates: str | None = None
    verify_peer: bool = True

    def __post_init__(self) -> None:
        """Check the fields against each other."""
        if (self.host is None) == (self.socket is None):
            raise OptionError("an NBD server is at a host or at a Unix socket: one of them must be given")
        if self.host is not None:
            _check_host(self.host)
        if not 1 <= self.port <= 65535 or (self.socket is not None and self.port != DEFAULT_PORT):
            raise OptionError(f"{self.port} is no port of an NBD server")
        if self.socket is not None and (not self.socket or "\0" in self.socket[1:]):
            raise OptionError(f"{self.socket!r} is no path of a Unix socket")
        encode_text(self.export, "the export's name")
        given = {
            "a user name": self.username is not None,
            "tls-hostname": self.hostname is not None,
            "tls-certificates": self.certificates is not None,
            "tls-verify-peer": not self.verify_peer,
        }
        for name, value in (("user name", self.username), ("host name", self.hostname), ("path", self.certificates)):
            if value is not None and (not value or "\0" in value):
                raise OptionError(f"{value!r} is no {name}")
        useless = [name for name, is_given in given.items() if is_given and not self.tls]
        if useless:
            raise OptionError(f"{useless[0]} has no effect without TLS; write nbds: in place of nbd:")

    @property
    def scheme(self) -> str:
        """``nbd``, ``nbds``, ``nbd+unix`` or ``nbds+unix``."""
        return ("nbds" if self.tls else "nbd") + ("" if self.socket is None else "+unix")

    def __str__(self) -> str:
        """The URI; parameters with their default are left out."""
        parameters = {
            "socket": self.socket,
            "tls-certificates": self.certificates,
            "tls-hostname": self.hostname,
            "tls-verify-peer": None if self.verify_peer else "0",
        }
        query = "&".join(f"{key}={_quote(value, '/:')}" for key, value in parameters.items() if value is not None)
        user = "" if self.username is None else _quote(self.username, "") + "@"
        host = "" if self.host is None else _quote_host(self.host)
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"{self.scheme}://{user}{host}{port}/{_quote(self.export, '/:@')}" + ("?" + query if query else "")

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Parse a URI. Raises ``OptionError``, and ``UnsupportedError`` for transports that are not here."""
        if not _PLAIN.fullmatch(text):
            raise OptionError(f"{text!r} is no URI: blanks and characters beyond ASCII are written as %XX")
        match = _URI.fullmatch(text)
        if match is None:
            raise OptionError(f"{text!r} is no URI like nbd://host/export")
        scheme, authority, path, query, fragment = match.groups()
        tls, unix = _parse_scheme(scheme, text)
        if fragment is not None:
            raise OptionError(f"{text!r}: a URI of NBD has no fragment; write # as %23")
        username, host, port = _parse_authority(authority, text)
        parameters = _parse_query(query, text)
        socket = parameters.get("socket")
        if unix and (host or port):
            raise OptionError(f"{text!r}: a Unix socket has no host; write {scheme}:///export?socket=path")
        if unix != (socket is not None):
            raise OptionError(f"{text!r}: socket= is for {scheme if unix else scheme + '+unix'}: URIs, which need it")
        return cls(
            host=None if unix else (host or _LOCALHOST),
            port=port or DEFAULT_PORT,
            socket=socket,
            export=_unquote(path or "", "the export's name"),
            tls=tls,
            username=_username(username, parameters),
            hostname=parameters.get("tls-hostname"),
            certificates=parameters.get("tls-certificates"),
            verify_peer=_parse_verify(parameters),
        )


def is_nbd_uri(text: str) -> bool:
    """Whether a name is meant as such a URI, right or wrong."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in {*_SCHEMES, *_OTHER_SCHEMES}


def _parse_scheme(scheme: str, text: str) -> tuple[bool, bool]:
    known = _SCHEMES.get(scheme.lower())
    if known is not None:
        return known
    other = _OTHER_SCHEMES.get(scheme.lower())
    if other is not None:
        raise UnsupportedError(f"{text!r}: NBD over {other} is not supported")
    raise OptionError(f"{text!r}: {scheme!r} is not one of {', '.join(_SCHEMES)}")


def _parse_authority(authority: str, text: str) -> tuple[str | None, str, int | None]:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise OptionError(f"{text!r}: {authority!r} is not [user@]host[:port]; an IPv6 address stands in brackets")
    username, host, port = match.groups()
    if username is not None and ":" in username:
        raise OptionError(f"{text!r}: NBD knows no passwords")
    if host.startswith("["):
        host = host[1:-1]
        if not _is_ipv6(_unquote(host, "the host")):
            raise OptionError(f"{text!r}: {host!r} is no IPv6 address")
    if port and (len(port) > 5 or not 1 <= int(port) <= 65535):
        raise OptionError(f"{text!r}: {port} is no port")
    decoded = None if username is None else _unquote(username, "the user name")
    return decoded, _unquote(host, "the host"), int(port) if port else None


_PARAMETERS: Final = frozenset(
    {"socket", "tls-certificates", "tls-username", "tls-hostname", "tls-verify-peer", "tls-type"}
)


def _parse_query(query: str | None, text: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for part in (query or "").split("&"):
        if not part:
            continue
        key, equals, value = part.partition("=")
        if key not in _PARAMETERS:
            raise OptionError(f"{text!r}: the parameter {key!r} is not known")
        if key in parameters:
            raise OptionError(f"{text!r}: the parameter {key!r} is given twice")
        if not equals:
            raise OptionError(f"{text!r}: the parameter {key!r} has no value")
        parameters[key] = _unquote(value, key, path=key in ("socket", "tls-certificates"))
    if parameters.get("tls-type", "x509") != "x509":
        raise UnsupportedError(f"{text!r}: TLS by {parameters['tls-type']!r} is not supported, only x509")
    return parameters


def _username(user: str | None, parameters: dict[str, str]) -> str | None:
    parameter = parameters.get("tls-username")
    if user is not None and parameter not in (None, user):
        raise OptionError(f"two user names are given: {user!r} and {parameter!r}")
    return parameter if user is None else user


def _parse_verify(parameters: dict[str, str]) -> bool:
    value = parameters.get("tls-verify-peer", "1")
    if value not in ("0", "1"):
        raise OptionError(f"tls-verify-peer is 0 or 1, not {value!r}")
    return value == "1"


def _check_host(host: str) -> None:
    if ":" in host and not _is_ipv6(host):
        raise OptionError(f"{host!r} is neither a host's name nor an IPv6 address")
    if not host or any(char in "[]@/?#" or not char.isprintable() or char.isspace() for char in host):
        raise OptionError(f"{host!r} is no name of a host")


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def _quote_host(host: str) -> str:
    return f"[{_quote(host, ':')}]" if ":" in host else _quote(host, "")


def _quote(text: str, safe: str) -> str:
    return quote(text, safe=safe, errors="surrogateescape")


def _unquote(text: str, what: str, *, path: bool = False) -> str:
    """Paths are bytes: undecodable ones survive as surrogates, as in ``os.fsdecode``."""
    if _ESCAPE.search(text):
        raise OptionError(f"{what} {text!r}: % is followed by two hexadecimal digits; the sign itself is %25")
    try:
        return unquote_to_bytes(text).decode("utf-8", "surrogateescape" if path else "strict")
    except UnicodeDecodeError:
        raise OptionError(f"{what} {text!r} is not UTF-8") from None
