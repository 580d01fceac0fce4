"""``blocklayer demo``: back up a real disk that is being written to, in all three modes, and prove every copy.

The disk is an ext4 file system in a qcow2 chain of base and overlay. A guest keeps changing it. Each copy is compared,
byte for byte and file by file, with what the disk held at the point in time; e2fsck must find its file system sound, and
``qemu-img`` (or, without it, our own check) its metadata. The exit status is 0 only if all of that held.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import blocklayer
from blocklayer.base.buffers import is_zero
from blocklayer.base.units import MIB, format_size
from blocklayer.cli.demo_disk import Guest, call, have, make_disk
from blocklayer.cli.parser import FailureError, size
from blocklayer.drivers.qcow2 import Qcow2Driver

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

PIECE = 2 * MIB
SIZE_MIN = 16 * MIB
"""Less has no room for the files and for the guest's scratch file."""

NONE_SECONDS = 1.0
"""How long the guest writes while a job of mode none saves old data."""

MODES = {"full": "the chain", "top": "the overlay", "none": "what changes"}
"""And what each copies."""
JUDGES = {"mkfs.ext4": "e2fsprogs", "debugfs": "e2fsprogs", "e2fsck": "e2fsprogs", "qemu-img": "qemu-utils"}
"""Programs that make the proof stronger, and the Debian packages that have them."""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("--keep", metavar="DIR", help="work in DIR and leave everything there")
    parser.add_argument("--size", type=size, default=96 * MIB, help="size of the disk (default: 96M)")
    parser.add_argument("--seed", type=int, default=1, help="other contents and writes (default: 1)")
    parser.set_defaults(run=run)


