"""Positional reads and writes that finish what they begin. Blocking functions, run by worker threads.

The kernel may read or write less than asked (at the end of a file, when interrupted, beyond 2 GiB). Python repeats calls
that a signal interrupted (PEP 475); short ones are continued here.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from blocklayer.base.buffers import fill_zero

if TYPE_CHECKING:
    from collections.abc import Sequence

VECTORS_MAX: Final = 1024
"""IOV_MAX of Linux: more buffers than that do not fit into one call."""

_DURABLE: Final = getattr(os, "RWF_DSYNC", 0)


def read_full(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer``; zeroes behind the end of the file."""
    done = os.preadv(fd, (buffer,), offset)
    while done < len(buffer):
        try:
            count = os.preadv(fd, (buffer[done:],), offset + done)
        except OSError as error:
            if error.errno != errno.EINVAL or not done:
                raise
            count = 0  # O_DIRECT: the end of the file is where no request may start
        if not count:
            fill_zero(buffer[done:])
            return
        done += count


def write_full(fd: int, buffers: Sequence[memoryview], offset: int, durable: bool) -> None:  # noqa: FBT001 - hot path
    """Store all of ``buffers``; ``durable`` before returning."""
    flags = _DURABLE if durable else 0
    if len(buffers) == 1:
        _write_vectors(fd, buffers, offset, flags)
        buffers = ()
    for first in range(0, len(buffers), VECTORS_MAX):
        offset += _write_vectors(fd, buffers[first : first + VECTORS_MAX], offset, flags)
    if durable and not _DURABLE:
        os.fdatasync(fd)


def _write_vectors(fd: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
    length = sum(map(len, buffers))
    done = os.pwritev(fd, buffers, offset, flags)
    while done < length:
        count = os.pwritev(fd, _behind(buffers, done), offset + done, flags)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # a device that takes nothing and says nothing
        done += count
    return length


def _behind(buffers: Sequence[memoryview], skip: int) -> list[memoryview]:
    """The buffers without their first ``skip`` bytes."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if skip < len(buffer):
            rest.append(buffer[skip:])
        skip = max(0, skip - len(buffer))
    return rest
