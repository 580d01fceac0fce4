"""Enumerations that several layers share. Their values are the words that QEMU's users know."""

from __future__ import annotations

import enum


class CacheMode(enum.Enum):
    """How a file is opened and when a write counts as done; QEMU's five words.

    ========== ======== ============= ==============
    mode       O_DIRECT flush ignored FUA each write
    ========== ======== ============= ==============
    writeback  no       no            no
    writethrough no     no            yes
    none       yes      no            no
    directsync yes      no            yes
    unsafe     no       yes           no
    ========== ======== ============= ==============
    """

    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    NONE = "none"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"

    @property
    def direct(self) -> bool:
        """Bypass the page cache (O_DIRECT)."""
        return self in (CacheMode.NONE, CacheMode.DIRECTSYNC)

    @property
    def write_through(self) -> bool:
        """Every write is durable before it completes."""
        return self in (CacheMode.WRITETHROUGH, CacheMode.DIRECTSYNC)

    @property
    def no_flush(self) -> bool:
        """Flushes are ignored."""
        return self is CacheMode.UNSAFE


class DetectZeroes(enum.Enum):
    """Whether writes of zeroes become write_zeroes, and whether those may unmap."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class DiscardMode(enum.Enum):
    """Whether a discard request reaches the storage."""

    IGNORE = "ignore"
    UNMAP = "unmap"


class Permission(enum.Flag):
    """What a user of a node does with it, and what it lets others do (QEMU's BLK_PERM_*; bits as in its file locks)."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


class WriteFlags(enum.Flag):
    """Modifiers of write, write_zeroes and write_compressed.

    FUA          durable before the call returns
    MAY_UNMAP    write_zeroes may deallocate
    NO_FALLBACK  write_zeroes raises UnsupportedError instead of writing plain zeroes
    UNCHANGED    the guest-visible content does not change: no before-write notifier runs (WRITE_UNCHANGED)
    SERIALISING  waits for, and holds off, every overlapping request on this node, reads included
    """

    NONE = 0
    FUA = 1
    MAY_UNMAP = 2
    NO_FALLBACK = 4
    UNCHANGED = 8
    SERIALISING = 16


class Preallocation(enum.Enum):
    """How much of a new image is laid out at creation."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"
