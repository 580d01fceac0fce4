"""What commands share: arguments that name an image, opening it as users of qemu-img expect, sizes, JSON.

Without ``-f`` the content decides the format, and plain backing file names are followed wherever they point, because
that is what these users know. ``json:`` references inside images and protocols are refused unless ``--trust`` is given.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import blocklayer
from blocklayer.base.options import JSON_PREFIX, parse_options
from blocklayer.base.ranges import align_up
from blocklayer.base.units import SECTOR
from blocklayer.cli.parser import FailureError

if TYPE_CHECKING:
    import argparse

CACHE_MODES = tuple(mode.value for mode in blocklayer.CacheMode)
FILE_PREFIX = "file:"


def add_source_arguments(parser: argparse.ArgumentParser, *names: str) -> None:
    """-f (and ``names``, its long spellings), -U, --image-opts, --trust."""
    parser.add_argument(
        "-f", *names, dest="source_format", metavar="FMT", help="format of the image (default: its content decides)"
    )
    parser.add_argument("-U", "--force-share", action="store_true", help="read although somebody may be writing")
    parser.add_argument("--image-opts", action="store_true", help="FILE is driver=...,file.filename=...")
    parser.add_argument("--trust", action="store_true", help="follow whatever the image refers to, json: strings too")


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """--output human|json."""
    parser.add_argument("--output", choices=("human", "json"), default="human", help="how to print (default: human)")


def add_cache_argument(parser: argparse.ArgumentParser, *names: str) -> None:
    """How to read images, by default through the page cache."""
    parser.add_argument(
        *names,
        dest="cache",
        metavar="CACHE",
        default="writeback",
        help=f"{', '.join(CACHE_MODES)} (default: writeback)",
    )


def gate(args: argparse.Namespace) -> blocklayer.Gate:
    """What image headers may refer to."""
    return blocklayer.Gate.permissive() if getattr(args, "trust", False) else blocklayer.Gate.anywhere(probe=True)


async def open_image(
    graph: blocklayer.Graph,
    name: str,
    args: argparse.Namespace,
    *,
    format: str | None = None,
    read_only: bool = True,
    **options: object,
) -> blocklayer.Node:
    """Open what the user named, as ``args`` of ``add_source_arguments`` say. Raises what ``Graph.open`` raises."""
    force_share = read_only and args.force_share
    cache = getattr(args, "cache", "writeback")
    if cache not in CACHE_MODES:
        raise blocklayer.OptionError(f"Invalid cache option: {cache}; it is one of {', '.join(CACHE_MODES)}")
    wanted: dict[str, Any] = {"read_only": read_only, "force_share": force_share, "cache": cache, **options}
    wanted.setdefault("gate", gate(args))
    if args.image_opts and format is not None:
        raise FailureError("--image-opts and -f exclude each other; say driver=... in the options")
    if args.image_opts or name.startswith(JSON_PREFIX):
        return await graph.open(await _with_drivers(graph, parse_options(name)), **wanted)
    path = name.removeprefix(FILE_PREFIX)
    if format is None:
        format = await graph.probe(path)
        wanted |= {"probed": True} if format == "raw" else {}
    try:
        return await graph.open(path, format=format, **wanted)
    except blocklayer.ReferenceRefusedError as error:
        error.message = error.message.partition("; ")[0] + "; --trust follows it, if the image is one that you trust"
        raise


async def _with_drivers(graph: blocklayer.Graph, options: dict[str, object]) -> dict[str, object]:
    """``options`` with the drivers that qemu-img would infer: "file" for a file name, a format by the file's content."""
    known = {
        key: await _with_drivers(graph, inner) if isinstance(inner, dict) else inner for key, inner in options.items()
    }
    inner = known.get("file")
    if "driver" in known:
        return known
    if isinstance(known.get("filename"), str):
        return {"driver": "file", **known}
    if isinstance(inner, dict) and inner.get("driver") == "file" and isinstance(inner.get("filename"), str):
        return {"driver": await graph.probe(str(inner["filename"])), **known}
    return known


def virtual_size(node: blocklayer.Node) -> int:
    """Its size as tools count it: a raw file that ends within a sector is filled up with zeroes."""
    return align_up(node.size, SECTOR)


def parse_create_options(texts: list[str]) -> dict[str, object]:
    """``-o a=b,c=d`` given any number of times, as one mapping with ``_`` in names."""
    merged: dict[str, object] = {}
    for text in texts:
        merged |= {key.replace("-", "_"): value for key, value in parse_options(text).items()}
    return merged


def human_size(size: int) -> str:
    """``64 MiB``, ``19.5 MiB``, ``512 B``: three significant digits, as qemu-img prints."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1000:  # noqa: PLR2004 - three digits in front of the point
            return f"{value:0.3g} {unit}"
        value /= 1024
    return f"{value:0.3g} EiB"


def disk_size(path: str | None) -> int | None:
    """Bytes that a file occupies, or None if there is no such file."""
    try:
        return None if path is None else os.stat(path).st_blocks * SECTOR
    except OSError:
        return None


def dump_json(value: object) -> str:
    """Indented by four, as qemu-img's."""
    return json.dumps(value, indent=4, ensure_ascii=False)
