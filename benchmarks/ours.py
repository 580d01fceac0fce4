"""Our side: a graph on the engine that was asked for, and the pieces that several scenarios share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import blocklayer
from blocklayer.aio.threads import ThreadEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from blocklayer.aio.engine import Engine

ENGINES: Mapping[str, Callable[[], Engine]] = {"threads": ThreadEngine}


def graph(engine: str) -> blocklayer.Graph:
    """A graph that may follow any backing file, on the engine called ``engine``."""
    return blocklayer.Graph(engine=ENGINES[engine])


async def open_disk(graph: blocklayer.Graph, path: Path, image_format: str, *, unsafe: bool) -> blocklayer.Node:
    """Open for reading and writing; ``unsafe``: flushes are ignored."""
    return await graph.open(path, format=image_format, cache="unsafe" if unsafe else "writeback")
