"""A fault in each single request to an image file, and a cancellation at each turn of the event loop: qcow2 disks, and
backups between them in each mode.

Afterwards every sector holds what some request gave it, nobody holds a lock, a pin or a generation, the image is sound
and, once it could be closed, without leaks; of a backup no hook, edge, node or half-made file is left.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import blocklayer
from blocklayer.base.errors import BlockError, IOFailedError, JobError, StateError, io_error
from blocklayer.base.modes import WriteFlags
from blocklayer.base.units import KIB, SECTOR
from tests.helpers.qcow2_disk import (
    InlineEngine,
    assert_sound,
    file_of,
    memory_graph,
    new_image,
    open_image,
    opened,
    qcow2,
)
from tests.helpers.scripted import FailNth
from tests.helpers.tiny import TinyFile, names
from tests.helpers.virtual_time import run_virtual, virtual_loop

if TYPE_CHECKING:
    from blocklayer.base.modes import Preallocation
    from blocklayer.graph.node import Node
    from blocklayer.jobs.backup import BackupJob

SIZE = 96 * KIB

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"cluster_size": 512},
    "lazy": {"cluster_size": 512, "lazy_refcounts": True, "refcount_bits": 64},
    "version 2": {"cluster_size": 4096, "compat": "0.10"},
    "extended": {"cluster_size": 16 * KIB, "extended_l2": True},
}


def data(number: int, length: int) -> bytes:
    """Bytes that no other request writes; they compress."""
    return bytes([number]) * length


@dataclass
class Scene:
    """A short program on one disk; ``fault_at`` counts requests of its file, ``act_at`` turns of the event loop."""

    layout: dict[str, Any]
    backed: bool = False
    fault_at: int = -1
    fault: int = errno.EIO
    act_at: int = -1
    requests: int = 0
    ticks: int = 0
    failed: int = 0
    content: bytearray = field(default_factory=bytearray)
    values: dict[int, set[bytes]] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=lambda: {SIZE})
    task: asyncio.Task[Any] | None = None

    def gives(self, offset: int, given: bytes, *, sure: bool) -> None:
        """The sectors of the range may hold ``given``; if the request is ``sure``, nothing else."""
        for at in range(0, len(given), SECTOR):
            values = self.values.setdefault(offset + at, set())
            if sure:
                values.clear()
            values.add(given[at : at + SECTOR])

    async def do(self, request: Awaitable[Any], offset: int = 0, given: bytes = b"", size: int = SIZE) -> bool:
        """Await a request in a task that may be cancelled; whatever it was to write may be there, or must."""
        self.sizes.add(size)
        self.gives(offset, given, sure=False)
        self.task = asyncio.ensure_future(request)
        await asyncio.wait([self.task])
        task, self.task = self.task, None
        if task.cancelled() or task.exception() is not None:
            assert task.cancelled() or isinstance(task.exception(), IOFailedError), task.exception()
            self.failed += 1
            return False
        self.gives(offset, given, sure=True)
        return True

    def cancel(self) -> None:
        """Cancel what runs."""
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        """Open, work, close; then look."""
        self.content = new_image(SIZE, **self.layout)
        base = bytearray(b"\xba" * SIZE)
        self.gives(0, bytes(base) if self.backed else bytes(SIZE), sure=True)
        loop = virtual_loop()
        async with memory_graph() as graph:
            options = {"backing": {"driver": "memfile", "content": base}} if self.backed else {}
            disk = await open_image(graph, self.content, **options)
            script = file_of(disk).script = FailNth("any", self.fault_at, lambda: io_error(self.fault, "injected"))
            loop.ticks, loop.act_at, loop.action = 0, self.act_at, self.cancel
            await self._work(disk)
            self.ticks = loop.ticks
            loop.act_at = -1
            self.requests, script.nth = script.seen, -1
            self._check_idle(disk)
            await disk.flush()
            found = await disk.read(0, disk.size)
            await disk.close()
        self._check_content(found)
        assert_sound(self.content)
        options = {"backing": {"driver": "memfile", "content": base}} if self.backed else {}
        async with opened(self.content, read_only=True, **options) as disk:
            assert await disk.read(0, disk.size) == found

    async def _work(self, disk: Node) -> None:
        cluster = int(self.layout["cluster_size"])
        await self.do(disk.write(0, data(1, 3 * cluster)), 0, data(1, 3 * cluster))
        await self.do(disk.write(cluster + SECTOR, data(2, SECTOR)), cluster + SECTOR, data(2, SECTOR))
        await self.do(disk.write_compressed(4 * cluster, data(3, cluster)), 4 * cluster, data(3, cluster))
        await self.do(disk.flush())
        await self.do(disk.write(4 * cluster, data(4, SECTOR)), 4 * cluster, data(4, SECTOR))
        await self.do(disk.write_zeroes(0, cluster, WriteFlags.MAY_UNMAP), 0, bytes(cluster))
        await self.do(disk.write_zeroes(cluster, SECTOR), cluster, bytes(SECTOR))
        await self._discard(disk, 2 * cluster, cluster)
        await self.do(disk.flush())
        await self.do(disk.write_compressed(0, data(5, cluster)), 0, data(5, cluster))
        await self._together(disk, cluster)
        if await self.do(disk.truncate(SIZE + 8 * cluster), size=SIZE + 8 * cluster):
            await self.do(disk.write(SIZE, data(6, cluster)), SIZE, data(6, cluster))
        await self.do(disk.flush())
        await self.do(disk.truncate(SIZE - SECTOR), size=SIZE - SECTOR)
        await self.do(disk.write(5 * cluster, data(7, SECTOR)), 5 * cluster, data(7, SECTOR))

    async def _discard(self, disk: Node, offset: int, length: int) -> None:
        await self.do(disk.discard(offset, length))
        self.gives(offset, bytes(length), sure=False)

    async def _together(self, disk: Node, cluster: int) -> None:
        """Two writes into one cluster, and a flush. What fails, fails for one of them."""
        first, second = data(8, SECTOR), data(9, SECTOR)
        offset = 2 * cluster
        for at, given in ((offset, first), (offset + cluster - SECTOR, second)):
            self.gives(at, given, sure=False)

        async def both() -> None:
            outcomes = await asyncio.gather(
                disk.write(offset, first),
                disk.write(offset + cluster - SECTOR, second),
                disk.flush(),
                return_exceptions=True,
            )
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome

        await self.do(both())

    def _check_idle(self, disk: Node) -> None:
        driver = qcow2(disk)
        assert not disk.path.requests
        assert not driver.children["file"].node.path.requests
        assert not len(driver._locks)
        assert not driver.grace._active
        assert not driver.l2.l1.pins
        assert {table.pins for table in driver.image.sources()} == {0}
        locks = (driver.l2._lock, driver.allocator._lock, driver.image._lock, driver.compressed._lock, driver._marking)
        assert not any(lock.locked() for lock in locks)

    def _check_content(self, found: bytes) -> None:
        assert len(found) in self.sizes
        for sector in range(0, len(found), SECTOR):
            value = found[sector : sector + SECTOR]
            if sector >= SIZE - SECTOR:
                assert value in {bytes(SECTOR), *self.values.get(sector, ())}
            else:
                assert value in self.values[sector], f"sector {sector} holds what nobody gave it"


def run(scene: Scene) -> Scene:
    """In virtual time."""
    run_virtual(scene.run())
    return scene


CASES = [("plain", True), ("plain", False), ("lazy", False), ("version 2", True), ("extended", True)]


@pytest.mark.parametrize(
    ("layout", "backed", "code"), [*((*case, errno.EIO) for case in CASES), ("plain", True, errno.ENOSPC)]
)
def test_a_fault_in_each_single_request_of_a_disk(layout: str, backed: bool, code: int) -> None:
    whole = run(Scene(LAYOUTS[layout], backed))
    assert not whole.failed
    for number in range(1, whole.requests + 1):
        try:
            scene = run(Scene(LAYOUTS[layout], backed, fault_at=number, fault=code))
        except BaseException as error:
            error.add_note(f"the fault was in request {number} of {whole.requests}")
            raise
        assert scene.failed <= 2


@pytest.mark.parametrize(("layout", "backed"), [("plain", True), ("lazy", False), ("extended", True)])
def test_a_cancellation_at_each_turn_of_a_disk(layout: str, backed: bool) -> None:
    ticks = run(Scene(LAYOUTS[layout], backed)).ticks
    for number in range(1, ticks + 1):
        try:
            run(Scene(LAYOUTS[layout], backed, act_at=number))
        except BaseException as error:
            error.add_note(f"cancelled in turn {number} of {ticks}")
            raise


# -- backups ---------------------------------------------------------------------------------------------------------

CLUSTER = 64 * KIB
DISK = 6 * CLUSTER
GUEST_WRITES = (CLUSTER + 512, 4 * CLUSTER - 1024)
MODES = ("full", "top", "none")


class ScriptedFile(TinyFile):
    """A file of the host that a scene sees every request of; several nodes share the scene."""

    scene: ClassVar[BackupScene]

    async def _step(self, kind: str) -> None:
        await self.scene.script(kind, 0, 0)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        return False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self._step("read")
        super().try_read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        await self._step("write")
        await super().write(offset, data, flags)

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        await self._step("write_zeroes")
        await super().write(offset, memoryview(bytes(length)), flags)

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        await self._step("truncate")
        await super().truncate(size, preallocation)

    async def flush(self) -> None:
        await self._step("flush")
        await super().flush()


@dataclass
class BackupScene:
    """A backup of an overlay to a path; the guest writes from its instant on. See ``Scene`` for the numbers."""

    folder: Path
    mode: str
    fault_at: int = -1
    act_at: int = -1
    act: Callable[[BackupScene], object] = lambda _scene: None
    script: FailNth = field(default_factory=lambda: FailNth("any", -1))
    ticks: int = 0
    ending: str = ""
    job: BackupJob | None = None
    starter: asyncio.Task[None] | None = None
    guest: asyncio.Task[None] | None = None
    written: set[int] = field(default_factory=set)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Make base and disk, back up, look around."""
        ScriptedFile.scene = self
        base, disk, copy = (str(self.folder / name) for name in ("base.qcow2", "disk.qcow2", "copy.qcow2"))
        async with blocklayer.Graph(drivers={"file": ScriptedFile}, engine=InlineEngine) as graph:
            await graph.create(base, format="qcow2", size=DISK)
            await graph.create(disk, format="qcow2", size=DISK, backing_file=base, backing_fmt="qcow2")
            node = await graph.open(base)
            await node.write(0, b"b" * 3 * CLUSTER)
            await node.close()
            source = await graph.open(disk)
            await source.write(CLUSTER, b"s" * CLUSTER)
            await source.write_zeroes(2 * CLUSTER, CLUSTER)
            before = await source.read(0, DISK)
            await source.flush()
            nodes = set(graph.nodes)
            loop = virtual_loop()
            self.script.seen, self.script.nth = 0, self.fault_at
            loop.ticks, loop.act_at, loop.action = 0, self.act_at, lambda: self.act(self)
            self.starter = asyncio.create_task(self._back_up(graph, source, copy))
            self.guest = asyncio.create_task(self._write(source))
            for task in (await asyncio.wait([self.starter, self.guest]))[0]:
                if not task.cancelled():
                    task.result()
            if self.job is not None:
                if not self.job.concluded and self.mode == "none":
                    self.job.end(force=False)
                await self.job.wait_concluded()
                if self.starter.cancelled() and self.job.error is None:
                    self.ending = "success"
            self.ticks, loop.act_at, self.script.nth = loop.ticks, -1, -1
            assert not source.path.hooks
            assert not source.path.requests
            assert {edge.role for edge in source.parents} == {"disk"}
            assert set(graph.nodes) == nodes
            await self._check_source(source, before)
        await self._check_files(before)

    async def _back_up(self, graph: blocklayer.Graph, source: Node, copy: str) -> None:
        try:
            self.job = await graph.backup(source, copy, sync=self.mode)
        except BlockError as error:
            self.ending = f"not started: {type(error).__name__}"
            return
        finally:
            self.started.set()
        if self.mode == "none":
            assert self.guest is not None
            await asyncio.wait([self.guest])
            if not self.job.concluded:
                with suppress(StateError):  # it may be on its way to the end already
                    await self.job.cancel()
        try:
            await self.job.wait()
            self.ending = "success"
        except (JobError, IOFailedError) as error:
            self.ending = type(error).__name__

    async def _write(self, source: Node) -> None:
        await self.started.wait()
        for offset in GUEST_WRITES:
            with suppress(BlockError):
                await source.write(offset, b"g" * 2048)
                self.written.add(offset)

    async def _check_source(self, source: Node, before: bytes) -> None:
        now = await source.read(0, DISK)
        for offset in GUEST_WRITES:
            found = now[offset : offset + 2048]
            allowed = {b"g" * 2048} if offset in self.written else {b"g" * 2048, before[offset : offset + 2048]}
            assert found in allowed
        await source.flush()

    async def _check_files(self, before: bytes) -> None:
        kept = {"base.qcow2", "disk.qcow2"}
        assert_sound((self.folder / "disk.qcow2").read_bytes())
        if self.mode == "none":
            assert names(self.folder) - kept <= {"copy.qcow2"}
            return
        assert names(self.folder) == kept | ({"copy.qcow2"} if self.ending == "success" else set())
        if self.ending == "success":
            assert_sound((self.folder / "copy.qcow2").read_bytes())
            async with blocklayer.Graph(engine=InlineEngine, drivers={"file": TinyFile}) as graph:
                copy = await graph.open(self.folder / "copy.qcow2", read_only=True)
                assert await copy.read(0, DISK) == before


