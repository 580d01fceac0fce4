"""Every exception that blocklayer raises, as one tree.

    BlockError
    +-- UsageError (also ValueError)     the caller asked for something impossible
    |   +-- OptionError                  an option is unknown, missing or out of range
    |   +-- OutOfRangeError              offset or length lies outside the node
    |   +-- AlignmentError               offset or length is not aligned as the caller was told
    |   +-- ReadOnlyError                a write reached a node that was opened read-only
    |   +-- UnsupportedError             the driver cannot do this at all
    |   +-- StateError                   the object is in a state that refuses the call (also closed things)
    |   +-- NotFoundError                no such node, job, driver or export
    |   +-- DuplicateError               the name is taken
    |   +-- PermissionConflictError      two users of one node exclude each other
    |   +-- InUseError                   another operation holds the node
    |   +-- ChainError                   a loop in a backing chain, or a chain too deep
    +-- ImageError                       the bytes of an image are wrong
    |   +-- FormatError                  not this format, or a header that breaks the specification
    |   |   +-- UnknownFormatError       no format given and none recognised
    |   |   +-- UnsupportedFeatureError  valid, but uses a feature that we do not know
    |   |   +-- LimitError               valid in form, but larger than we let an image make us spend
    |   +-- CorruptImageError            metadata contradict each other; the node refuses further writes
    |   +-- ReferenceRefusedError        the gate refused what the image refers to
    +-- IOFailedError (also OSError)     the storage failed; ``errno`` is kept
    |   +-- NoSpaceError                 ENOSPC, EDQUOT, EFBIG
    |   +-- LockedError                  another process holds the image
    |   +-- MissingFileError             ENOENT
    |   +-- AccessDeniedError            EACCES, EPERM, EROFS
    |   +-- TimedOutError                ETIMEDOUT
    |   +-- ProtocolError                the other side of a connection broke its protocol; EPROTO
    +-- JobError                         a job ended without success
        +-- JobCancelledError            it was cancelled
        +-- SnapshotBrokenError          a point in time could not be kept (on_cbw_error=break-snapshot)

Each class has fields for what it is about (``node``, ``offset``, ``length``, ``errno``, ``filename``)
and composes its own text from them. ``OSError`` is mapped here (``from_os_error``) and called from
``aio`` only, so that errno never gets lost and never gets mapped twice.
"""

from __future__ import annotations

import errno as _errno
import os


class BlockError(Exception):
    """Root of the tree.

    ``message`` says what was wrong and what to do; ``node``, ``filename``, ``offset`` and ``length``
    say where, in bytes, and appear in the text when they are known.
    """

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        filename: str | None = None,
        offset: int | None = None,
        length: int | None = None,
    ) -> None:
        """Keep the fields; the text is composed on demand."""
        super().__init__(message)
        self.message = message
        self.node = node
        self.filename = filename
        self.offset = offset
        self.length = length

    def __str__(self) -> str:
        """``[node 'disk'] [file 'vm.qcow2'] message [at 0x1000+512]``."""
        parts: list[str] = []
        if self.node is not None:
            parts.append(f"node {self.node!r}:")
        if self.filename is not None and repr(self.filename) not in self.message:
            parts.append(f"file {self.filename!r}:")
        parts.append(self.message)
        if self.offset is not None:
            parts.append(f"(at {self.offset:#x}" + (f"+{self.length})" if self.length is not None else ")"))
        return " ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        """Copies, and errors of other processes, keep every field: also those that OSError holds outside ``__dict__``."""
        outside = {name: getattr(self, name) for name in ("args", "errno", "filename") if hasattr(self, name)}
        return _blank, (type(self),), vars(self) | outside


def _blank(kind: type[BlockError]) -> BlockError:
    return kind.__new__(kind)


class UsageError(BlockError, ValueError):
    """The caller asked for something impossible; nothing was touched."""


class OptionError(UsageError):
    """An option is unknown, missing, or its value out of range."""


class OutOfRangeError(UsageError):
    """Offset or length lies outside the node."""


class AlignmentError(UsageError):
    """Offset or length is not aligned as required."""


class ReadOnlyError(UsageError):
    """A write reached a node that was opened read-only."""


class UnsupportedError(UsageError):
    """The driver, the platform or the file system cannot do this at all."""


class StateError(UsageError):
    """The object is in a state that refuses the call."""


class NotFoundError(UsageError):
    """No such node, job, driver or export."""


class DuplicateError(UsageError):
    """The name is already taken."""


class PermissionConflictError(UsageError):
    """Two users of one node exclude each other; the text names both."""


class InUseError(UsageError):
    """Another operation holds the node; the text says which."""


class ChainError(UsageError):
    """A loop in a backing chain, or a chain deeper than allowed."""


class ImageError(BlockError):
    """The bytes of an image are wrong."""


class FormatError(ImageError):
    """Not an image of this format, or a header that breaks the specification."""


class UnknownFormatError(FormatError):
    """No format was given and none was recognised."""


class UnsupportedFeatureError(FormatError):
    """A valid image that uses features unknown here; ``features`` names them."""

    def __init__(self, message: str, *, features: tuple[str, ...] = (), filename: str | None = None) -> None:
        """Keep the names of the features."""
        super().__init__(message, filename=filename)
        self.features = features


class LimitError(FormatError):
    """Valid in form, but larger than an image may make us spend."""


class CorruptImageError(ImageError):
    """Metadata contradict each other."""


class ReferenceRefusedError(ImageError):
    """The gate refused to open what an image refers to; ``reference`` is the image's own words."""

    def __init__(self, message: str, *, reference: str, filename: str | None = None) -> None:
        """Keep the reference as the image states it."""
        super().__init__(message, filename=filename)
        self.reference = reference


