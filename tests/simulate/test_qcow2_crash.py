"""A qcow2 image after a power cut, at any point of random programs: sound, and what a flush covered is there.

Every write and flush of the image file is recorded; ``crash_states`` yields what the file may hold: any subset of the
writes since the last flush, some torn. Each such image is checked by our checker (leaks are allowed, or any refcounts
if it says that it is dirty), opened as its next user would, and read back. A sample goes to ``qemu-img check``.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import KIB, SECTOR
from tests.helpers.crash import crash_states
from tests.helpers.peers import needs, qemu_img
from tests.helpers.qcow2_disk import (
    assert_sound,
    file_of,
    header_of,
    memory_graph,
    new_image,
    open_image,
)
from tests.helpers.scripted import FailNth
from tests.helpers.virtual_time import run_virtual

if TYPE_CHECKING:
    from pathlib import Path

    from blocklayer.graph.node import Node

SEEDS = max(1, int(os.environ.get("BLOCKLAYER_SEEDS", "100")) // 50)
STEPS = 24
STATES = 50
"""About how many crashes of a program are looked at."""
BASE_BYTE = b"\xba"


@dataclass(frozen=True)
class Case:
    """An image and its disk."""

    name: str
    size: int
    options: dict[str, Any]
    backed: bool = False
    tiny_caches: bool = False
    prefill: int = 0
    """Bytes at the disk's end that are written before the program starts."""

    def __str__(self) -> str:
        return self.name

    @property
    def cluster(self) -> int:
        """In bytes."""
        return int(self.options["cluster_size"])

    async def open(self, graph: Any, content: bytearray, **options: Any) -> Node:
        """Open it with what it stands on."""
        if self.backed:
            options["backing"] = {"driver": "memfile", "content": bytearray(BASE_BYTE * self.size)}
        if self.tiny_caches:
            options |= {"l2_cache_size": 0, "refcount_cache_size": 0}
        return await open_image(graph, content, **options)


CASES = [
    Case("512", 200 * KIB, {"cluster_size": 512}),
    Case("512 small caches", 600 * KIB, {"cluster_size": 512}, tiny_caches=True),
    Case("512 table grows", 2200 * KIB, {"cluster_size": 512, "refcount_bits": 64}, prefill=1980 * KIB),
    Case("512 backed v2", 128 * KIB, {"cluster_size": 512, "compat": "0.10"}, backed=True),
    Case("4k backed", 256 * KIB, {"cluster_size": 4096}, backed=True),
    Case("4k lazy", 256 * KIB, {"cluster_size": 4096, "lazy_refcounts": True}),
    Case(
        "512 lazy table grows",
        2200 * KIB,
        {"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": True},
        prefill=1980 * KIB,
    ),
    Case("16k extended backed", 256 * KIB, {"cluster_size": 16 * KIB, "extended_l2": True}, backed=True),
]


