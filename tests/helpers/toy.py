"""The smallest format that maps: clusters in a table in memory, their data in the child "file".

A cluster is absent (the backing node answers), data (in place, or shared and so copied when written), zero (with or
without room kept), or special (one byte repeated). Tables are "loaded" on first use, which takes a turn of the loop.
``used`` are the host clusters taken; ``check`` says whether each is referred to exactly once.
``script(step)`` is awaited in load, allocate, zero and discard.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blocklayer.base.ranges import align_down, align_up
from blocklayer.graph.format_driver import FormatDriver, MapKind, Mapping
from blocklayer.graph.graph import Graph
from tests.helpers.scripted import NoEngine, ScriptedDriver
from tests.helpers.strict import StrictDriver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import Self

    from blocklayer.base.options import Options
    from blocklayer.graph.child import Child
    from blocklayer.graph.driver import Driver
    from blocklayer.graph.node import Node
    from blocklayer.graph.opener import Opener


@dataclass(frozen=True)
class Entry:
    """One cluster: ``host`` cluster or None; ``shared``: not to be overwritten in place; ``byte`` of special ones."""

    kind: MapKind
    host: int | None = None
    shared: bool = False
    byte: int = 0


ABSENT = Entry(MapKind.BACKING)


class Room:
    """An ``Allocation``: host clusters from ``first`` on for the guest clusters from ``offset`` on."""

    def __init__(self, toy: Toy, offset: int, hosts: range, *, zeroed: bool) -> None:
        """Taken already."""
        self.toy = toy
        self.offset = offset
        self.length = len(hosts) * toy.unit
        self.hosts = hosts
        self.child = toy.file
        self.host_offset = hosts.start * toy.unit
        self.zeroed = zeroed

    def publish(self) -> None:
        """Let the table point there."""
        for cluster, host in enumerate(self.hosts, self.offset // self.toy.unit):
            self.toy.change(cluster, Entry(MapKind.DATA, host))

    def abort(self) -> None:
        """Give the clusters back."""
        for host in self.hosts:
            self.toy.give_back(host)


class Toy(FormatDriver):
    """Options: ``size``, ``unit``, ``zero_unit``, ``zeroing`` (whether ``zero_range`` works)."""

    name = "toy"

    def __init__(self, options: Options, file: Child, backing: Child | None) -> None:
        """Everything is absent."""
        given = {"size": 1000, "unit": 64, "zeroing": True, **options}
        unit = int(given["unit"])
        super().__init__(backing=backing, unit=unit, zero_unit=int(given.get("zero_unit", unit)))
        self.file = file
        self._size = int(given["size"])
        self.zeroing = given["zeroing"]
        self.table: dict[int, Entry] = {}
        self.loaded: set[int] = set()
        self.used: set[int] = set()
        self.freed: list[tuple[int, int]] = []
        self.log: list[tuple[object, ...]] = []
        self.script: Callable[[str], Awaitable[None]] | None = None

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """With or without a backing node."""
        return cls(options, await opener.child("file"), await opener.optional_child("backing"))

    @property
    def size(self) -> int:
        """In bytes."""
        return self._size

    async def _step(self, kind: str, *details: object) -> None:
        self.log.append((kind, *details))
        if self.script is not None:
            await self.script(kind)

    # -- the table ---------------------------------------------------------------------------------------------

    def change(self, cluster: int, entry: Entry) -> None:
        """Point elsewhere; what the old entry held is freed."""
        old = self.table.get(cluster, ABSENT)
        self.table[cluster] = entry
        if old.host is not None and old.host != entry.host:
            self.freed.append((old.host, self.grace.close()))

    def give_back(self, host: int) -> None:
        """Nothing ever pointed there."""
        if host not in {entry.host for entry in self.table.values()}:
            self.used.remove(host)

    def put(self, cluster: int, data: bytes, *, shared: bool = False) -> None:
        """Fill a cluster behind everybody's back."""
        (host,) = self._take(1)
        self.file.node.driver._grow((host + 1) * self.unit)
        self.file.node.driver.bytes[host * self.unit : (host + 1) * self.unit] = data.ljust(self.unit, b"\0")
        self.table[cluster] = Entry(MapKind.DATA, host, shared)

    def _take(self, count: int) -> range:
        for host, generation in tuple(self.freed):
            if self.grace.has_ended(generation):
                self.freed.remove((host, generation))
                self.used.remove(host)
        first = 0
        while not self.used.isdisjoint(range(first, first + count)):
            first += 1
        hosts = range(first, first + count)
        self.used.update(hosts)
        return hosts

    def check(self) -> None:
        """Each host cluster that is taken is referred to by one entry, or waits to be used again."""
        held = [entry.host for entry in self.table.values() if entry.host is not None]
        held += [host for host, _ in self.freed]
        assert sorted(held) == sorted(self.used)

    # -- what a format answers ---------------------------------------------------------------------------------

    def _entry(self, cluster: int) -> Entry:
        return self.table.get(cluster, ABSENT)

    def _run(self, offset: int, length: int) -> Mapping:
        cluster, inside = divmod(offset, self.unit)
        entry = self._entry(cluster)
        run = self.unit - inside
        while run < length:
            following = self._entry((offset + run) // self.unit)
            step = (offset + run) // self.unit - cluster
            host = None if entry.host is None else entry.host + step
            if (following.kind, following.host, following.shared) != (entry.kind, host, entry.shared):
                break
            if entry.kind is MapKind.SPECIAL:
                break
            run += self.unit
        host_offset = 0 if entry.host is None else entry.host * self.unit + inside
        child = None if entry.host is None else self.file
        in_place = entry.kind is MapKind.DATA and not entry.shared
        return Mapping(entry.kind, min(run, length), child, host_offset, in_place, entry.byte)

    def try_map(self, offset: int, length: int) -> Mapping | None:
        """None until the first cluster is loaded."""
        assert length > 0
        assert 0 <= offset < align_up(self._size, self.unit)
        return self._run(offset, length) if offset // self.unit in self.loaded else None

    async def load_map(self, offset: int, length: int) -> Mapping:
        """Takes a turn."""
        await self._step("load", offset, length)
        await asyncio.sleep(0)
        self.loaded.add(offset // self.unit)
        return self._run(offset, length)

    async def read_special(self, mapping: Mapping, offset: int, buffer: memoryview) -> None:
        """One byte, repeated."""
        await self._step("special", offset, len(buffer))
        assert isinstance(mapping.detail, int)
        buffer[:] = bytes([mapping.detail]) * len(buffer)

    async def allocate(self, offset: int, length: int) -> Room:
        """Room for the clusters that cannot be overwritten in place."""
        await self._step("allocate", offset, length)
        start = align_down(offset, self.unit)
        assert self._locks.overlaps(start, self.unit)
        count = 0
        while start + count * self.unit < offset + length:
            entry = self._entry(start // self.unit + count)
            if entry.kind is MapKind.DATA and not entry.shared:
                break
            count += 1
        zeroed = self._next_is_virgin(count)
        return Room(self, start, self._take(count), zeroed=zeroed)

    def _next_is_virgin(self, count: int) -> bool:
        return not self.used and not self.freed and self.file.size == 0 and count > 0

    async def zero_range(self, offset: int, length: int, *, may_unmap: bool) -> bool:
        """Keeps the room unless it may unmap."""
        await self._step("zero", offset, length, may_unmap)
        if not self.zeroing:
            return False
        for cluster in range(offset // self.unit, (offset + length) // self.unit):
            entry = self._entry(cluster)
            keep = entry.kind in (MapKind.DATA, MapKind.ZERO) and not entry.shared and not may_unmap
            self.change(cluster, Entry(MapKind.ZERO, entry.host if keep else None))
        return True

    async def discard_range(self, offset: int, length: int) -> None:
        """Zero without room: nothing comes back from the backing node."""
        await self._step("discard", offset, length)
        for cluster in range(offset // self.unit, (offset + length) // self.unit):
            self.change(cluster, Entry(MapKind.ZERO))


def toy(node: Node) -> Toy:
    """The driver of ``node``."""
    assert isinstance(node.driver, Toy)
    return node.driver


@asynccontextmanager
async def toy_disk(*, backing: bytes | None = None, **options: object) -> AsyncIterator[tuple[Node, Toy, StrictDriver]]:
    """A disk of this format: its node, its driver, and the driver of its file."""
    drivers: dict[str, type[Driver]] = {driver.name: driver for driver in (Toy, StrictDriver, ScriptedDriver)}
    async with Graph(drivers, engine=NoEngine) as graph:  # type: ignore[arg-type]  # no engine is used
        spec: dict[str, object] = {"driver": "toy", "node-name": "disk", **options}
        spec["file"] = {"driver": "strict", "size": 0, "growable": True, "node-name": "file"}
        if backing is not None:
            base = await graph.open({"driver": "strict", "size": len(backing), "node-name": "base"}, read_only=True)
            assert isinstance(base.driver, StrictDriver)
            base.driver.bytes[:] = backing
            spec["backing"] = base
        node = await graph.open(spec)
        file = node.children["file"].node.driver
        assert isinstance(file, StrictDriver)
        yield node, toy(node), file


def special(byte: int) -> Entry:
    """A compressed cluster, as it were."""
    return replace(ABSENT, kind=MapKind.SPECIAL, byte=byte)