class IOFailedError(BlockError, OSError):
    """The storage failed; ``errno`` says how."""

    def __init__(
        self,
        message: str,
        *,
        errno: int = _errno.EIO,
        node: str | None = None,
        filename: str | None = None,
        offset: int | None = None,
        length: int | None = None,
    ) -> None:
        """Keep ``errno`` beside the fields of ``BlockError``."""
        BlockError.__init__(self, message, node=node, offset=offset, length=length)
        self.errno = errno
        self.filename = filename

    __str__ = BlockError.__str__


class NoSpaceError(IOFailedError):
    """No space left for what was to be written."""


class LockedError(IOFailedError):
    """Another process holds the image."""


class MissingFileError(IOFailedError):
    """The file does not exist."""


class AccessDeniedError(IOFailedError):
    """The operating system refused access."""


class TimedOutError(IOFailedError):
    """The operation took longer than it was given."""


class ProtocolError(IOFailedError):
    """The other side of a connection broke its protocol: nothing that it says further can be trusted."""

    def __init__(self, message: str, *, errno: int = _errno.EPROTO, node: str | None = None) -> None:
        """The text says what was wrong and where in the message."""
        super().__init__(message, errno=errno, node=node)


class JobError(BlockError):
    """A job ended without success; ``job`` is its id."""

    def __init__(self, message: str, *, job: str | None = None) -> None:
        """Keep the job's id."""
        super().__init__(message)
        self.job = job


class JobCancelledError(JobError):
    """The job was cancelled."""


class SnapshotBrokenError(JobError):
    """The point in time could not be kept, and the guest's write was given precedence."""


_BY_ERRNO: dict[int, type[IOFailedError]] = {
    _errno.ENOSPC: NoSpaceError,
    _errno.EDQUOT: NoSpaceError,
    _errno.EFBIG: NoSpaceError,
    _errno.ENOENT: MissingFileError,
    _errno.EACCES: AccessDeniedError,
    _errno.EPERM: AccessDeniedError,
    _errno.EROFS: AccessDeniedError,
    _errno.ETIMEDOUT: TimedOutError,
}


def io_error(
    errno: int,
    action: str,
    *,
    node: str | None = None,
    filename: str | None = None,
    offset: int | None = None,
    length: int | None = None,
) -> IOFailedError:
    """Build the class of the tree that fits ``errno``; ``action`` says what was tried ("read", "open")."""
    kind = _BY_ERRNO.get(errno, IOFailedError)
    message = f"{action} failed: {os.strerror(errno)}"
    return kind(message, errno=errno, node=node, filename=filename, offset=offset, length=length)


def from_os_error(
    error: OSError, action: str, *, filename: str | None = None, offset: int | None = None, length: int | None = None
) -> IOFailedError:
    """Map an ``OSError`` of the operating system into the tree; one that is mapped already is returned as it is."""
    if isinstance(error, IOFailedError):
        return error
    return io_error(error.errno or _errno.EIO, action, filename=filename, offset=offset, length=length)
