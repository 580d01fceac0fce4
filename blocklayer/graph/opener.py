"""What a driver gets to open itself with: its children, the I/O engine, the flags, and the gate.

Children that the caller named in options are opened as they are named. What the image's own header refers to is opened
only by ``reference``, which asks the gate, refuses loops and chains that are too deep, and never guesses a format.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blocklayer.base.errors import ChainError, MissingFileError, OptionError, UnknownFormatError
from blocklayer.base.options import Options, parse_json
from blocklayer.graph.child import Child
from blocklayer.graph.node import Node

if TYPE_CHECKING:
    from blocklayer.aio.engine import Engine
    from blocklayer.base.modes import Permission
    from blocklayer.graph.driver import Driver
    from blocklayer.graph.gate import Gate
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node_options import NodeOptions

CHAIN_DEPTH_MAX = 100
"""Deepest chain of nodes: each level costs a handful of stack frames, and Python allows about 1000."""


@dataclass(frozen=True, slots=True)
class Ancestry:
    """The way from the top down to a node that is being opened: real paths of the image files on it."""

    paths: tuple[str, ...] = ()
    depth: int = 0

    def below(self, path: str | None) -> Ancestry:
        """One level deeper; raises ``ChainError`` if ``path`` is on the way already, or the way is too long."""
        if self.depth >= CHAIN_DEPTH_MAX:
            raise ChainError(f"the chain is deeper than {CHAIN_DEPTH_MAX} nodes", filename=path)
        real = None if path is None else os.path.realpath(path)
        if real is not None and real in self.paths:
            raise ChainError("its backing chain comes back to it: a loop", filename=path)
        return Ancestry(self.paths if real is None else (*self.paths, real), self.depth + 1)


class PendingOwner:
    """Owner of the edges of a node that is being opened, until the node exists."""

    def __init__(self, name: str, driver: type[Driver]) -> None:
        """Stand in for the node called ``name``."""
        self.name = name
        self.driver = driver
        self.drained = 0
        """How many drained sections of its children are under way; the node takes them over."""

    def describe(self) -> str:
        """Like the node it stands for."""
        return f"node {self.name!r}"

    def drain_begin(self) -> None:
        """Nothing can be in flight, but the node must know when it is there."""
        self.drained += 1

    async def drain_wait(self) -> None:
        """Nothing can be in flight."""

    def drain_end(self) -> None:
        """Undo one ``drain_begin``."""
        self.drained -= 1


@dataclass(frozen=True, slots=True)
class NodeReference:
    """An open node as a child option, with what its edge shares (default: what the parent's driver says).

    A target whose backing node is the live source needs it: its edge must let the source be written.
    """

    node: Node
    shares: Permission | None = None


class Opener:
    """One per driver that is being opened. ``filename`` is what the node is opened from, if it has a name."""

    def __init__(
        self,
        graph: Graph,
        owner: PendingOwner,
        options: NodeOptions,
        children: Mapping[str, object],
        *,
        gate: Gate,
        ancestry: Ancestry,
    ) -> None:
        """Made by the graph."""
        self.graph = graph
        self.options = options
        self.gate = gate
        self.ancestry = ancestry
        self.opened: dict[str, Child] = {}
        self.filename: str | None = None
        self._owner = owner
        self._children = dict(children)

    @property
    def node_name(self) -> str:
        """The name that the node will have."""
        return self._owner.name

    @property
    def engine(self) -> Engine:
        """The graph's I/O engine."""
        return self.graph.engine

    @property
    def read_only(self) -> bool:
        """Whether the node refuses writes."""
        return self.options.read_only

    def has(self, role: str) -> bool:
        """Whether the caller named a child for ``role``, or said explicitly that there is none."""
        return role in self._children

    def unused(self) -> set[str]:
        """Roles that the caller named and no driver asked for."""
        return self._children.keys() - self.opened.keys() - {role for role, v in self._children.items() if not v}

    async def child(self, role: str, *, writable: bool | None = None) -> Child:
        """Open the child that the caller's options name. Raises ``OptionError`` if they name none."""
        edge = await self.optional_child(role, writable=writable)
        if edge is None:
            raise OptionError(f"option {role!r} is required: the node or options of the child")
        return edge

    async def optional_child(self, role: str, *, writable: bool | None = None) -> Child | None:
        """The same; None if the caller named none, or None."""
        value = self._children.get(role)
        if not value:
            return None
        ancestry = self.ancestry
        if role == "backing" and isinstance(value, Mapping):
            ancestry = ancestry.below(filename_of(value))
        return await self._attach(role, value, ancestry=ancestry, writable=writable)

    async def reference(
        self,
        role: str,
        text: str,
        *,
        format: str | None,
        writable: bool = False,  # noqa: A002 - the field's word
    ) -> Child:
        """Open what the image's header calls ``text``, through the gate; ``format`` is what the image records.

        Raises ``ReferenceRefusedError``, ``ChainError``, ``UnknownFormatError``, and ``MissingFileError`` naming both files.
        """
        if self.gate.allows_json(text):
            options: Options = parse_json(text)
            path = filename_of(options)
            ancestry = self.ancestry.below(path)
        else:
            path = self.gate.check(text, image=self.filename, role=role)
            ancestry = self.ancestry.below(path)
            options = {"driver": await self._format(path, format, role), "file": {"driver": "file", "filename": path}}
            if options["driver"] == "file":
                options = {"driver": "file", "filename": path}
        try:
            return await self._attach(role, options, ancestry=ancestry, writable=writable)
        except MissingFileError as error:
            if error.filename == path:  # else it is missing further down, and named already
                error.message = f"{role} file {text!r} of {self.filename!r} does not exist"
            raise

    async def _format(self, path: str, recorded: str | None, role: str) -> str:
        if recorded is not None:
            return recorded
        if self.gate.probe:
            return await self.graph.probe(path)
        message = f"it names {path!r} as {role} file without its format, and content is not to be trusted for that"
        raise UnknownFormatError(
            message + "; record a format in the image, or use a gate with probe=True", filename=self.filename
        )

    async def _attach(self, role: str, value: object, *, ancestry: Ancestry, writable: bool | None) -> Child:
        if writable is None:
            writable = role != "backing" and not self.read_only
        needs, shares = self._owner.driver.child_permissions(role, writable=writable)
        if isinstance(value, NodeReference):
            shares = shares if value.shares is None else value.shares
            value = value.node
        inherited = replace(self.options, read_only=not writable)
        node, fresh = await self.graph.resolve(value, inherited=inherited, gate=self.gate, ancestry=ancestry)
        try:
            edge = Child(self._owner, role, node, needs, shares)
        except BaseException:
            if fresh:
                await self.graph.release_unused(node)
            raise
        self.opened[role] = edge
        return edge


def filename_of(options: Mapping[str, object]) -> str | None:
    """The file name in block device options: their own, or that of the "file" child."""
    name = options.get("filename")
    if isinstance(name, str):
        return name
    inner = options.get("file")
    return filename_of(inner) if isinstance(inner, Mapping) else None


@dataclass(frozen=True, slots=True)
class CreateContext:
    """What a format's ``create`` works with; it checks its options before it asks for the first file.

    ``create_file(name)`` makes or empties a file, ``filename`` being the image's own; ``backing_size(name, format)`` is
    the size of an image that the new one will refer to.
    """

    filename: str
    create_file: Callable[[str], Awaitable[Child]]
    backing_size: Callable[[str, str | None], Awaitable[int]]
