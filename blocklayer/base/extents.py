"""What a range of a node is: the answer of ``block_status`` and of ``extents``.

Three independent facts, as in QEMU: is it *allocated* in this layer (or does the backing chain answer), does it
read as *zeroes*, and at which host offset of which node does it lie as plain data. Their combinations in use:

    kind         allocated  zero   host_offset
    DATA         yes        no     set if the bytes lie there as they are (not compressed)
    ZERO         yes        yes    set if space is reserved; ``unwritten`` if the format calls it data, but the file
                                   has a hole in its place (preallocation=metadata)
    UNALLOCATED  no         no     never; look into the backing node. At the bottom of a chain it reads as zeroes
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from blocklayer.base.ranges import Range


class ExtentKind(enum.Enum):
    """The one word for an extent."""

    DATA = "data"
    ZERO = "zero"
    UNALLOCATED = "unallocated"


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes ``[offset, offset + length)`` of one node that has one status.

    ``depth`` is 0 for the node that was asked and grows by one per backing layer; ``node`` names the layer;
    ``host_offset`` (bytes) is where the data lie in ``host_node``, the child that stores them, or None;
    ``compressed`` data have no host offset; ``present`` is False where no layer of a chain holds anything.
    """

    offset: int
    length: int
    kind: ExtentKind
    depth: int = 0
    node: str = ""
    host_offset: int | None = None
    host_node: str | None = None
    compressed: bool = False
    present: bool = True
    unwritten: bool = False

    def __post_init__(self) -> None:
        """Refuse empty runs: loops over extents must advance."""
        if self.length <= 0 or self.offset < 0:
            raise ValueError(f"an extent needs offset >= 0 and length > 0, not {self.offset}+{self.length}")

    @property
    def end(self) -> int:
        """First byte behind the extent."""
        return self.offset + self.length

    @property
    def range(self) -> Range:
        """Offset and length alone."""
        return Range(self.offset, self.length)

    @property
    def is_zero(self) -> bool:
        """Known to read as zeroes in this layer."""
        return self.kind is ExtentKind.ZERO

    @property
    def is_allocated(self) -> bool:
        """Answered by this layer."""
        return self.kind is not ExtentKind.UNALLOCATED

    def clipped(self, offset: int, length: int) -> Extent:
        """The part inside ``[offset, offset + length)``, which must not be empty."""
        start, end = max(self.offset, offset), min(self.end, offset + length)
        host = None if self.host_offset is None else self.host_offset + start - self.offset
        return replace(self, offset=start, length=end - start, host_offset=host)

    def joins(self, later: Extent) -> bool:
        """Whether ``later`` continues this extent without any difference."""
        if later.offset != self.end or (self.host_offset is None) != (later.host_offset is None):
            return False
        contiguous = self.host_offset is None or later.host_offset == self.host_offset + self.length
        same = (self.kind, self.depth, self.node, self.host_node, self.compressed, self.present, self.unwritten)
        return contiguous and same == (
            later.kind,
            later.depth,
            later.node,
            later.host_node,
            later.compressed,
            later.present,
            later.unwritten,
        )

    def joined(self, later: Extent) -> Extent:
        """Both as one; only after ``joins``."""
        return replace(self, length=self.length + later.length)
