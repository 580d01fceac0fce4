"""Errors travel: what failed on a server has the same class and number on a client."""

from __future__ import annotations

import errno

import pytest

from blocklayer.base.errors import (
    AccessDeniedError,
    AlignmentError,
    BlockError,
    CorruptImageError,
    IOFailedError,
    JobError,
    NoSpaceError,
    OptionError,
    OutOfRangeError,
    ProtocolError,
    ReadOnlyError,
    StateError,
    UnsupportedError,
    io_error,
)
from blocklayer.codec.nbd.errors_map import from_wire, to_wire
from blocklayer.codec.nbd.protocol import NbdErrno

E = NbdErrno


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ReadOnlyError("read-only"), E.EPERM),
        (io_error(errno.EACCES, "write"), E.EPERM),
        (io_error(errno.EPERM, "write"), E.EPERM),
        (io_error(errno.EROFS, "write"), E.EPERM),
        (io_error(errno.EIO, "read"), E.EIO),
        (io_error(errno.ETIMEDOUT, "read"), E.EIO),
        (io_error(errno.EBADF, "read"), E.EIO),
        (ProtocolError("nonsense"), E.EIO),
        (CorruptImageError("bad table"), E.EIO),
        (JobError("no copy"), E.EIO),
        (BlockError("something"), E.EIO),
        (RuntimeError("a mistake of ours"), E.EIO),
        (MemoryError(), E.ENOMEM),
        (io_error(errno.ENOMEM, "read"), E.ENOMEM),
        (io_error(errno.EINVAL, "read"), E.EINVAL),
        (OptionError("what?"), E.EINVAL),
        (AlignmentError("odd"), E.EINVAL),
        (OutOfRangeError("behind the end"), E.EINVAL),
        (io_error(errno.ENOSPC, "write"), E.ENOSPC),
        (io_error(errno.EDQUOT, "write"), E.ENOSPC),
        (io_error(errno.EFBIG, "write"), E.ENOSPC),
        (io_error(errno.EOVERFLOW, "read"), E.EOVERFLOW),
        (UnsupportedError("no fast zeroes"), E.ENOTSUP),
        (io_error(errno.EOPNOTSUPP, "write"), E.ENOTSUP),
        (StateError("closed"), E.ESHUTDOWN),
        (io_error(errno.ESHUTDOWN, "read"), E.ESHUTDOWN),
        (OSError("without a number"), E.EIO),
        (OSError(errno.ENOSPC, "plain"), E.ENOSPC),
    ],
    ids=repr,
)
def test_an_exception_has_a_number_on_the_wire(error: BaseException, expected: NbdErrno) -> None:
    assert to_wire(error) is expected


def test_a_write_behind_the_end_lacks_space() -> None:
    assert to_wire(OutOfRangeError("behind the end"), writing=True) is E.ENOSPC
    assert to_wire(AlignmentError("odd"), writing=True) is E.EINVAL


@pytest.mark.parametrize("code", sorted(errno.errorcode), ids=errno.errorcode.get)
def test_every_errno_of_this_system_has_a_number_of_the_protocol(code: int) -> None:
    assert to_wire(code) is to_wire(io_error(code, "read"))


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (E.EPERM, AccessDeniedError, errno.EPERM),
        (E.EIO, IOFailedError, errno.EIO),
        (E.ENOMEM, IOFailedError, errno.ENOMEM),
        (E.EINVAL, IOFailedError, errno.EINVAL),
        (E.ENOSPC, NoSpaceError, errno.ENOSPC),
        (E.EOVERFLOW, IOFailedError, errno.EOVERFLOW),
        (E.ESHUTDOWN, IOFailedError, errno.ESHUTDOWN),
    ],
)
def test_a_number_becomes_the_exception_of_a_local_failure(number: int, kind: type, code: int) -> None:
    error = from_wire(number, "write", offset=512, length=8)
    assert (type(error), error.errno, error.offset, error.length) == (kind, code, 512, 8)
    assert to_wire(error) == number


def test_what_a_server_does_not_support_is_unsupported() -> None:
    error = from_wire(E.ENOTSUP, "write zeroes")
    assert (type(error), to_wire(error)) == (UnsupportedError, E.ENOTSUP)


@pytest.mark.parametrize("number", [2, 4, 110, 0xFFFFFFFF])
def test_an_unknown_number_counts_as_einval_and_is_named(number: int) -> None:
    error = from_wire(number, "read")
    assert (type(error), error.errno) == (IOFailedError, errno.EINVAL)
    assert str(number) in str(error)


def test_no_error_where_one_was_announced_breaks_the_protocol() -> None:
    assert type(from_wire(0, "read")) is ProtocolError


def test_the_servers_words_are_kept() -> None:
    error = from_wire(E.EIO, "read", message="disk 3 is on fire", offset=0)
    assert str(error) == "read failed: Input/output error (the server says: disk 3 is on fire) (at 0x0)"
