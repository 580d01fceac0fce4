"""The Driver contract: three required members, and a documented default for every other one.

A driver turns requests on one node into bytes: of memory, of a file, or of its children. Only a Node calls it, so

- requests arrive inside ``[0, size)`` (beyond it only if ``growable``), aligned and split by ``limits``, with length > 0;
- buffers are flat, contiguous memoryviews of bytes that stay untouched by others until the call returns;
- the Node tracks requests, serialises those that ask for it, runs before-write notifiers and counts. A driver does none of it;
- many calls run at once. A driver that cannot bear that guards itself.

A read fills the whole buffer or raises: no short reads, and so no forgotten ones. Errors come from ``base.errors``.
A driver holds open resources from ``open`` until ``close``; there is no half-open driver.

    required                            default
    ----------------------------------  -----------------------------------------------------------------
    open(options, opener)               write           UnsupportedError
    size                                write_zeroes    writes a buffer of zeroes, or UnsupportedError (NO_FALLBACK)
    read_into(offset, buffer)           discard         nothing: a discard is a hint
                                        block_status    all data
                                        flush           flushes the writable children
                                        close           nothing
                                        truncate        UnsupportedError
                                        try_read_into   False: always take the coroutine
                                        limits          no limits
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from blocklayer.base.buffers import ZEROES
from blocklayer.base.errors import UnsupportedError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.limits import BlockLimits
from blocklayer.base.modes import Permission, Preallocation, WriteFlags
from blocklayer.base.ranges import split

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from blocklayer.base.errors import BlockError
    from blocklayer.base.options import Options
    from blocklayer.graph.child import Child
    from blocklayer.graph.opener import CreateContext, Opener

NO_LIMITS = BlockLimits()


class Driver(ABC):
    """One open node's implementation. See the module's text for what a caller guarantees."""

    name: ClassVar[str]
    """The word by which options choose it: ``driver=NAME``."""

    is_format: ClassVar[bool] = False
    """It interprets the bytes of a child named "file"; a path given with ``format=NAME`` gets that child by itself."""

    is_filter: ClassVar[bool] = False
    """Its data are those of its child "file", offset by offset."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """File name endings that mean this format when no format is given."""

    schemes: ClassVar[tuple[str, ...]] = ()
    """Beginnings of names (before "://") that are no paths but URIs of this driver; it gets them as option ``uri``."""

    growable: bool = False
    """Writes past the end extend the node (only through a parent that may resize it)."""

    limits: BlockLimits = NO_LIMITS
    """Alignment and sizes; constant while open. An aligned request may reach past ``size`` by less than one alignment
    unit: what lies there reads as zeroes and is dropped when written."""

    handles_fua: bool = False
    """``write`` and ``write_zeroes`` honour FUA themselves; otherwise the request path flushes after them."""

    # -- required ----------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """Open from ``options`` (this driver's own: children and node options are taken out already).

        ``opener`` gives the children, the I/O engine and the flags. If this raises, children opened so far are
        closed by the opener; anything else the driver opened it must close itself.
        """

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes that can be read. Cheap: asked on every request."""

    @abstractmethod
    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``, all of it, or raise."""

    # -- optional ----------------------------------------------------------------------------------------------

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` at once and answer True, or leave it in any state and answer False if anything would wait.

        Runs inside the event loop: no coroutine, no task, no future; it must neither block nor raise for I/O errors
        (answer False, and let ``read_into`` raise them).
        """
        return False

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Store ``data`` at ``offset``; durable at return only with ``FUA``. All of it, or raise."""
        raise UnsupportedError(f"driver {self.name!r} cannot write", offset=offset, length=len(data))

    def start_write(self, offset: int, data: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        """Begin a plain write, and call ``done(error)`` in the event loop when it has ended; False: use ``write``.

        The write is then under way without coroutine, task or future. Decide at once, change nothing before ``True``, and
        do not call ``done`` before returning.
        """
        return False

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Make the range read as zeroes; ``MAY_UNMAP`` allows to deallocate, ``NO_FALLBACK`` forbids slow writing."""
        if WriteFlags.NO_FALLBACK in flags:
            raise UnsupportedError(
                f"driver {self.name!r} has no fast way to write zeroes", offset=offset, length=length
            )
        for piece in split(offset, length, length_max=min(len(ZEROES), self.limits.transfer_max)):
            await self.write(piece.offset, ZEROES[: piece.length], flags & WriteFlags.FUA)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Store one cluster (``limits.optimal_transfer`` bytes, or up to the node's end) compressed."""
        raise UnsupportedError(f"driver {self.name!r} cannot compress", offset=offset, length=len(data))

    async def discard(self, offset: int, length: int) -> None:
        """The range's content is not needed any more. A hint: doing nothing is right."""

    async def block_status(self, offset: int, length: int) -> Extent:
        """Status in this layer alone, from ``offset`` on, as far as it is the same, at most ``length`` bytes."""
        return Extent(offset, length, ExtentKind.DATA)

    def try_block_status(self, offset: int, length: int) -> Extent | None:
        """``block_status`` at once, or None if anything would wait."""
        return None

    async def allocated_size(self) -> int | None:
        """Bytes that the node occupies on its storage, or None if nobody can tell."""
        return None

    async def flush(self) -> None:
        """Make all completed writes durable. Default: flush the children that this driver may write to."""
        for child in self.children.values():
            if Permission.WRITE in child.needs:
                await child.flush()

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        """Change ``size``; what is new reads as zeroes."""
        raise UnsupportedError(f"driver {self.name!r} cannot be resized to {size} bytes")

    async def close(self) -> None:
        """Release everything; the Node has drained requests and flushed. Children are released by the Node."""

    async def copy_range_to(self, target: Driver, source_offset: int, target_offset: int, length: int) -> bool:
        """Copy inside the storage (copy offload) to a driver of the same kind; False if that is not possible."""
        return False

    @classmethod
    def child_permissions(cls, role: str, *, writable: bool) -> tuple[Permission, Permission]:
        """Answer ``(needed, shared)`` for the child in ``role``. Default: own "file" alone, share "backing" for reading."""
        readers = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
        if role == "backing" or not writable:
            return Permission.CONSISTENT_READ, readers
        return Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE, readers

    def permissions_changed(self, needed: Permission, shared: Permission) -> None:
        """What all parents together now need and share: a driver with locks adapts them, or raises to refuse."""

    @property
    def can_compress(self) -> bool:
        """Whether ``write_compressed`` works."""
        return False

    @property
    def zero_init(self) -> bool:
        """Whether a freshly created image of this driver reads as zeroes."""
        return False

    @property
    def cluster_size(self) -> int | None:
        """Allocation unit in bytes, or None if there is none or it cannot be told."""
        return None

    @property
    def backing_reference(self) -> str | None:
        """What the image says of its backing file, word for word; None if it says nothing."""
        return None

    async def info(self) -> Mapping[str, object]:
        """Format-specific facts for people and tools (``blocklayer info``), JSON-able."""
        return {}

    @classmethod
    async def create(cls, options: Options, context: CreateContext) -> None:
        """Make a new image; options are checked before the first file is made. Formats only."""
        raise UnsupportedError(f"driver {cls.name!r} cannot create images")

    @classmethod
    def probe(cls, head: bytes) -> bool:
        """Whether the first bytes of a file say that it is this format."""
        return False

    children: dict[str, Child]
    """Set by the graph right after ``open``: role to edge. Empty for drivers without children."""
