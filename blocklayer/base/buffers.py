"""Memory: zero tests, a shared run of zeroes, and aligned buffers.

Comparing with a run of zeroes is memcmp: 78 GB/s in cache, against 2.7 GB/s for ``bytes.count``. Only a bytearray
compares with any buffer by memcmp, and only on the left; a memoryview there compares item by item, a hundred times slower.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from blocklayer.base.units import KIB, MIB

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc.Buffer needs Python 3.12

ZEROES: Final = memoryview(bytes(MIB))
"""One MiB of zeroes, never written to; slice it instead of allocating."""

_chunk: Final = bytearray(64 * KIB)
"""Lower case, for linters put constants on the right of a comparison, where this one is slow."""


def as_view(data: Buffer) -> memoryview:
    """``data`` as a flat view of bytes, without a copy. Raises ``TypeError`` if it has gaps."""
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


def is_zero(data: memoryview | bytes | bytearray) -> bool:
    """Whether every byte is zero; stops at the first 64 KiB that is not. An empty buffer is zero."""
    length = len(data)
    if length == len(_chunk):
        return _chunk == data
    view = memoryview(data)
    if length and (view[0] or view[-1]):
        return False
    whole = length - length % len(_chunk)
    if any(_chunk != view[at : at + len(_chunk)] for at in range(0, whole, len(_chunk))):
        return False
    return whole == length or bytearray(length - whole) == view[whole:]


def fill_zero(buffer: memoryview) -> None:
    """Overwrite ``buffer`` with zeroes."""
    length = len(buffer)
    for at in range(0, length, MIB):
        piece = min(MIB, length - at)
        buffer[at : at + piece] = ZEROES[:piece]


def aligned_buffer(length: int) -> memoryview:
    """A fresh page-aligned, zeroed, writable buffer of ``length`` bytes (for O_DIRECT)."""
    return memoryview(mmap.mmap(-1, max(length, 1)))[:length]
