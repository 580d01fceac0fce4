"""``blocklayer info``: what an image is; output as qemu-img info's, human and JSON.

Without ``--backing-chain`` only the image itself is opened, neither its backing file nor a data file: what its header
names is printed and not touched.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import blocklayer
from blocklayer.cli.common import (
    add_output_argument,
    add_source_arguments,
    disk_size,
    dump_json,
    human_size,
    open_image,
)

if TYPE_CHECKING:
    import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Arguments."""
    parser = commands.add_parser("info", help="what an image is")
    add_source_arguments(parser)
    add_output_argument(parser)
    parser.add_argument("--backing-chain", action="store_true", help="the image and all that lie below")
    parser.add_argument("file")
    parser.set_defaults(run=run)


async def run(args: argparse.Namespace) -> int:
    """Print it."""
    async with blocklayer.Graph() as graph:
        top = await _open(graph, args)
        facts = [describe(node) for node in _chain(top)] if args.backing_chain else [describe(top)]
    if args.output == "json":
        print(dump_json(facts if args.backing_chain else facts[0]))
    else:
        print("\n\n".join(as_text(each) for each in facts))
    return 0


async def _open(graph: blocklayer.Graph, args: argparse.Namespace) -> blocklayer.Node:
    if args.backing_chain or args.image_opts:
        return await open_image(graph, args.file, args, format=args.source_format)
    extra: dict[str, Any] = {}
    format = args.source_format or await graph.probe(args.file)
    if format == "qcow2":
        extra = {"backing": None, "data_file": {"driver": "null-co", "size": 0}}
        if not await _has_data_file(graph, args):
            del extra["data_file"]
    return await open_image(graph, args.file, args, format=format, **extra)


async def _has_data_file(graph: blocklayer.Graph, args: argparse.Namespace) -> bool:
    """Whether the header names a data file; told by opening with one that is not needed."""
    try:
        node = await open_image(
            graph, args.file, args, format="qcow2", backing=None, data_file={"driver": "null-co", "size": 0}
        )
    except blocklayer.OptionError:
        return False
    await node.close()
    return True


def _chain(top: blocklayer.Node) -> list[blocklayer.Node]:
    chain, node = [], top
    while node is not None:
        chain.append(node)
        below = node.backing
        if below is None:
            break
        node = below
    return chain


def describe(node: blocklayer.Node) -> dict[str, object]:
    """The facts of one image; keys as in QEMU's ImageInfo."""
    driver = node.driver
    facts: dict[str, object] = {
        "virtual-size": node.size,
        "filename": node.filename or node.name,
        "format": driver.name,
    }
    actual = disk_size(node.filename)
    if actual is not None:
        facts["actual-size"] = actual
    if driver.cluster_size is not None:
        facts["cluster-size"] = driver.cluster_size
    specific = driver.info()
    if specific:
        facts["format-specific"] = {"type": driver.name, "data": dict(specific)}
    if driver.backing_reference is not None:
        facts["backing-filename"] = driver.backing_reference
        directory = os.path.dirname(node.filename or "")
        facts["full-backing-filename"] = os.path.join(directory, driver.backing_reference)
        recorded = getattr(driver, "backing_format", None)
        if recorded is not None:
            facts["backing-filename-format"] = recorded
    facts["dirty-flag"] = bool(getattr(driver, "is_dirty", False))
    return facts


def as_text(facts: dict[str, object]) -> str:
    """The same for people."""
    size = facts["virtual-size"]
    lines = [
        f"image: {facts['filename']}",
        f"file format: {facts['format']}",
        f"virtual size: {human_size(int(str(size)))} ({size} bytes)",
        f"disk size: {human_size(int(str(facts['actual-size']))) if 'actual-size' in facts else 'unavailable'}",
    ]
    if facts["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "cluster-size" in facts:
        lines.append(f"cluster_size: {facts['cluster-size']}")
    if "backing-filename" in facts:
        name, full = facts["backing-filename"], facts["full-backing-filename"]
        lines.append(f"backing file: {name}" + (f" (actual path: {full})" if full != name else ""))
    if "backing-filename-format" in facts:
        lines.append(f"backing file format: {facts['backing-filename-format']}")
    specific = facts.get("format-specific")
    if isinstance(specific, dict):
        lines.append("Format specific information:")
        for key, value in specific["data"].items():
            shown = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"    {key.replace('-', ' ')}: {shown}")
    return "\n".join(lines)
