"""What a check finds: counts, descriptions up to a bound, and the recomputed references. Layer ``codec``: pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from array import array

    from blocklayer.codec.qcow2.header import Header
    from blocklayer.codec.qcow2.references import ReferenceMap

DESCRIBED_MAX: Final = 100
"""Findings that are described; more are only counted."""


class ReadRequest(NamedTuple):
    """The caller sends the bytes of ``[offset, offset + length)``; at the file's end fewer."""

    offset: int
    length: int


class Finding(NamedTuple):
    """One thing wrong: where in the file, and what."""

    offset: int
    text: str


@dataclass(slots=True)
class Findings:
    """A count, and the first descriptions."""

    count: int = 0
    described: list[Finding] = field(default_factory=list)

    def add(self, offset: int, text: str) -> None:
        """Count one, and keep its description if there is room."""
        self.count += 1
        if len(self.described) < DESCRIBED_MAX:
            self.described.append(Finding(offset, text))


@dataclass(slots=True)
class CheckResult:
    """What ``qemu-img check`` reports, and what a repair needs. Offsets in bytes, clusters counted.

    ``broken``  tables that break the format, or overlap: no repair of refcounts makes such an image safe
    ``counts``  clusters whose refcount is too low, and COPIED flags that do not fit the refcounts
    ``flags``   COPIED flags that do not fit the references either: recomputing refcounts does not repair these
    ``stale_flags``  how many of ``counts`` are COPIED flags
    ``leaks``   clusters whose refcount is too high
    """

    header: Header
    file_size: int
    references: ReferenceMap
    refcount_table: array[int]
    broken: Findings = field(default_factory=Findings)
    counts: Findings = field(default_factory=Findings)
    flags: Findings = field(default_factory=Findings)
    leaks: Findings = field(default_factory=Findings)
    stale_flags: int = 0
    rebuild: bool = False
    mismatched_blocks: set[int] = field(default_factory=set)
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0

    @property
    def corruptions(self) -> int:
        """Everything but leaks; ``flags`` are among ``counts`` already, unless a wrong refcount hides them."""
        return self.broken.count + self.counts.count

    @property
    def repairable(self) -> int:
        """Corruptions that right refcounts and COPIED flags would leave none of."""
        return self.counts.count - self.stale_flags + self.flags.count

    @property
    def is_clean(self) -> bool:
        """Neither corruptions nor leaks."""
        return not self.corruptions and not self.leaks.count