class Recording:
    """One program on one image: the file's log, and for each point of it what must be readable."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        self.random = random.Random(seed)
        self.base = new_image(case.size, **case.options)
        fill = BASE_BYTE if case.backed else b"\0"
        self.model = bytearray(fill * case.size)
        self.points: list[tuple[int, bytes]] = [(0, bytes(self.model))]
        """(flushes of the file, content) whenever a flush of the guest has returned."""
        self.values: list[tuple[int, int, bytes]] = []
        """(flushes of the file before, sector, value) for all that requests gave."""
        self.sizes: list[tuple[int, int]] = [(0, case.size)]
        self.log: list[Any] = []

    async def run(self) -> None:
        """Do the program, with some requests at once."""
        async with memory_graph() as graph:
            if self.case.prefill:
                disk = await self.case.open(graph, self.base)
                self._gives(self.case.size - self.case.prefill, b"\xf1" * self.case.prefill)
                await disk.write(self.case.size - self.case.prefill, b"\xf1" * self.case.prefill)
                await disk.close()
                self.points, self.values = [(0, bytes(self.model))], []
            content = bytearray(self.base)
            disk = await self.case.open(graph, content)
            self.file = file_of(disk)
            self.log = self.file.log
            self.file.script = FailNth("any", -1)
            for _ in range(STEPS):
                await self._step(disk)
            await disk.close()
            self._flushed()
        assert_sound(content)

    @property
    def flushes(self) -> int:
        """Flushes of the file so far."""
        return sum(event[0] == "flush" for event in self.log)

    def _flushed(self) -> None:
        self.points.append((self.flushes, bytes(self.model)))

    def _range(self) -> tuple[int, int]:
        cluster, size = self.case.cluster, len(self.model)
        length = self.random.choice((SECTOR, cluster, 2 * cluster, 5 * cluster + SECTOR, 40 * SECTOR))
        length = min(length, size) // SECTOR * SECTOR
        hot = min(size - length, 12 * cluster)
        limit = hot if self.random.random() < 0.6 else size - length
        return self.random.randrange(limit // SECTOR + 1) * SECTOR, length

    def _gives(self, offset: int, data: bytes) -> None:
        flushes = self.flushes
        for at in range(0, len(data), SECTOR):
            self.values.append((flushes, offset + at, bytes(self.model[offset + at : offset + at + SECTOR])))
            self.values.append((flushes, offset + at, data[at : at + SECTOR]))
        self.model[offset : offset + len(data)] = data

    async def _step(self, disk: Node) -> None:
        kind = self.random.choices(
            ("write", "zeroes", "discard", "flush", "compress", "many", "truncate"), (6, 2, 3, 3, 2, 3, 1)
        )[0]
        offset, length = self._range()
        data = self.random.randbytes(length)
        if kind == "write":
            self._gives(offset, data)
            await disk.write(offset, data)
        elif kind == "zeroes":
            self._gives(offset, bytes(length))
            await disk.write_zeroes(offset, length, self.random.choice((WriteFlags.NONE, WriteFlags.MAY_UNMAP)))
        elif kind == "discard":
            self._gives(offset, bytes(length))
            await disk.discard(offset, length)
            self._gives(offset, await disk.read(offset, length))
        elif kind == "flush":
            await disk.flush()
            self._flushed()
        elif kind == "compress":
            await self._compress(disk)
        elif kind == "many":
            await self._many(disk)
        elif kind == "truncate":
            await self._truncate(disk)

    async def _compress(self, disk: Node) -> None:
        cluster = self.case.cluster
        offset = self.random.randrange(min(len(self.model) // cluster, 12)) * cluster
        data = (self.random.randbytes(8) * cluster)[: min(cluster, len(self.model) - offset)]
        self._gives(offset, data)
        await disk.write_compressed(offset, data)

    async def _many(self, disk: Node) -> None:
        """Disjoint requests in few clusters at once, flushes among them."""
        starts = self.random.sample(range(min(len(self.model) // SECTOR, 64)), 6)
        requests = []
        for number, start in enumerate(starts):
            offset, data = start * SECTOR, self.random.randbytes(SECTOR)
            if number % 3 == 2:
                data = bytes(SECTOR)
                requests.append(disk.write_zeroes(offset, SECTOR))
            else:
                requests.append(disk.write(offset, data))
            self._gives(offset, data)
            if number == 2:
                requests.append(disk.flush())
        await asyncio.gather(*requests)

    async def _truncate(self, disk: Node) -> None:
        old = len(self.model)
        size = self.random.randrange(self.case.size // 2, self.case.size * 3 // 2) // SECTOR * SECTOR
        if size < old:
            self._gives(size, bytes(old - size))
        self.sizes.append((self.flushes, size))
        await disk.truncate(size)
        self.sizes.append((self.flushes, size))
        self.model[size:] = bytes(max(0, size - old))
        self._flushed()

    def check(self, image: bytes, epoch: int) -> None:
        """The image that a crash after ``epoch`` flushes of the file left is sound, and holds what it must."""
        content = bytearray(image)
        header = header_of(content)
        if not header.is_dirty:
            assert_sound(content, leaks=True)
        run_virtual(self._read_back(content, epoch))
        assert_sound(content, leaks=True)

    async def _read_back(self, content: bytearray, epoch: int) -> None:
        flushed, expected = max((point for point in self.points if point[0] <= epoch), key=lambda point: point[0])
        async with memory_graph() as graph:
            disk = await self.case.open(graph, content)
            found = await disk.read(0, disk.size)
            await self._write_on(disk)
            await disk.close()
        self._check_size(len(found), epoch)
        allowed: dict[int, set[bytes]] = {}
        for when, sector, value in self.values:
            if flushed <= when <= epoch:
                allowed.setdefault(sector, set()).add(value)
        for sector in range(0, min(len(found), len(expected)), SECTOR):
            value, wanted = found[sector : sector + SECTOR], expected[sector : sector + SECTOR]
            assert value == wanted or value in allowed.get(sector, ()), f"sector {sector} was lost"

    def _check_size(self, size: int, epoch: int) -> None:
        before = [each for when, each in self.sizes if when <= epoch]
        assert size in before, f"{size} is none of {before}"

    async def _write_on(self, disk: Node) -> None:
        """What was leaked or freed may be taken: nothing else may change by it."""
        before = await disk.read(0, disk.size)
        await disk.write(0, b"n" * 3 * self.case.cluster)
        await disk.flush()
        assert (await disk.read(0, disk.size))[3 * self.case.cluster :] == before[3 * self.case.cluster :]


def record(case: Case, seed: int) -> Recording:
    """Run a program in virtual time."""
    recording = Recording(case, seed)
    run_virtual(recording.run())
    return recording


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_crash_leaves_a_sound_image_with_all_that_was_flushed(case: Case, seed: int) -> None:
    recording = record(case, seed)
    states = crash_states(bytes(recording.base), recording.log, seed=seed, samples=3)
    share, source = STATES / (10 * recording.flushes), random.Random(seed)
    for number, state in enumerate(states):
        if source.random() > share:
            continue
        try:
            recording.check(state.image, state.epoch)
        except BaseException as error:
            error.add_note(f"{case}, seed {seed}, state {number}: after {state.epoch} flushes, {state.story}")
            raise


@needs("qemu-img")
@pytest.mark.interop
@pytest.mark.parametrize("case", [case for case in CASES if "lazy_refcounts" not in case.options], ids=str)
def test_qemu_finds_no_corruption_after_a_crash(case: Case, tmp_path: Path) -> None:
    """``qemu-img check`` ends with 0 (sound) or 3 (leaks)."""
    recording = record(case, seed=1000)
    states = crash_states(bytes(recording.base), recording.log, seed=1, samples=3)
    path = tmp_path / "crashed.qcow2"
    for number, state in enumerate(states):
        if number % (10 * recording.flushes // 5) == 0:
            path.write_bytes(state.image)
            result = json.loads(qemu_img("check", "--output", "json", "-f", "qcow2", path, status=None))
            assert "corruptions" not in result, f"state {number}: after {state.epoch} flushes, {state.story}: {result}"
