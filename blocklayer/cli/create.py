"""``blocklayer create``: make an image; options and output as qemu-img create's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import blocklayer
from blocklayer.base.units import parse_size
from blocklayer.cli.common import FailureError, gate, parse_create_options

if TYPE_CHECKING:
    import argparse

_QCOW2_OPTIONS = {
    "backing_file": "file name of a base image",
    "backing_fmt": "format of the base image",
    "cluster_size": "cluster size, 512 to 2M (default 64k)",
    "compat": "compatibility level: 0.10 or 1.1 (default)",
    "compression_type": "zlib (default) or zstd",
    "data_file": "file name of an external data file",
    "data_file_raw": "the data file is a valid raw image at all times",
    "extended_l2": "subclusters: on or off (default)",
    "lazy_refcounts": "postpone refcount updates: on or off (default)",
    "preallocation": "off (default), metadata, falloc or full",
    "refcount_bits": "width of a reference count, 1 to 64 (default 16)",
    "size": "virtual disk size",
}
_HELP = {
    "qcow2": _QCOW2_OPTIONS,
    "raw": {"preallocation": "off (default), falloc or full", "size": "virtual disk size"},
}
_SHOWN = {"cluster_size": 65536, "extended_l2": "off", "compression_type": "zlib"}
_SHOWN_LAST = {"lazy_refcounts": "off", "refcount_bits": 16}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Arguments."""
    parser = commands.add_parser("create", help="make an image")
    parser.add_argument("-f", "--format", default="raw", metavar="FMT", help="format (default: raw)")
    parser.add_argument(
        "-o", "--options", action="append", default=[], metavar="OPT=VAL,...", help="options; -o help lists them"
    )
    parser.add_argument("-b", "--backing-file", metavar="FILE", help="base image")
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="format of the base image")
    parser.add_argument("-u", "--unsafe", action="store_true", help="do not open the base image")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("filename", nargs="?")
    parser.add_argument("size", nargs="?", help="like 10G; the base image's if it is not given")
    parser.set_defaults(run=run)


async def run(args: argparse.Namespace) -> int:
    """Make it."""
    if any(text in ("help", "?") for text in args.options):
        print(f"Supported {args.format} options:")
        for name, text in _HELP.get(args.format, {}).items():
            print(f"  {name:<22} - {text}")
        return 0
    if args.filename is None:
        raise FailureError("create: a file name is required")
    options = parse_create_options(args.options)
    if args.backing_file is not None:
        options["backing_file"] = args.backing_file
    if args.backing_format is not None:
        options["backing_fmt"] = args.backing_format
    given = options.pop("size", None)
    size: str | int | None = args.size if args.size is not None else str(given) if given is not None else None
    async with blocklayer.Graph() as graph:
        backing_size = await _backing_size(graph, args, options)
        if size is None:
            size = backing_size
        if size is None:
            raise FailureError(f"{args.filename}: a size is required: blocklayer create -f {args.format} FILE SIZE")
        length = -(-parse_size(size) // 512) * 512 if args.format == "qcow2" else parse_size(size)
        if not args.quiet:
            print(_announcement(args.filename, args.format, length, options))
        await graph.create(args.filename, format=args.format, size=length, **options)
    return 0


async def _backing_size(graph: blocklayer.Graph, args: argparse.Namespace, options: dict[str, object]) -> int | None:
    """Open the base image, if there is one, to see that it is there."""
    name = options.get("backing_file")
    if not isinstance(name, str):
        return None
    if args.format == "raw":
        raise FailureError(f"{args.filename}: a raw image has no backing file; use -f qcow2")
    if "backing_fmt" not in options:
        path = os.path.join(os.path.dirname(args.filename), name)
        seen = f" (it looks like {await graph.probe(path)})" if os.path.isfile(path) else ""
        raise FailureError(f"{args.filename}: Backing file specified without backing format{seen}; say it with -F")
    if args.unsafe:
        return None
    path = os.path.join(os.path.dirname(args.filename), name)
    backing = await graph.open(
        path, format=str(options["backing_fmt"]), read_only=True, force_share=True, gate=gate(args)
    )
    return backing.size


def _announcement(filename: str, format: str, size: int, options: dict[str, object]) -> str:
    words = [f"Formatting '{filename}', fmt={format}"]
    if format == "qcow2":
        words += [f"{key}={options.get(key, default)}" for key, default in _SHOWN.items()]
    words.append(f"size={size}")
    if format == "qcow2":
        words += [f"{key}={options[key]}" for key in ("backing_file", "backing_fmt", "data_file") if key in options]
        words += [f"{key}={options.get(key, default)}" for key, default in _SHOWN_LAST.items()]
    words += [f"{key}={options[key]}" for key in ("compat", "preallocation") if key in options]
    return " ".join(words)
