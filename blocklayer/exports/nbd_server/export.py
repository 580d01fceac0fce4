"""An export: a disk under a name, with what clients may do to it, and what they did.

``NbdExport`` is the record that a user writes; ``ActiveExport`` is that export on a server: its counters, its hold on the
node, and the sessions that use it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import OptionError
from blocklayer.base.modes import Permission
from blocklayer.base.units import KIB
from blocklayer.codec.nbd.protocol import REQUEST_MAX, TransmissionFlags
from blocklayer.codec.nbd.server_handshake import ExportOffer
from blocklayer.exports.nbd_server.contexts import AllocationDepth, BaseAllocation
from blocklayer.graph.child import Child
from blocklayer.graph.node import Node
from blocklayer.graph.statistics import LATENCY_BOUNDS_S

if TYPE_CHECKING:
    from blocklayer.exports.nbd_server.contexts import MetaContext
    from blocklayer.exports.nbd_server.disk import Disk

PREFERRED: Final = 4 * KIB
"""Page size: what the page cache and every file system work in."""

_ALWAYS: Final = (
    TransmissionFlags.HAS_FLAGS
    | TransmissionFlags.SEND_FLUSH
    | TransmissionFlags.SEND_FUA
    | TransmissionFlags.SEND_DF
    | TransmissionFlags.SEND_CACHE
    | TransmissionFlags.BLOCK_STATUS_PAYLOAD
    | TransmissionFlags.CAN_MULTI_CONN  # all connections use one node: a flush makes the writes of all of them durable
)
_WRITABLE: Final = TransmissionFlags.SEND_TRIM | TransmissionFlags.SEND_WRITE_ZEROES | TransmissionFlags.SEND_FAST_ZERO


@dataclass(frozen=True, slots=True)
class NbdExport:
    """What to export. ``writable`` lets clients change the disk; ``contexts`` come after ``base:allocation``.

    Raises ``OptionError`` for texts that the protocol does not allow, for contexts with the same name, and for a writable
    export of a disk that is not.
    """

    name: str
    disk: Disk
    description: str = ""
    writable: bool = False
    allocation_depth: bool = False
    contexts: tuple[MetaContext, ...] = ()

    def __post_init__(self) -> None:
        """Check."""
        names = [context.name for context in self.all_contexts()]
        ExportOffer(self.name, self.description, 0, _ALWAYS, contexts=tuple(names))  # checks what the protocol limits
        if len(set(names)) < len(names):
            raise OptionError(f"export {self.name!r} has two contexts of the same name")
        if self.writable and self.disk.read_only:
            raise OptionError(f"export {self.name!r} cannot be writable: its disk is read-only")

    def all_contexts(self) -> tuple[MetaContext, ...]:
        """``base:allocation`` and those that were asked for."""
        depth = (AllocationDepth(self.disk),) if self.allocation_depth else ()
        return (BaseAllocation(self.disk), *depth, *self.contexts)


@dataclass(slots=True)
class ExportStatistics:
    """Counters of one export. ``latency`` counts requests by the bounds of ``LATENCY_BOUNDS_S``."""

    connections: int = 0
    requests: int = 0
    errors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    latency: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))

    def record(self, seconds: float) -> None:
        """One request took so long."""
        self.requests += 1
        self.latency[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1


class ActiveExport:
    """An export on a server; holds its node, if its disk is one."""

    def __init__(self, wanted: NbdExport) -> None:
        """Attach. Raises ``PermissionConflictError`` and ``ReadOnlyError``."""
        self.name = wanted.name
        self.disk = wanted.disk
        self.description = wanted.description
        self.writable = wanted.writable
        self.contexts = {context.name: context for context in wanted.all_contexts()}
        self.statistics = ExportStatistics()
        self._edge: Child | None = None
        if isinstance(wanted.disk, Node):
            needs = Permission.CONSISTENT_READ | (Permission.WRITE if wanted.writable else Permission.NONE)
            self._edge = Child(self, "export", wanted.disk, needs, Permission.ALL)

    def offer(self) -> ExportOffer:
        """What the handshake tells of it; the size is the disk's of now."""
        return ExportOffer(
            name=self.name,
            description=self.description,
            size=self.disk.size,
            flags=_ALWAYS | (_WRITABLE if self.writable else TransmissionFlags.READ_ONLY),
            minimum=1,
            preferred=PREFERRED,
            maximum=REQUEST_MAX,
            contexts=tuple(self.contexts),
        )

    async def release(self) -> None:
        """Let go of the node, which is closed if nobody else holds it. Twice is fine. Raises what its last flush raises."""
        if self._edge is not None:
            edge, self._edge = self._edge, None
            edge.detach()
            if not edge.node.parents:
                await edge.node.close()

    # -- what an owner of an edge has to be ----------------------------------------------------------------------

    def describe(self) -> str:
        """Who it is, for messages."""
        return f"NBD export {self.name!r}"

    def drain_begin(self) -> None:
        """Sessions use the node as its callers do: their requests wait at its door."""

    async def drain_wait(self) -> None:
        """Their requests are on the node's own list."""

    def drain_end(self) -> None:
        """Nothing to undo."""
