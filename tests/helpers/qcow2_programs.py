"""Random programs of requests on a qcow2 disk, and the bytearray that says what the disk must hold.

A ``Layout`` is one way to make an image; a ``Program`` is a seed's sequence of requests, done by ``run_program`` on an open
disk and on the model at once. What a discard leaves is not promised for parts of clusters, so the model looks.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import KIB, MIB, SECTOR

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from blocklayer.graph.node import Node


@dataclass(frozen=True)
class Layout:
    """How an image is made: ``options`` of create; ``backing``: bytes of a backing file of ``backing_fmt`` (0: none)."""

    name: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)
    backing: int = 0
    backing_fmt: str = "raw"
    data_file: bool = False

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return int(self.options.get("cluster_size", 64 * KIB))

    @property
    def version(self) -> int:
        """2 or 3."""
        return 2 if self.options.get("compat") == "0.10" else 3

    @property
    def discards(self) -> bool:
        """Whether whole discarded clusters read as zeroes."""
        return (self.version == 3 or not self.backing) and not self.options.get("data_file_raw")

    @property
    def compresses(self) -> bool:
        """Whether compressed clusters can be written."""
        return not self.data_file

    def __str__(self) -> str:
        return self.name


LAYOUTS = [
    Layout("512", 300 * KIB, {"cluster_size": 512}),
    Layout("512 wide refcounts", 5 * MIB, {"cluster_size": 512, "refcount_bits": 64}),
    Layout("512 one bit", 700 * KIB, {"cluster_size": 512, "refcount_bits": 1}),
    Layout("512 lazy", 3 * MIB, {"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": True}),
    Layout("512 v2", 300 * KIB, {"cluster_size": 512, "compat": "0.10"}),
    Layout("4k", 700 * KIB + 512, {"cluster_size": 4096}),
    Layout("4k v2 over raw", 400 * KIB, {"cluster_size": 4096, "compat": "0.10"}, backing=300 * KIB + 512),
    Layout("4k over shorter raw", 500 * KIB, {"cluster_size": 4096}, backing=200 * KIB + 512),
    Layout("4k over longer raw", 300 * KIB + 512, {"cluster_size": 4096}, backing=900 * KIB),
    Layout("4k over qcow2", 500 * KIB, {"cluster_size": 4096}, backing=500 * KIB, backing_fmt="qcow2"),
    Layout("4k two bits zstd", 500 * KIB, {"cluster_size": 4096, "refcount_bits": 2, "compression_type": "zstd"}),
    Layout("64k", 3 * MIB + 512),
    Layout("64k v2", 2 * MIB, {"compat": "0.10"}),
    Layout("64k lazy over raw", 2 * MIB, {"lazy_refcounts": True}, backing=MIB),
    Layout("64k four bits", 2 * MIB, {"refcount_bits": 4}),
    Layout("64k eight bits", 2 * MIB, {"refcount_bits": 8}),
    Layout("64k 32 bits", 2 * MIB, {"refcount_bits": 32}),
    Layout("64k preallocated", 2 * MIB, {"preallocation": "metadata"}),
    Layout("16k extended", 700 * KIB, {"cluster_size": 16 * KIB, "extended_l2": True}),
    Layout("16k extended over raw", 700 * KIB, {"cluster_size": 16 * KIB, "extended_l2": True}, backing=500 * KIB + 512),
    Layout("64k extended over qcow2", 2 * MIB, {"extended_l2": True}, backing=3 * MIB, backing_fmt="qcow2"),
    Layout(
        "64k extended preallocated", MIB, {"extended_l2": True, "preallocation": "metadata"}, backing=MIB
    ),
    Layout("2M", 9 * MIB + 512, {"cluster_size": 2 * MIB}),
    Layout("2M extended", 7 * MIB, {"cluster_size": 2 * MIB, "extended_l2": True}, backing=5 * MIB),
    Layout("4k data file", 500 * KIB, {"cluster_size": 4096, "data_file": "data.raw"}, data_file=True),
    Layout(
        "64k data file extended", 2 * MIB, {"data_file": "data.raw", "extended_l2": True}, data_file=True
    ),
    Layout(
        "64k data file over raw", 2 * MIB, {"data_file": "data.raw"}, data_file=True, backing=MIB
    ),
    Layout(
        "64k raw data file", 2 * MIB, {"data_file": "data.raw", "data_file_raw": True}, data_file=True
    ),
]  # fmt: skip


def content(size: int, seed: int = 1) -> bytes:
    """Bytes for a backing file: data with holes of zeroes."""
    source = random.Random(seed)
    pieces = bytearray()
    while len(pieces) < size:
        length = source.choice((512, 4096, 30000, 70000))
        pieces += source.randbytes(length) if source.random() < 0.7 else bytes(length)
    return bytes(pieces[:size])


class Program:
    """Requests drawn from a seed, done on a disk and on ``model``."""

    def __init__(self, layout: Layout, model: bytearray, seed: int) -> None:
        """``model`` is what the disk holds now."""
        self.layout = layout
        self.model = model
        self.random = random.Random(seed)
        self.log: list[str] = []
        """What was done, for whoever has to find out why it went wrong."""

    async def run(
        self, disk: Node, steps: int, *, reopen: Callable[[Node], Awaitable[Node]] | None = None, resize: bool = True
    ) -> Node:
        """Do ``steps`` requests; answers the disk, which ``reopen`` may have replaced."""
        kinds = {"write": 8, "many": 3, "zeroes": 3, "discard": 3, "read": 3, "flush": 1, "status": 1}
        if self.layout.compresses:
            kinds["compress"] = 3
        if resize:
            kinds["truncate"] = 1
        if reopen is not None:
            kinds["reopen"] = 1
        for _ in range(steps):
            (kind,) = self.random.choices(list(kinds), weights=list(kinds.values()))
            self.log.append(kind)
            if kind == "reopen" and reopen is not None:
                disk = await reopen(disk)
            else:
                await getattr(self, f"_{kind}")(disk)
        return disk

    def _range(self) -> tuple[int, int]:
        """Small, cluster-sized, or long; aligned or not; often at the end."""
        size, cluster = len(self.model), self.layout.cluster
        length = self.random.choice((1, SECTOR, self.random.randrange(1, cluster + 1), cluster, 3 * cluster + 512))
        if self.random.random() < 0.1:
            length = self.random.randrange(1, size // 2)
        length = min(length, size)
        offset = self.random.randrange(size - length + 1)
        if self.random.random() < 0.5:
            offset -= offset % self.random.choice((SECTOR, cluster))
        if self.random.random() < 0.1:
            offset = size - length
        self.log[-1] += f" {offset}+{length}"
        return offset, length

    def _data(self, length: int) -> bytes:
        return self.random.randbytes(length) if self.random.random() < 0.9 else bytes(length)

    async def _write(self, disk: Node) -> None:
        offset, length = self._range()
        data = self._data(length)
        await disk.write(offset, data, self.random.choice((WriteFlags.NONE, WriteFlags.NONE, WriteFlags.FUA)))
        self.model[offset : offset + length] = data

    async def _many(self, disk: Node) -> None:
        """Neighbouring writes and zeroes at once, so that several meet in one cluster."""
        start, length = self._range()
        count = self.random.randrange(2, 6)
        cuts = sorted(self.random.randrange(start, start + length + 1) for _ in range(count))
        requests = []
        for offset, end in zip(cuts, cuts[1:], strict=False):
            kind = self.random.choice(("write", "write", "write", "zeroes", "flush"))
            if offset == end or kind == "flush":
                requests.append(disk.flush())
            elif kind == "write":
                data = self._data(end - offset)
                requests.append(disk.write(offset, data))
                self.model[offset:end] = data
            else:
                requests.append(disk.write_zeroes(offset, end - offset, WriteFlags.MAY_UNMAP))
                self.model[offset:end] = bytes(end - offset)
        await asyncio.gather(*requests)

    async def _zeroes(self, disk: Node) -> None:
        offset, length = self._range()
        await disk.write_zeroes(offset, length, self.random.choice((WriteFlags.NONE, WriteFlags.MAY_UNMAP)))
        self.model[offset : offset + length] = bytes(length)

    async def _discard(self, disk: Node) -> None:
        offset, length = self._range()
        await disk.discard(offset, length)
        found = await disk.read(offset, length)
        old, cluster = bytes(self.model[offset : offset + length]), self.layout.cluster
        for start in range(offset - offset % cluster, offset + length, cluster):
            first, end = max(start, offset), min(start + cluster, offset + length)
            piece, before = found[first - offset : end - offset], old[first - offset : end - offset]
            whole = first == start and end == min(start + cluster, len(self.model))
            if whole and self.layout.discards:
                assert not any(piece), f"discarded, but not zero: {first}+{end - first}"
            elif not self.layout.discards:
                assert piece == before, f"changed by a discard: {first}+{end - first}"
            else:
                assert piece == before or not any(piece), f"neither old nor zero: {first}+{end - first}"
        self.model[offset : offset + length] = found

    async def _read(self, disk: Node) -> None:
        offset, length = self._range()
        found = await disk.read(offset, length)
        assert found == self.model[offset : offset + length], f"read something else at {offset}+{length}"

    async def _flush(self, disk: Node) -> None:
        await disk.flush()

    async def _status(self, disk: Node) -> None:
        """What is told to be zero is zero, and extents are without gaps."""
        offset, length = self._range()
        at = offset
        async for extent in disk.extents(offset, length):
            assert extent.offset == at
            at = extent.end
            if extent.kind.value == "zero":
                assert not any(self.model[extent.offset : extent.end]), f"not zero: {extent}"
        assert at == offset + length

    async def _compress(self, disk: Node) -> None:
        cluster = self.layout.cluster
        offset = self.random.randrange(len(self.model)) // cluster * cluster
        length = min(cluster, len(self.model) - offset)
        data = self.random.choice((b"squeeze ", b"x")) * length
        data = data[: length - 16 if length > 16 else 0] + self.random.randbytes(min(16, length))
        if self.random.random() < 0.2:
            data = self.random.randbytes(length)
        self.log[-1] += f" {offset}+{length}"
        await disk.write_compressed(offset, data)
        self.model[offset : offset + length] = data

    async def _truncate(self, disk: Node) -> None:
        old = len(self.model)
        size = self.random.choice(
            (old + SECTOR, old + self.layout.cluster * 5, old - SECTOR, old * 2 // 3, old * 4 // 3)
        )
        size = max(16 * SECTOR, min(size, 2 * self.layout.size)) // SECTOR * SECTOR
        self.log[-1] += f" {old} to {size}"
        await disk.truncate(size)
        self.model[size:] = bytes(max(0, size - old))