def back_up(scene: BackupScene) -> BackupScene:
    """In virtual time, in an empty folder."""
    for name in names(scene.folder):
        (scene.folder / name).unlink()
    run_virtual(scene.run())
    return scene


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_in_each_single_request_of_a_backup(tmp_path: Path, mode: str) -> None:
    whole = back_up(BackupScene(tmp_path, mode))
    assert whole.ending == "success"
    endings = set()
    for number in range(1, whole.script.seen + 1):
        try:
            endings.add(back_up(BackupScene(tmp_path, mode, fault_at=number)).ending)
        except BaseException as error:
            error.add_note(f"the fault was in request {number} of {whole.script.seen}")
            raise
    assert endings <= {"success", "IOFailedError", "not started: IOFailedError", "SnapshotBrokenError"}
    assert {"IOFailedError", "not started: IOFailedError"} <= endings


def cancel_starter(scene: BackupScene) -> None:
    """Whoever starts the job, or waits for it."""
    assert scene.starter is not None
    scene.starter.cancel()


def cancel_job(scene: BackupScene) -> None:
    """As an operator in a hurry."""
    if scene.job is not None and not scene.job.concluded:
        scene.job.end(force=True)


def cancel_guest(scene: BackupScene) -> None:
    """A guest that gives up."""
    assert scene.guest is not None
    scene.guest.cancel()


@pytest.mark.parametrize("act", [cancel_starter, cancel_job, cancel_guest])
@pytest.mark.parametrize("mode", MODES)
def test_a_cancellation_at_each_turn_of_a_backup(
    tmp_path: Path, mode: str, act: Callable[[BackupScene], object]
) -> None:
    ticks = back_up(BackupScene(tmp_path, mode)).ticks
    for number in range(2, ticks + 1):
        try:
            back_up(BackupScene(tmp_path, mode, act=act, act_at=number))
        except BaseException as error:
            error.add_note(f"cancelled in turn {number} of {ticks}")
            raise
