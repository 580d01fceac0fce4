"""O_DIRECT: which alignment a file wants, and transfers through aligned memory. Blocking functions for worker threads.

Nobody says reliably what a file system wants, so small reads find out: the smallest power of two from 512 to 4096 that
works as length, and as address of the buffer. One that takes a single byte does not enforce anything; 4096 is safe there.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from blocklayer.aio.positional import read_full, write_full
from blocklayer.base.buffers import aligned_buffer
from blocklayer.base.units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIGNMENTS: Final = (512, 1024, 2048, 4096)
BOUNCE_MAX: Final = MIB
"""Unaligned memory is copied through a bounce buffer of at most this length."""


def probe_alignment(fd: int) -> tuple[int, int]:
    """``(request, memory)`` alignment in bytes for ``fd``, which was opened with O_DIRECT."""
    buffer = aligned_buffer(2 * ALIGNMENTS[-1])
    if _works(fd, buffer[:1]):
        return ALIGNMENTS[-1], mmap.PAGESIZE
    request = next((size for size in ALIGNMENTS if _works(fd, buffer[:size])), ALIGNMENTS[-1])
    memory = next((size for size in ALIGNMENTS if _works(fd, buffer[size : size + request])), mmap.PAGESIZE)
    return request, memory


def _works(fd: int, buffer: memoryview) -> bool:
    try:
        os.preadv(fd, (buffer,), 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def is_aligned(buffer: memoryview, alignment: int) -> bool:
    """Whether the memory of ``buffer`` starts at a multiple of ``alignment``; False where that cannot be told."""
    with suppress(TypeError, ValueError):
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % alignment == 0
    return False


def read_direct(fd: int, buffer: memoryview, offset: int, memory_alignment: int) -> None:
    """``read_full`` for any buffer; offset and length are aligned already."""
    if is_aligned(buffer, memory_alignment):
        read_full(fd, buffer, offset)
        return
    bounce = aligned_buffer(min(len(buffer), BOUNCE_MAX))
    for start in range(0, len(buffer), BOUNCE_MAX):
        piece = bounce[: len(buffer) - start]
        read_full(fd, piece, offset + start)
        buffer[start : start + len(piece)] = piece


def write_direct(fd: int, buffers: Sequence[memoryview], offset: int, durable: bool, memory_alignment: int) -> None:
    """``write_full`` for any buffers; offset and total length are aligned already."""
    if len(buffers) == 1 and is_aligned(buffers[0], memory_alignment):
        write_full(fd, buffers, offset, durable)
        return
    data = memoryview(b"".join(buffers)) if len(buffers) > 1 else buffers[0]
    bounce = aligned_buffer(min(len(data), BOUNCE_MAX))
    for start in range(0, len(data), BOUNCE_MAX):
        piece = bounce[: len(data) - start]
        piece[:] = data[start : start + len(piece)]
        write_full(fd, (piece,), offset + start, durable)
