"""Options of the NBD driver, and the place on the network that they mean.

The server is named by ``uri``, by ``host`` and ``port``, or by ``path``; QEMU's ``server.type=inet,server.host=...`` and
``server.type=unix,server.path=...`` are the same. Nothing is looked up or read here but the files of TLS.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import OptionError, UnsupportedError, from_os_error
from blocklayer.base.options import Options, build
from blocklayer.codec.nbd.protocol import DEFAULT_PORT
from blocklayer.codec.nbd.uri import NbdUri

if TYPE_CHECKING:
    from blocklayer.drivers.nbd.dial import Address

CONNECTIONS_MAX: Final = 16
"""More than any server answers in parallel."""

_SERVER_KEYS: Final = {"inet": ("host", "port"), "unix": ("path",)}


@dataclass(frozen=True, slots=True)
class NbdOptions:
    """Texts, and seconds as fractions. The server is at ``uri``, at ``host``, or at ``path``.

    ``tls``              directory of ca-cert.pem, and of client-cert.pem and client-key.pem if the server asks for them
    ``tls_hostname``     the name that the server's certificate must have; default: ``host``
    ``reconnect_delay``  how long requests wait for a server that comes back; 0: they fail
    ``open_timeout``     for connecting and agreeing; 0: no limit
    ``request_timeout``  a server that takes longer for one request is given up; 0: no limit
    ``connections``      at most so many, if the server says that several see the same
    """

    uri: str | None = None
    host: str | None = None
    port: int | None = None
    path: str | None = None
    export: str | None = None
    tls: str | None = None
    tls_hostname: str | None = None
    reconnect_delay: float = 0.0
    open_timeout: float = 10.0
    request_timeout: float = 0.0
    connections: int = 1

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if min(self.reconnect_delay, self.open_timeout, self.request_timeout) < 0:
            raise OptionError("a time must not be negative")
        if not 1 <= self.connections <= CONNECTIONS_MAX:
            raise OptionError(f"connections are 1 to {CONNECTIONS_MAX}, not {self.connections}")
        places = [name for name in ("uri", "host", "path") if getattr(self, name) is not None]
        if len(places) != 1:
            raise OptionError(
                f"an NBD server is named by one of uri, host and path, not by {' and '.join(places) or 0}"
            )
        if self.port is not None and self.host is None:
            raise OptionError("option 'port' needs 'host'")
        if self.uri is not None and self.export is not None:
            raise OptionError("option 'export' is a part of 'uri'")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an export is and how to get there; ``tls`` None: without encryption."""

    address: Address
    export: str
    tls: ssl.SSLContext | None
    hostname: str | None

    def __str__(self) -> str:
        """The URI, without what concerns TLS alone."""
        if isinstance(self.address, str):
            return str(NbdUri(socket=self.address, export=self.export, tls=self.tls is not None))
        host, port = self.address
        return str(NbdUri(host=host, port=port, export=self.export, tls=self.tls is not None))


def parse(options: Options) -> NbdOptions:
    """The options, ``server`` taken apart. Raises ``OptionError``."""
    rest = dict(options)
    server = rest.pop("server", None)
    if server is not None:
        if not isinstance(server, Mapping):
            raise OptionError("option 'server' is a group: server.type, server.host, server.port, server.path")
        fields = dict(server)
        kind = fields.pop("type", None)
        known = _SERVER_KEYS.get(str(kind))
        if known is None:
            raise OptionError(f"option 'server.type' cannot be {kind!r}; it takes inet or unix")
        for key, value in fields.items():
            if key not in known or key in rest:
                raise OptionError(f"option 'server.{key}' does not go with the others")
            rest[key] = value
    return build(NbdOptions, rest)


def place_of(options: NbdOptions) -> Place:
    """Where the options lead. Raises ``OptionError``, and the ``IOFailedError`` kinds of files that cannot be read."""
    if options.uri is not None:
        uri = NbdUri.parse(options.uri)
        if uri.username is not None:
            raise UnsupportedError("user names belong to pre-shared keys; TLS is done with certificates here")
        if not uri.tls and options.tls is not None:
            raise OptionError("option 'tls' needs a URI that begins with nbds:")
    else:
        port = DEFAULT_PORT if options.port is None else options.port
        wanted = options.tls is not None
        uri = NbdUri(host=options.host, port=port, socket=options.path, export=options.export or "", tls=wanted)
    address: Address = uri.socket if uri.socket is not None else (uri.host or "", uri.port)
    hostname = options.tls_hostname or uri.hostname or uri.host
    if not uri.tls:
        if options.tls_hostname is not None:
            raise OptionError("option 'tls-hostname' has no effect without TLS")
        return Place(address, uri.export, None, None)
    if uri.verify_peer and hostname is None:
        raise OptionError("TLS on a Unix socket needs tls-hostname, the name in the server's certificate")
    context = client_context(options.tls or uri.certificates, verify_peer=uri.verify_peer)
    return Place(address, uri.export, context, hostname)


def client_context(directory: str | None, *, verify_peer: bool = True) -> ssl.SSLContext:
    """TLS of a client with the files of ``directory``; without one, with the system's authorities."""
    try:
        ca = None if directory is None else os.path.join(directory, "ca-cert.pem")
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if directory is not None and os.path.exists(certificate := os.path.join(directory, "client-cert.pem")):
            context.load_cert_chain(certificate, os.path.join(directory, "client-key.pem"), password=_no_password)
    except ssl.SSLError as error:
        raise OptionError(f"the TLS files in {directory} cannot be used: {error}") from None
    except OSError as error:
        raise from_os_error(error, "open", filename=directory) from None
    if not verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _no_password() -> str:
    """A key that is encrypted cannot be used; without this the TLS library would ask on the terminal."""
    return ""
