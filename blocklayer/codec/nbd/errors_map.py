"""Errors on the wire and errors here, in both directions.

Layer ``codec``: pure. The protocol has eight error numbers. A server turns whatever failed into one of them with
``to_wire``; a client turns the number back with ``from_wire``, so that a full disk behind a server is a
``NoSpaceError`` like one on this side. Numbers that the protocol does not have count as EINVAL.

    ============ ================================================= ==========================
    on the wire  sent for                                          received as
    ============ ================================================= ==========================
    EPERM        ReadOnlyError, EPERM, EACCES, EROFS               AccessDeniedError
    EIO          every other failure of the storage, bad images    IOFailedError
    ENOMEM       ENOMEM, MemoryError                               IOFailedError
    EINVAL       other mistakes of the caller                      IOFailedError
    ENOSPC       ENOSPC, EDQUOT, EFBIG; writes behind the end      NoSpaceError
    EOVERFLOW    EOVERFLOW                                         IOFailedError
    ENOTSUP      UnsupportedError, ENOTSUP                         UnsupportedError
    ESHUTDOWN    StateError (the disk is closed), ESHUTDOWN        IOFailedError
    ============ ================================================= ==========================

Source: NBD, "Error values".
"""

from __future__ import annotations

import errno
from typing import Final

from blocklayer.base.errors import (
    BlockError,
    IOFailedError,
    OutOfRangeError,
    ProtocolError,
    ReadOnlyError,
    StateError,
    UnsupportedError,
    UsageError,
    io_error,
)
from blocklayer.codec.nbd.protocol import NbdErrno

_TO_WIRE: Final = {
    errno.EPERM: NbdErrno.EPERM,
    errno.EACCES: NbdErrno.EPERM,
    errno.EROFS: NbdErrno.EPERM,
    errno.ENOMEM: NbdErrno.ENOMEM,
    errno.EINVAL: NbdErrno.EINVAL,
    errno.ENOSPC: NbdErrno.ENOSPC,
    errno.EDQUOT: NbdErrno.ENOSPC,
    errno.EFBIG: NbdErrno.ENOSPC,
    errno.EOVERFLOW: NbdErrno.EOVERFLOW,
    errno.ENOTSUP: NbdErrno.ENOTSUP,
    errno.EOPNOTSUPP: NbdErrno.ENOTSUP,
    errno.ESHUTDOWN: NbdErrno.ESHUTDOWN,
}

_HOST: Final[dict[int, int]] = {number: getattr(errno, number.name) for number in NbdErrno}
"""The same words as this system's numbers, which may be others than Linux's."""

# The first class that fits decides.
_BY_CLASS: Final[tuple[tuple[type[BaseException], NbdErrno], ...]] = (
    (ReadOnlyError, NbdErrno.EPERM),
    (UnsupportedError, NbdErrno.ENOTSUP),
    (StateError, NbdErrno.ESHUTDOWN),
    (UsageError, NbdErrno.EINVAL),
    (MemoryError, NbdErrno.ENOMEM),
)


def to_wire(error: BaseException | int, *, writing: bool = False) -> NbdErrno:
    """The number that a server sends for an exception, or for an errno of this system.

    ``writing``: the request would have changed the disk; behind its end there is then no space, not a wrong argument.
    """
    if isinstance(error, int):
        return _TO_WIRE.get(error, NbdErrno.EIO)
    if isinstance(error, OSError):
        return _TO_WIRE.get(error.errno or errno.EIO, NbdErrno.EIO)
    if writing and isinstance(error, OutOfRangeError):
        return NbdErrno.ENOSPC
    return next((number for kind, number in _BY_CLASS if isinstance(error, kind)), NbdErrno.EIO)


def from_wire(
    number: int, action: str, *, message: str = "", offset: int | None = None, length: int | None = None
) -> BlockError:
    """The exception for a number that a server sent; ``action`` says what was tried ("read", "write").

    ``message`` is the server's own text, if it sent one. Except for ENOTSUP the result has this system's ``errno``.
    """
    if not number:
        return ProtocolError(f"{action} failed, says the server, with error 0")
    known = _HOST.get(number)
    error: BlockError
    if number == NbdErrno.ENOTSUP:
        error = UnsupportedError(f"{action} failed: the server does not support it", offset=offset, length=length)
    elif known is None:
        text = f"{action} failed: the server sent the unknown error {number}"
        error = IOFailedError(text, errno=errno.EINVAL, offset=offset, length=length)
    else:
        error = io_error(known, action, offset=offset, length=length)
    if message:
        error.message = f"{error.message} (the server says: {message})"
    return error
