"""Tables in memory that must reach the file: which sectors of them changed, and what a flush has taken along.

A table is a run of bytes at a file offset. It is ``fresh`` until something durable may refer to it: then all of it goes
out in the first epoch, and nothing is lost if it does not arrive. Changes are kept by 512-byte sectors.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.entries import dump_table
from blocklayer.codec.qcow2.plan import Role, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTOR_WORDS: Final = 64
"""8-byte words in the 512 bytes that devices write at once."""


class WordTable:
    """A table of 8-byte words in native order: L1, L2 or refcount table."""

    __slots__ = ("dirty", "fresh", "offset", "pins", "role", "words")

    def __init__(self, role: Role, offset: int, words: array[int], *, fresh: bool = False) -> None:
        """``role`` is what its changes are once it is not fresh any more."""
        self.role = role
        self.offset = offset
        self.words = words
        self.fresh = fresh
        self.dirty: set[int] = set()
        self.pins = 0
        """Who needs this very object to stay cached: allocations under way, and a flush that is writing it."""

    @property
    def can_be_dropped(self) -> bool:
        """Whether a cache may forget the table: the file holds all of it, and nobody is about to change it."""
        return not self.pins and not self.is_dirty

    @property
    def is_dirty(self) -> bool:
        """Whether a flush has something to write."""
        return self.fresh or bool(self.dirty)

    def touch(self, index: int, count: int = 1) -> None:
        """Words ``[index, index + count)`` changed."""
        first, last = index // SECTOR_WORDS, (index + count - 1) // SECTOR_WORDS
        if first == last:
            self.dirty.add(first)
        else:
            self.dirty.update(range(first, last + 1))

    def take(self) -> Iterator[Step]:
        """Steps for all changes, which count as written from now on; ``restore`` takes that back."""
        if self.fresh:
            yield Step(Role.NEW, self.offset, dump_table(self.words))
        else:
            for sector in sorted(self.dirty):
                words = self.words[sector * SECTOR_WORDS : (sector + 1) * SECTOR_WORDS]
                yield Step(self.role, self.offset + sector * SECTOR_WORDS * 8, dump_table(words))
        self.fresh = False
        self.dirty.clear()

    def restore(self, step: Step) -> None:
        """``step``, which ``take`` gave, did not reach the file."""
        if step.role is Role.NEW:
            self.fresh = True
        else:
            self.touch((step.offset - self.offset) // 8, len(step.data) // 8)
