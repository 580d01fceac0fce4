"""The suite that every driver runs: what a ``Factory`` is, and what the tests use it for.

A driver keeps the contract of ``blocklayer/graph/driver.py``, or callers above it break in ways that are hard to find.
The tests beside this file check the contract through a ``Node``, as callers see it, one concern a file. Each test runs
once for each factory of ``drivers.py``; a factory says how to open its disk, and what the disk can do (``Can``).

Your own driver
---------------
Write a factory next to your driver:

    from tests.conformance.suite import Can, Factory

    FACTORY = Factory(
        "pattern",
        lambda folder, size: {"driver": "pattern", "size": size},
        can=Can.NOTHING,                       # it cannot be written to
        initial=lambda size: pattern(0, size), # what a new disk reads as, if not zeroes
        drivers={"pattern": PatternDriver},
    )

and run the suite for it alone, from a checkout of blocklayer:

    BLOCKLAYER_FACTORY=yourpackage.conformance:FACTORY python -m pytest tests/conformance

Claim in ``can`` all that your driver does: what is not claimed is not tested.
"""

from __future__ import annotations

import enum
import importlib
import os
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import blocklayer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from blocklayer.graph.driver import Driver
    from blocklayer.graph.node import Node

KIB = 1024
SIZE = 300 * KIB + 512
"""Bytes of most disks: some clusters of 64 KiB and a piece of one, so that the end is inside a cluster."""


class Can(enum.Flag):
    """What a disk can do."""

    NOTHING = 0
    WRITE = enum.auto()
    """It keeps what is written."""
    RESIZE = enum.auto()
    PERSIST = enum.auto()
    """Opened again it has what was written."""
    SPARSE = enum.auto()
    """Block status tells that what was never written is not data."""
    COMPRESS = enum.auto()
    NOWAIT = enum.auto()
    """``try_read`` answers always."""
    STORED = WRITE | RESIZE | PERSIST


async def nothing(graph: blocklayer.Graph, folder: Path, size: int) -> None:
    """There is nothing to create."""


def zeroes(size: int) -> bytes:
    """What most new disks read as."""
    return bytes(size)


@dataclass(frozen=True)
class Factory:
    """One kind of disk.

    ``options(folder, size)``  the block device options that open it
    ``create(graph, folder, size)``  makes what lies in ``folder``, once, before the disk is first opened
    ``initial(size)``  what a new disk reads as
    ``grain``  sizes must be multiples of it
    ``drivers``  drivers that are not built in
    ``check(folder)``  looks at what lies in ``folder`` after the disk was closed; it asserts
    """

    name: str
    options: Callable[[Path, int], Mapping[str, object]]
    can: Can = Can.STORED
    create: Callable[[blocklayer.Graph, Path, int], Awaitable[None]] = nothing
    initial: Callable[[int], bytes] = zeroes
    grain: int = 1
    size: int = SIZE
    drivers: Mapping[str, type[Driver]] = field(default_factory=dict)
    check: Callable[[Path], None] = lambda _folder: None

    def __repr__(self) -> str:
        """The test's id."""
        return self.name


