"""Image locks that QEMU honours: open-file-description byte-range locks on bytes of the image file itself.

    byte 100 + n   held by whoever *uses* permission n
    byte 200 + n   held by whoever does *not share* permission n        (n: bit number in ``Permission``)

All are taken as read locks, which never exclude each other; exclusion comes from looking. Having taken its own bytes, a
user tests whether somebody else holds a byte that contradicts them: 200 + n for what it uses, 100 + n for what it does
not share. Taking before testing makes two newcomers see each other; both may give up, neither slips through.
Locks belong to the open file description: they go with the last descriptor, also when a process dies.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from typing import Final

from blocklayer.base.errors import LockedError, from_os_error
from blocklayer.base.modes import Permission

USED_BASE: Final = 100
UNSHARED_BASE: Final = 200

_SET: Final = getattr(fcntl, "F_OFD_SETLK", None)
_GET: Final = getattr(fcntl, "F_OFD_GETLK", None)
_FLOCK: Final = struct.Struct("@hhqqi4x")
"""struct flock on 64-bit Linux: l_type, l_whence, l_start, l_len, l_pid."""

_WORDS: Final = {
    Permission.CONSISTENT_READ: "consistent read",
    Permission.WRITE: "write",
    Permission.WRITE_UNCHANGED: "write unchanged",
    Permission.RESIZE: "resize",
}


def supported(fd: int) -> bool:
    """Whether the platform and the file system of ``fd`` have such locks."""
    if _SET is None or _GET is None:
        return False
    try:
        _probe(fd, USED_BASE)
    except OSError:
        return False
    return True


class ImageLock:
    """The locks of one open file. Holds nothing until ``change`` is called; goes with the descriptor."""

    def __init__(self, fd: int, filename: str) -> None:
        """``filename`` is for messages."""
        self._fd = fd
        self._filename = filename
        self._held: frozenset[int] = frozenset()

    def change(self, used: Permission, shared: Permission) -> None:
        """Use ``used`` and share ``shared`` from now on, or raise ``LockedError`` and keep what was."""
        wanted = frozenset(_bytes(USED_BASE, used) + _bytes(UNSHARED_BASE, ~shared))
        fresh = wanted - self._held
        try:
            for byte in fresh:
                _set(self._fd, byte, fcntl.F_RDLCK)
            self._look(used, shared)
        except OSError as error:
            for byte in fresh:
                _set(self._fd, byte, fcntl.F_UNLCK)
            if error.errno in (errno.EAGAIN, errno.EACCES) and not isinstance(error, LockedError):
                raise self._conflict("Failed to take a lock") from None  # somebody holds a write lock on the bytes
            raise from_os_error(error, "lock", filename=self._filename) from None
        for byte in self._held - wanted:
            _set(self._fd, byte, fcntl.F_UNLCK)
        self._held = wanted

    def _look(self, used: Permission, shared: Permission) -> None:
        for permission, word in _WORDS.items():
            bit = permission.value.bit_length() - 1
            if permission in used and _probe(self._fd, UNSHARED_BASE + bit):
                raise self._conflict(f'Failed to get "{word}" lock')
            if permission not in shared and _probe(self._fd, USED_BASE + bit):
                raise self._conflict(f'Failed to get shared "{word}" lock')

    def _conflict(self, what: str) -> LockedError:
        message = f"{what}: is another process using the image? Stop it, or open with force_share to read only"
        return LockedError(message, errno=errno.EAGAIN, filename=self._filename)


def _bytes(base: int, permissions: Permission) -> list[int]:
    return [base + bit.value.bit_length() - 1 for bit in _WORDS if bit in permissions]


def _set(fd: int, byte: int, kind: int) -> None:
    if _SET is not None:
        fcntl.fcntl(fd, _SET, _FLOCK.pack(kind, 0, byte, 1, 0))


def _probe(fd: int, byte: int) -> bool:
    """Whether another open file description holds ``byte``."""
    if _GET is None:
        return False
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, _GET, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0)))
    return bool(kind != fcntl.F_UNLCK)
