"""The demo's disk: a real ext4 file system with files whose contents are known, and a guest that keeps changing it.

The guest changes whole files in place and writes at random into one large scratch file, so the file system stays sound
while its data change all the time. ``model`` is what the disk holds after each write that has completed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
from dataclasses import dataclass, field

import blocklayer
from blocklayer.base.units import KIB, MIB
from blocklayer.cli.parser import FailureError

BLOCK = 4 * KIB
DIRECTORIES, FILES_EACH = 4, 8
SCRATCH = "scratch.dat"
BATCH = 8
"""Writes that the guest has in flight at once."""


def have(*programs: str) -> bool:
    """Whether all of ``programs`` can be run."""
    return all(find(program) for program in programs)


def find(program: str) -> str | None:
    """Where it is; also in the directories of system programs."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    return shutil.which(program, path=path)


async def call(*command: str) -> tuple[int, str]:
    """Run a program; answers its exit status and everything that it printed."""
    program = find(command[0]) or command[0]
    done = await asyncio.to_thread(
        subprocess.run, (program, *command[1:]), capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@dataclass(slots=True)
class Guest:
    """Changes ``node``; counts what it did. ``files`` maps names to their blocks; ``lock`` is free between writes."""

    model: bytearray
    files: dict[str, list[int]]
    scratch: list[int]
    source: random.Random
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    writes: int = 0
    files_changed: int = 0

    def content(self, name: str, disk: bytes | bytearray | None = None) -> bytes:
        """What a file holds on ``disk`` (default: now)."""
        image = self.model if disk is None else disk
        return b"".join(image[block * BLOCK : (block + 1) * BLOCK] for block in self.files[name])

    def checksums(self, disk: bytes) -> dict[str, str]:
        """SHA-256 of every file on ``disk``."""
        return {name: hashlib.sha256(self.content(name, disk)).hexdigest() for name in self.files}

    async def run(self, node: blocklayer.Node) -> None:
        """Write until cancelled, leaving the event loop to others after each batch."""
        while True:
            async with self.lock:
                blocks = self._choose()
                await asyncio.gather(*(self._write(node, block) for block in blocks))
            await asyncio.sleep(0)

    def _choose(self) -> list[int]:
        if self.files and self.source.random() < 0.2:
            self.files_changed += 1
            return self.files[self.source.choice(list(self.files))]
        return self.source.sample(self.scratch, BATCH)

    async def _write(self, node: blocklayer.Node, block: int) -> None:
        data = self.source.randbytes(BLOCK)
        await node.write(block * BLOCK, data)
        self.model[block * BLOCK : (block + 1) * BLOCK] = data
        self.writes += 1


async def make_disk(path: str, size: int, seed: int) -> tuple[bytearray, dict[str, list[int]], list[int]]:
    """Fill ``path`` with an ext4 file system (or, without mkfs.ext4, with random data); answers model, files, scratch."""
    source = random.Random(seed)  # noqa: S311 - repeatable, not secret
    if not have("mkfs.ext4", "debugfs"):
        model = bytearray(source.randbytes(size // 4) + bytes(size - size // 4))
        with open(path, "wb") as file:  # noqa: ASYNC230 - the demo's set-up, before anything runs
            file.write(model)
        return model, {}, list(range(size // BLOCK // 2))
    tree = path + ".tree"
    names = await asyncio.to_thread(_make_tree, tree, source, size // 4)
    status, text = await call("mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-d", tree, path, str(size // KIB) + "k")
    if status:
        raise FailureError(f"mkfs.ext4 could not make the demo's disk: {text.strip()}")
    shutil.rmtree(tree)
    files = {name: await file_blocks(path, name) for name in names}
    with open(path, "rb") as file:  # noqa: ASYNC230 - the demonstration alone has this loop
        model = bytearray(file.read())
    return model, files, await file_blocks(path, SCRATCH)


def _make_tree(tree: str, source: random.Random, scratch: int) -> list[str]:
    names = []
    for number in range(DIRECTORIES):
        os.makedirs(f"{tree}/dir{number}")
        for member in range(FILES_EACH):
            names.append(f"dir{number}/file{member}.bin")
            with open(f"{tree}/{names[-1]}", "wb") as file:
                file.write(source.randbytes(BLOCK * source.randrange(1, 64)))
    with open(f"{tree}/{SCRATCH}", "wb") as file:
        file.writelines(source.randbytes(MIB) for _ in range(scratch // MIB))
    return names


async def file_blocks(image: str, name: str) -> list[int]:
    """The file system blocks of a file, in order."""
    _, text = await call("debugfs", "-R", f"blocks /{name}", image)
    return [int(word) for word in text.split() if word.isdigit()]
