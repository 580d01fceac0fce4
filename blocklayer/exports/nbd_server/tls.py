"""TLS of a server: certificates, whether clients must encrypt, and who they have to be."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blocklayer.base.errors import OptionError, from_os_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How a server encrypts.

    ``required``   clients that do not encrypt learn nothing
    ``authorise``  gets a client's certificate, as ``ssl.SSLSocket.getpeercert`` gives it ({} without one), and says
                   whether the client may go on
    """

    context: ssl.SSLContext
    required: bool = True
    authorise: Callable[[Mapping[str, Any]], bool] | None = None

    @classmethod
    def from_directory(
        cls,
        directory: str | os.PathLike[str],
        *,
        verify_peer: bool = False,
        required: bool = True,
        authorise: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> Self:
        """The files that QEMU and nbdkit use: server-cert.pem, server-key.pem, and ca-cert.pem to verify clients.

        Raises ``OptionError`` for files that are not what they should be, ``MissingFileError`` and kin.
        """
        place = os.fspath(directory)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(
                os.path.join(place, "server-cert.pem"), os.path.join(place, "server-key.pem"), password=_no_password
            )
            if verify_peer:
                context.load_verify_locations(os.path.join(place, "ca-cert.pem"))
                context.verify_mode = ssl.CERT_REQUIRED
        except ssl.SSLError as error:
            raise OptionError(f"the TLS files in {place} cannot be used: {error}") from None
        except OSError as error:
            raise from_os_error(error, "open", filename=place) from None
        return cls(context, required, authorise)


def _no_password() -> str:
    """A key that is encrypted cannot be used; without this the TLS library would ask on the terminal."""
    return ""
