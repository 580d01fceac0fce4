"""The smallest file driver and format with a backing file: for tests of what jobs do to target files.

``file`` holds a whole file in memory and writes it out when it is flushed; ``tiny`` keeps a scripted disk in it, as one
line of JSON (size, backing file) and the bytes and kinds of its sectors. Both are synchronous inside.
"""

from __future__ import annotations

import json
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blocklayer.base.errors import LockedError, MissingFileError
from blocklayer.base.units import SECTOR, parse_size
from blocklayer.drivers.memory import MemoryDriver
from blocklayer.graph.driver import Driver
from blocklayer.graph.gate import Gate
from blocklayer.graph.graph import Graph
from tests.helpers.scripted import NoEngine, ScriptedDriver, ScriptedOptions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Self

    from blocklayer.base.modes import Permission, WriteFlags
    from blocklayer.base.options import Options
    from blocklayer.graph.opener import CreateContext, Opener


class TinyFile(MemoryDriver):
    """A file; one that has a neighbour ``NAME.lock`` is held by "another process"."""

    name = "file"
    growable = True

    def __init__(self, path: Path, *, create: bool) -> None:
        """Read it all."""
        super().__init__(0)
        if path.with_name(path.name + ".lock").exists():
            raise LockedError("held by another process", filename=str(path))
        if not create and not path.exists():
            raise MissingFileError("no such file", filename=str(path))
        self.path = path
        self._bytes = bytearray() if create else bytearray(path.read_bytes())
        if create:
            path.write_bytes(b"")

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:  # noqa: ARG003
        """Options: ``filename``, ``create``."""
        return cls(Path(str(options["filename"])), create=bool(options.get("create")))

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Grow as needed."""
        self._bytes.extend(bytes(max(0, offset - len(self._bytes))))
        await super().write(offset, data, flags)

    async def flush(self) -> None:
        """Write it out."""
        self.path.write_bytes(self._bytes)


class TinyFormat(ScriptedDriver):
    """A scripted disk in a file."""

    name = "tiny"
    is_format = True
    suffixes = (".tiny",)
    zero_init = True
    create_options: dict[str, object] = {}  # noqa: RUF012 - the last call's, for tests to look at

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:  # noqa: ARG003
        """Children: ``file``, and ``backing`` as given, else as the header says."""
        file = await opener.child("file")
        line, _, rest = bytes(await file.read(0, file.size)).partition(b"\n")
        header = json.loads(line)
        driver = cls(ScriptedOptions(header["size"]))
        driver.header = line
        driver.bytes[:] = rest[: driver.size]
        driver.kinds[:] = rest[driver.size :]
        if await opener.optional_child("backing") is None and header["backing"]:
            await opener.reference("backing", header["backing"], format=header["format"])
        return driver

    header: bytes

    @classmethod
    async def create(cls, options: Options, context: CreateContext) -> None:
        """Options: ``size``, ``backing_file``, ``backing_fmt``."""
        given = {key.replace("-", "_"): value for key, value in options.items()}
        cls.create_options = dict(given)
        size = parse_size(given["size"])  # type: ignore[arg-type]  # a number or text
        header = {"size": size, "backing": given.get("backing_file"), "format": given.get("backing_fmt")}
        text = json.dumps(header).encode() + b"\n" + bytes(size + size // SECTOR)
        file = await context.create_file(context.filename)
        await file.write(0, memoryview(text))

    @classmethod
    def child_permissions(cls, role: str, *, writable: bool) -> tuple[Permission, Permission]:
        """As any format."""
        return Driver.child_permissions(role, writable=writable)

    @property
    def cluster_size(self) -> int | None:
        """It tells one."""
        return 4096

    @property
    def backing_reference(self) -> str | None:
        """From the header."""
        reference = json.loads(self.header)["backing"]
        return None if reference is None else str(reference)

    async def flush(self) -> None:
        """Write all of it into the file."""
        await self._step("flush", 0, 0)
        await self.children["file"].write(0, memoryview(self.header + b"\n" + self.bytes + self.kinds))
        await self.children["file"].flush()


@asynccontextmanager
async def tiny_graph() -> AsyncIterator[Graph]:
    """A graph that knows tiny images, files, and scripted disks."""
    drivers: dict[str, type[Driver]] = {"tiny": TinyFormat, "file": TinyFile, "scripted": ScriptedDriver}
    async with Graph(drivers, engine=NoEngine, gate=Gate.anywhere()) as graph:  # type: ignore[arg-type]
        yield graph


def names(folder: Path) -> set[str]:
    """What is in a folder."""
    return set(os.listdir(folder))
