"""``blocklayer info``: what an image is; output as qemu-img info's, human and JSON.

Without ``--backing-chain`` only the image itself is opened, neither its backing file nor a data file: what its header
names is printed and not touched.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, cast

import blocklayer
from blocklayer.base.options import JSON_PREFIX
from blocklayer.cli.common import (
    add_output_argument,
    add_source_arguments,
    disk_size,
    dump_json,
    human_size,
    open_image,
    virtual_size,
)
from blocklayer.drivers.qcow2 import Qcow2Driver

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from blocklayer.codec.qcow2.snapshots import Snapshot

Facts = dict[str, object]

NO_DATA_FILE = {"driver": "null-co", "size": 0}
"""Stands in for a data file that is not opened."""

NANOSECONDS = 1_000_000_000


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add_source_arguments(parser, "--format")
    add_output_argument(parser)
    parser.add_argument("--backing-chain", action="store_true", help="the image and all that lie below")
    parser.add_argument("file", metavar="FILE")
    parser.set_defaults(run=run)


async def run(args: argparse.Namespace) -> int:
    """Print it."""
    async with blocklayer.Graph() as graph:
        top = await (_open_chain if args.backing_chain else _open_alone)(graph, args)
        facts = [await describe(node) for node in (_chain(top) if args.backing_chain else (top,))]
    if args.output == "json":
        print(dump_json(facts if args.backing_chain else facts[0]))
    else:
        print("\n\n".join(as_text(each) for each in facts))
    return 0


async def _open_chain(graph: blocklayer.Graph, args: argparse.Namespace) -> blocklayer.Node:
    return await open_image(graph, args.file, args, format=args.source_format)


async def _open_alone(graph: blocklayer.Graph, args: argparse.Namespace) -> blocklayer.Node:
    """The image, and nothing that its header names."""
    format, deny = args.source_format, blocklayer.Gate.deny()
    try:
        return await open_image(graph, args.file, args, format=format, gate=deny, backing=None)
    except blocklayer.ReferenceRefusedError:
        return await open_image(
            graph, args.file, args, format=format, gate=deny, backing=None, data_file=dict(NO_DATA_FILE)
        )


def _chain(top: blocklayer.Node) -> Iterator[blocklayer.Node]:
    node: blocklayer.Node | None = top
    while node is not None:
        yield node
        node = node.backing


async def describe(node: blocklayer.Node) -> Facts:
    """The facts of one image; keys as in QEMU's ImageInfo."""
    driver = node.driver
    facts: Facts = {
        "virtual-size": virtual_size(node),
        "filename": node.filename or node.name,
        "format": driver.name,
    }
    actual = disk_size(node.filename)
    if actual is not None:
        facts["actual-size"] = actual
    if driver.cluster_size is not None:
        facts["cluster-size"] = driver.cluster_size
    if isinstance(driver, Qcow2Driver):
        facts["dirty-flag"] = driver.image.header.is_dirty
        if snapshots := await driver.snapshots():
            facts["snapshots"] = [_snapshot(each) for each in snapshots]
    specific = await driver.info()
    if specific:
        facts["format-specific"] = {"type": driver.name, "data": dict(specific)}
    if driver.backing_reference is not None:
        facts |= _backing(driver.backing_reference, node.filename)
        recorded = getattr(driver, "backing_format", None)
        if recorded is not None:
            facts["backing-filename-format"] = recorded
    facts.setdefault("dirty-flag", False)
    return facts


def _backing(reference: str, image: str | None) -> Facts:
    full = reference
    if not reference.startswith(JSON_PREFIX):
        full = os.path.join(os.path.dirname(image or ""), reference.removeprefix("file:"))
    return {"backing-filename": reference, "full-backing-filename": full}


def _snapshot(snapshot: Snapshot) -> Facts:
    """Keys as in QEMU's SnapshotInfo."""
    facts: Facts = {
        "id": snapshot.identifier.decode(errors="surrogateescape"),
        "name": snapshot.name.decode(errors="surrogateescape"),
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_s,
        "date-nsec": snapshot.date_ns,
        "vm-clock-sec": snapshot.guest_clock_ns // NANOSECONDS,
        "vm-clock-nsec": snapshot.guest_clock_ns % NANOSECONDS,
    }
    if snapshot.instructions is not None:
        facts["icount"] = snapshot.instructions
    return facts


def as_text(facts: Mapping[str, object]) -> str:
    """The same for people."""
    size = cast("int", facts["virtual-size"])
    actual = cast("int | None", facts.get("actual-size"))
    lines = [
        f"image: {facts['filename']}",
        f"file format: {facts['format']}",
        f"virtual size: {human_size(size)} ({size} bytes)",
        f"disk size: {'unavailable' if actual is None else human_size(actual)}",
    ]
    if "cluster-size" in facts:
        lines.append(f"cluster_size: {facts['cluster-size']}")
    if facts["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "backing-filename" in facts:
        name, full = facts["backing-filename"], facts["full-backing-filename"]
        lines.append(f"backing file: {name}" + (f" (actual path: {full})" if full != name else ""))
    if "backing-filename-format" in facts:
        lines.append(f"backing file format: {facts['backing-filename-format']}")
    if "snapshots" in facts:
        lines += _snapshot_table(cast("Sequence[Facts]", facts["snapshots"]))
    if "format-specific" in facts:
        specific = cast("Mapping[str, Facts]", facts["format-specific"])
        lines += ["Format specific information:", *_tree(specific["data"], "    ")]
    return "\n".join(lines)


def _snapshot_table(snapshots: Sequence[Facts]) -> Iterator[str]:
    columns = "{:<9} {:<16} {:>8}{:>20}{:>13}{:>11}"
    yield "Snapshot list:"
    yield columns.format("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    for each in snapshots:
        clock = cast("int", each["vm-clock-sec"])
        milliseconds = cast("int", each["vm-clock-nsec"]) // 1_000_000
        yield columns.format(
            str(each["id"]),
            str(each["name"]),
            human_size(cast("int", each["vm-state-size"])),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(cast("int", each["date-sec"]))),
            f"{clock // 3600:02}:{clock // 60 % 60:02}:{clock % 60:02}.{milliseconds:03}",
            str(each.get("icount", "")),
        )


def _tree(value: object, indent: str) -> Iterator[str]:
    """Nested facts, four columns deeper with each level; members of lists by their number."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else ((f"[{at}]", one) for at, one in enumerate(cast("list[object]", value)))
    )
    for key, inner in pairs:
        label = f"{indent}{key.replace('-', ' ')}:"
        if isinstance(inner, dict | list):
            yield label
            yield from _tree(inner, indent + "    ")
        else:
            yield f"{label} {str(inner).lower() if isinstance(inner, bool) else inner}"