@dataclass(slots=True)
class Verdict:
    """What became of one mode."""

    mode: str
    seconds: float
    writes: int
    result: blocklayer.BackupResult
    checks: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether everything held, and something was looked at."""
        return bool(self.checks) and all(fine for _, fine in self.checks)


async def run(args: argparse.Namespace) -> int:
    """Do it all; 0 if every copy is right."""
    if args.size < SIZE_MIN:
        raise FailureError(f"the demo's disk needs at least {format_size(SIZE_MIN)}, not {format_size(args.size)}")
    console = Console(highlight=False)
    for package in dict.fromkeys(package for program, package in JUDGES.items() if not have(program)):
        console.print(f"[yellow]{package} is not installed: the proof goes without it.[/]")
    with tempfile.TemporaryDirectory(prefix="blocklayer-demo-") as scratch:
        directory = args.keep or scratch
        os.makedirs(directory, exist_ok=True)
        verdicts = await Demo(directory, args.size, args.seed, console).run()
    console.print(as_table(verdicts))
    if args.keep:
        console.print(f"Everything is in {directory}", soft_wrap=True)
    if all(verdict.good for verdict in verdicts):
        console.print("[bold green]Every copy is the disk as it was at its point in time.[/]")
        return 0
    console.print("[bold red]Something is wrong: see what FAILED above.[/]")
    return 1


def as_table(verdicts: Sequence[Verdict]) -> Table:
    """A row for each mode; 80 columns are enough for it."""
    table = Table(title="Three backups of a disk that was being written to", title_style="bold")
    table.add_column("mode", no_wrap=True)
    table.add_column("what was done", no_wrap=True)
    table.add_column("what was found", no_wrap=True)
    for verdict in verdicts:
        result = verdict.result
        facts = [
            f"{format_size(result.background_bytes)} copied by the job",
            f"{format_size(result.before_write_bytes)} saved before writes",
            f"{verdict.writes:,} guest writes meanwhile",
            f"{result.guest_waits:,} of these had to wait",
        ]
        checks = (f"{'[green]ok[/]' if fine else '[bold red]FAILED[/]'} {name}" for name, fine in verdict.checks)
        name = f"[bold]{verdict.mode}[/]\n{MODES[verdict.mode]}\n{verdict.seconds:.2f} s"
        table.add_row(name, "\n".join(facts), "\n".join(checks), end_section=True)
    return table


class Demo:
    """One run in one directory."""

    def __init__(self, directory: str, size: int, seed: int, console: Console) -> None:
        """Nothing happens before ``run``."""
        self._directory = directory
        self._size = size // MIB * MIB
        self._seed = seed
        self._console = console

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    async def run(self) -> list[Verdict]:
        """Build the chain, take all modes while the guest writes."""
        raw = self._path("disk.raw")
        model, files, scratch = await make_disk(raw, self._size, self._seed)
        kind = f"ext4 with {len(files)} files" if files else "random data (mkfs.ext4 and debugfs are not installed)"
        self._console.print(f"A disk of {format_size(self._size)}: {kind}, as a qcow2 chain of two layers.")
        source = random.Random(self._seed + 1)  # noqa: S311 - repeatable, not secret
        guest = Guest(model, files, scratch, source)
        async with blocklayer.Graph() as graph:
            await self._make_chain(graph, model)
            disk = await graph.open(self._path("vm.qcow2"), node_name="disk")
            try:
                async with asyncio.TaskGroup() as tasks:
                    writing = tasks.create_task(guest.run(disk))
                    verdicts = [await self._take(graph, disk, guest, mode) for mode in MODES]
                    writing.cancel()
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None
        await self._check_source(verdicts[-1])
        return verdicts

    async def _make_chain(self, graph: blocklayer.Graph, model: bytearray) -> None:
        base_path, top_path = self._path("base.qcow2"), self._path("vm.qcow2")
        await graph.create(base_path, format="qcow2", size=self._size)
        base = await graph.open(base_path)
        for start in range(0, self._size, PIECE):
            piece = memoryview(model)[start : start + PIECE]
            if not is_zero(piece):
                await base.write(start, piece)
        await base.close()
        await graph.create(top_path, format="qcow2", size=self._size, backing_file="base.qcow2", backing_fmt="qcow2")

    async def _take(self, graph: blocklayer.Graph, disk: blocklayer.Node, guest: Guest, mode: str) -> Verdict:
        """One backup while the guest goes on writing, and everything that proves it."""
        path = self._path(f"{mode}.qcow2")
        async with guest.lock:  # no write is half done: what the model holds is the disk at this instant
            reference = bytes(guest.model)
            started, writes = time.perf_counter(), guest.writes
            job = await graph.backup(disk, path, sync=mode, format="qcow2")
        checks: list[tuple[str, bool]] = []
        if mode == "none":
            await asyncio.sleep(NONE_SECONDS)
            checks += await self._verify(job.target, reference, guest, mode)
            await job.cancel()
        result = await job.wait()
        verdict = Verdict(mode, time.perf_counter() - started, guest.writes - writes, result, checks)
        if mode != "none":
            copy = await graph.open(path, read_only=True)
            verdict.checks += await self._verify(copy, reference, guest, mode)
            await copy.close()
        verdict.checks.append(await self._check_metadata(graph, path))
        return verdict

    async def _verify(self, node: blocklayer.Node, reference: bytes, guest: Guest, mode: str) -> list[tuple[str, bool]]:
        """Bytes, file system, files."""
        copy = bytearray(self._size)
        for start in range(0, self._size, PIECE):
            await node.read_into(start, memoryview(copy)[start : start + PIECE])
        checks = [("every byte", copy == reference)]
        if not guest.files:
            return checks
        path = self._path(f"{mode}.raw")
        await asyncio.to_thread(_write_file, path, copy)
        status, _ = await call("e2fsck", "-fn", path)
        checks.append(("e2fsck", status == 0))
        checks.append(
            (f"checksums of {len(guest.files)} files", await self._files_match(path, guest.checksums(reference)))
        )
        if have("qemu-img") and mode != "none":
            status, _ = await call("qemu-img", "compare", "-U", path, self._path(f"{mode}.qcow2"))
            checks.append(("qemu-img compare", status == 0))
        return checks

    async def _files_match(self, image: str, expected: dict[str, str]) -> bool:
        """Extract all files with debugfs and compare their checksums."""
        out = image + ".files"
        with suppress(FileNotFoundError):
            await asyncio.to_thread(shutil.rmtree, out)
        os.makedirs(out)
        await call("debugfs", "-R", f"rdump / {out}", image)
        actual = {name: await asyncio.to_thread(_checksum, os.path.join(out, name)) for name in expected}
        return actual == expected

    async def _check_metadata(self, graph: blocklayer.Graph, path: str) -> tuple[str, bool]:
        if have("qemu-img"):
            status, _ = await call("qemu-img", "check", "-U", path)
            return "qemu-img check", status == 0
        node = await graph.open(path, format="qcow2", read_only=True, force_share=True, backing=None)
        is_clean = isinstance(node.driver, Qcow2Driver) and (await node.driver.check()).is_clean
        await node.close()
        return "our own check", is_clean

    async def _check_source(self, verdict: Verdict) -> None:
        """The disk itself must have come through, too."""
        async with blocklayer.Graph() as graph:
            name, fine = await self._check_metadata(graph, self._path("vm.qcow2"))
        verdict.checks.append((f"{name}, source", fine))


def _write_file(path: str, data: bytearray) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _checksum(path: str) -> str | None:
    """None if there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
