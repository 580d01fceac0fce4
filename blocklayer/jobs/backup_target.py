"""The target of a backup: an open node of the caller's, or a file that the job opens, and perhaps creates.

    sync   created under     its backing file, as recorded   its backing node while open   if the job fails
    full   a temporary name  none                            none                          removed
    top    a temporary name  the source's backing file       the source's backing node     removed
    none   its final name    the source                      the source                    kept

A created target of sync full or top appears under its final name, complete and durable, or not at all: it is written
beside its final place and renamed. With sync none the target is of use only while the job runs, and at once.
Backing files are recorded by absolute path with their format, and passed to the target as open nodes; no path that is
recorded in an image is opened here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio

from blocklayer.base.errors import BlockError, InUseError, MissingFileError, OptionError, from_os_error
from blocklayer.base.modes import Permission
from blocklayer.graph.block_status import unfiltered
from blocklayer.graph.opener import NodeReference
from blocklayer.jobs.backup_options import BackupOptions, SyncMode, TargetMode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node

FORMAT_DEFAULT = "qcow2"
"""Of a created target, if neither the caller nor its name nor the source says better."""

_PLAIN_FORMATS = frozenset({"raw", "qcow2"})
"""Formats of a source that a full backup takes over; others can be read but are nothing to begin anew."""


class BackupTarget:
    """``node``, and what has to happen to it at the end. ``temporary`` is the file's name now, ``final`` later."""

    def __init__(
        self, node: Node, *, label: str, opened: bool = False, temporary: str | None = None, final: str | None = None,
        is_zero: bool = False,
    ) -> None:  # fmt: skip
        """``opened``: by us, so it is ours to close. ``is_zero``: all of it is known to read as zeroes."""
        self.node = node
        self.label = label
        self.is_zero = is_zero
        self._opened = opened
        self._temporary = temporary
        self._final = final

    async def close(self) -> None:
        """Close a node that we opened, which makes all of it durable; raises if that fails. Closing twice is fine."""
        if self._opened:
            self._opened = False
            await self.node.close()

    async def publish(self) -> None:
        """Give a temporary file its final name, durably."""
        if self._temporary is not None and self._final is not None:
            await asyncio.to_thread(_rename, self._temporary, self._final)
            self._temporary = None

    async def discard(self) -> None:
        """Close, and remove a temporary file."""
        with suppress(BlockError):
            await self.close()
        if self._temporary is not None:
            await asyncio.to_thread(_remove, self._temporary)
            self._temporary = None

    async def release(self) -> None:
        """Whatever happened, hold nothing any more."""
        with suppress(BlockError):
            await self.close()


def subtree(node: Node) -> Iterator[Node]:
    """``node`` and all nodes below it, by whatever role; a node that is used twice comes twice."""
    yield node
    for edge in node.children.values():
        yield from subtree(edge.node)


def check_not_related(source: Node, target: Node) -> None:
    """Raise ``OptionError`` if ``target`` is the source, or the source is made of it."""
    if target is source:
        raise OptionError("source and target cannot be the same", node=source.name)
    if target in subtree(source):
        raise OptionError(f"the target lies in the chain of the source {source.name!r}", node=target.name)


async def open_target(graph: Graph, source: Node, path: str, options: BackupOptions, sync: SyncMode) -> BackupTarget:
    """Create the file if the mode says so, and open it. Nothing is left behind if this raises.

    Raises ``OptionError`` or ``InUseError`` for a file that is open in the graph, and what creating and opening raise.
    """
    await asyncio.to_thread(_check_path, path, list(graph.nodes.values()), list(subtree(source)))
    if options.mode is TargetMode.EXISTING:
        return await _open_existing(graph, source, path, options, sync)
    return await _create(graph, source, path, options, sync)


async def _open_existing(graph: Graph, source: Node, path: str, options: BackupOptions, sync: SyncMode) -> BackupTarget:
    given: dict[str, Any] = dict(options.target_options or {})
    if sync is SyncMode.NONE:
        given["backing"] = NodeReference(source, shares=Permission.ALL & ~Permission.RESIZE)
    node = await graph.open(path, format=options.format, **given)
    return BackupTarget(node, label=path, opened=True)


async def _create(graph: Graph, source: Node, path: str, options: BackupOptions, sync: SyncMode) -> BackupTarget:
    wanted = options.format or _choose_format(graph, source, path, sync)
    backing = source if sync is SyncMode.NONE else source.backing if sync is SyncMode.TOP else None
    created: dict[str, object] = dict(options.target_options or {})
    if backing is not None and backing.filename is not None:
        created["backing_file"] = await asyncio.to_thread(os.path.abspath, backing.filename)
        created["backing_fmt"] = unfiltered(backing).driver.name
    name, temporary = path, None
    if sync is not SyncMode.NONE and await asyncio.to_thread(_replaceable, path):
        await _check_unlocked(graph, path)
        name = temporary = f"{path}.{secrets.token_hex(4)}.part"
    await graph.create(name, format=wanted, size=source.size, **created)
    try:
        children: dict[str, Any] = {}
        if backing is not None:
            shares = Permission.ALL & ~Permission.RESIZE if sync is SyncMode.NONE else None
            children["backing"] = NodeReference(backing, shares=shares)
        node = await graph.open(name, format=wanted, cache=source.options.cache, **children)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await asyncio.to_thread(_remove, name)
        raise
    is_zero = backing is None and node.driver.zero_init
    final = path if temporary is not None else None
    return BackupTarget(node, label=path, opened=True, temporary=temporary, final=final, is_zero=is_zero)


async def _check_unlocked(graph: Graph, path: str) -> None:
    """Raise ``LockedError`` if another process holds the file whose name the target is going to take."""
    try:
        node = await graph.open({"driver": "file", "filename": path})
    except MissingFileError:
        return
    await node.close()


def _choose_format(graph: Graph, source: Node, path: str, sync: SyncMode) -> str:
    """What the name's ending says; else the source's own format, if it can do what the mode needs; else qcow2."""
    ending = os.path.splitext(path)[1].lower()
    by_name = next((name for name, driver in graph.drivers.items() if ending and ending in driver.suffixes), None)
    if by_name is not None:
        return by_name
    own = unfiltered(source).driver.name
    return own if own in _PLAIN_FORMATS and sync is SyncMode.FULL else FORMAT_DEFAULT


def _check_path(path: str, nodes: list[Node], chain: list[Node]) -> None:
    """Refuse a path that is open in the graph: as part of the source, or otherwise."""
    real = os.path.realpath(path)
    for node in nodes:
        if node.filename is not None and os.path.realpath(node.filename) == real:
            if node in chain:
                raise OptionError(f"the target is a file of the source, opened as node {node.name!r}", filename=path)
            raise InUseError(f"the target is open as node {node.name!r}", filename=path)


def _replaceable(path: str) -> bool:
    """Whether a new file can take the place of what has that name: nothing, or a regular file (no device)."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise from_os_error(error, "stat", filename=path) from None


def _rename(temporary: str, final: str) -> None:
    """Rename, and make the directory entry durable."""
    try:
        os.replace(temporary, final)
        descriptor = os.open(os.path.dirname(os.path.abspath(final)), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise from_os_error(error, "rename", filename=final) from None


def _remove(path: str) -> None:
    """Remove a file that may be gone already."""
    with suppress(OSError):
        os.unlink(path)