class Bench:
    """A disk to try things on; ``model`` is what it should read as."""

    def __init__(self, factory: Factory, folder: Path, graph: blocklayer.Graph) -> None:
        """Made by ``bench``."""
        self.factory = factory
        self.folder = folder
        self.graph = graph
        self.model = bytearray(factory.initial(factory.size))
        self.disk: Node

    @property
    def size(self) -> int:
        """Bytes of the model."""
        return len(self.model)

    async def open(self, **options: object) -> Node:
        """Open the disk, not only once."""
        wanted: dict[str, Any] = {**self.factory.options(self.folder, self.size), **options}
        self.disk = await self.graph.open(wanted)
        return self.disk

    async def reopen(self, **options: object) -> Node:
        """Close the disk, and open it again."""
        await self.disk.close()
        return await self.open(**options)

    async def write(self, offset: int, data: bytes, flags: blocklayer.WriteFlags = blocklayer.WriteFlags.NONE) -> None:
        """Write to both."""
        await self.disk.write(offset, data, flags)
        self.model[offset : offset + len(data)] = data

    async def write_zeroes(
        self, offset: int, length: int, flags: blocklayer.WriteFlags = blocklayer.WriteFlags.NONE
    ) -> None:
        """Zero in both."""
        await self.disk.write_zeroes(offset, length, flags)
        self.model[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        """Discard, and see what became of it: each byte is as it was, or zero."""
        await self.disk.discard(offset, length)
        now = await self.disk.read(offset, length)
        was = self.model[offset : offset + length]
        assert either(now, was, bytes(length))
        self.model[offset : offset + length] = now

    async def truncate(self, size: int) -> None:
        """Cut or extend both."""
        await self.disk.truncate(size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    async def fill(self, seed: int = 1) -> None:
        """Data everywhere, no byte of it zero."""
        await self.write(0, noise(self.size, seed))

    async def agree(self) -> None:
        """Disk and model have the same size and the same bytes."""
        assert self.disk.size == self.size
        assert difference(await self.disk.read(0, self.size), bytes(self.model)) is None


def noise(length: int, seed: int = 1) -> bytes:
    """Bytes that repeat nowhere, without a zero."""
    return random.Random(seed).randbytes(length).replace(b"\0", b"\1")


def difference(actual: bytes, expected: bytes) -> str | None:
    """Where two long strings differ first: readable, other than pytest's own account of it."""
    if actual == expected:
        return None
    if len(actual) != len(expected):
        return f"{len(actual)} bytes, not {len(expected)}"
    at = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
    return f"at {at}: {actual[at : at + 16].hex()}, not {expected[at : at + 16].hex()}"


def either(actual: bytes, *allowed: bytes | bytearray) -> bool:
    """Whether each byte is that of one of ``allowed``; whole disks at once, as long numbers."""
    whole = int.from_bytes(actual, "big")
    unlike = (1 << 8 * len(actual)) - 1
    for choice in allowed:
        assert len(choice) == len(actual)
        differing = (whole ^ int.from_bytes(choice, "big")).to_bytes(len(actual), "big").translate(_NONZERO)
        unlike &= int.from_bytes(differing, "big")
    return not unlike


_NONZERO = bytes([0] + [1] * 255)
"""For ``translate``: 0 where bytes agree, 1 where they do not."""


@asynccontextmanager
async def bench(factory: Factory, folder: Path, **options: object) -> AsyncIterator[Bench]:
    """A new disk; everything is closed at the end, and what was stored is checked."""
    async with blocklayer.Graph(drivers=factory.drivers, gate=blocklayer.Gate.within(folder)) as graph:
        made = Bench(factory, folder, graph)
        await factory.create(graph, folder, factory.size)
        await made.open(**options)
        yield made
    factory.check(folder)


def chosen() -> tuple[Factory, ...]:
    """The factories to run: those of the project, or the one that the environment names."""
    named = os.environ.get("BLOCKLAYER_FACTORY")
    if named:
        module, _, attribute = named.partition(":")
        factory: Factory = getattr(importlib.import_module(module), attribute or "FACTORY")
        return (factory,)
    from tests.conformance.drivers import FACTORIES

    return FACTORIES


def drivers_that(can: Can) -> pytest.MarkDecorator:
    """Run a test for each factory whose disk can do all of ``can``."""
    return pytest.mark.parametrize("factory", [f for f in chosen() if can in f.can], ids=repr)


def drivers_that_cannot(can: Can) -> pytest.MarkDecorator:
    """Run a test for each factory whose disk can do none of ``can``."""
    return pytest.mark.parametrize("factory", [f for f in chosen() if not can & f.can], ids=repr)


every_driver = drivers_that(Can.NOTHING)
