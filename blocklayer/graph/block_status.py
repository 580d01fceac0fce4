"""Block status over a backing chain: which layer answers for a range, and how it reads.

A walk goes down from the top. A layer that says "unallocated" passes the question to its backing node; filters pass it
on without counting as a layer. A backing node that is shorter than the range leaves zeroes behind its end; these count
as zeroes of the layer above it, because nothing below can change them. The bottom's unallocated ranges read as zeroes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from blocklayer.base.errors import NotFoundError, OutOfRangeError
from blocklayer.base.extents import Extent, ExtentKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from blocklayer.graph.node import Node


def layers(top: Node, base: Node | None = None) -> Iterator[Node]:
    """The nodes of a chain that hold data, from ``top`` down to, not including, ``base`` (default: all).

    Filters are passed over. Raises ``NotFoundError`` if ``base`` is not in the chain.
    """
    node: Node | None = top
    base = base if base is None else unfiltered(base)
    while node is not None:
        node = unfiltered(node)
        if node is base:
            return
        yield node
        node = node.backing
    if base is not None:
        raise NotFoundError(f"node {base.name!r} is not in the backing chain of {top.name!r}")


def unfiltered(node: Node) -> Node:
    """The first node at or below ``node`` that is no filter."""
    while node.driver.is_filter:
        node = node.driver.children["file"].node
    return node


async def layer_status(node: Node, offset: int, length: int) -> Extent:
    """Status in the layer that ``node`` is (or filters), labelled with its name."""
    layer = unfiltered(node)
    status = await layer.path.block_status(offset, length)
    return replace(status, node=layer.name)


async def allocation_status(top: Node, offset: int, length: int, *, base: Node | None = None) -> Extent:
    """Status of the layers from ``top`` down to, not including, ``base`` (None: all); UNALLOCATED if none holds the range.

    The answer starts at ``offset`` and is at most ``length`` long.
    """
    if offset < 0 or length <= 0 or offset + length > top.size:
        message = f"request outside the node's {top.size} bytes"
        raise OutOfRangeError(message, node=top.name, offset=offset, length=length)
    above = top
    chain = layers(top) if base is None else tuple(layers(top, base))  # all of it, so that a wrong base is found
    for depth, layer in enumerate(chain):
        inside = layer.size - offset
        if inside <= 0:
            return Extent(offset, length, ExtentKind.ZERO, depth - 1, above.name, present=False)
        status = await layer.path.block_status(offset, min(length, inside))
        length = status.length
        if status.is_allocated:
            return replace(status, depth=depth, node=layer.name)
        above = layer
    return Extent(offset, length, ExtentKind.UNALLOCATED)


async def chain_status(top: Node, offset: int, length: int, *, base: Node | None = None) -> Extent:
    """``allocation_status``, but for a whole chain (no ``base``) what no layer holds is the bottom's ZERO."""
    status = await allocation_status(top, offset, length, base=base)
    if base is not None or status.is_allocated:
        return status
    *_, (depth, bottom) = enumerate(layers(top))
    return replace(status, kind=ExtentKind.ZERO, depth=depth, node=bottom.name, present=False)


async def chain_extents(top: Node, offset: int, length: int, *, base: Node | None = None) -> AsyncIterator[Extent]:
    """All extents of ``[offset, offset + length)``, neighbours with the same status joined."""
    end = offset + length
    pending: Extent | None = None
    while offset < end:
        extent = await chain_status(top, offset, end - offset, base=base)
        offset = extent.end
        if pending is not None and pending.joins(extent):
            pending = pending.joined(extent)
            continue
        if pending is not None:
            yield pending
        pending = extent
    if pending is not None:
        yield pending
