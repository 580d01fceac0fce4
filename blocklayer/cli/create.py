"""``blocklayer create``: make an image; options and output as qemu-img create's.

A base image is opened before anything is written: it must be there, it must not be the image itself, and its size is the
new image's unless one is given.
"""

from __future__ import annotations

import argparse
import os

import blocklayer
from blocklayer.base.options import JSON_PREFIX, parse_options
from blocklayer.base.ranges import align_up
from blocklayer.base.units import SECTOR
from blocklayer.cli.common import FILE_PREFIX, gate, parse_create_options, virtual_size
from blocklayer.cli.parser import FailureError, size

_QCOW2_OPTIONS = {
    "backing_file=<str>": "File name of a base image",
    "backing_fmt=<str>": "Image format of the base image",
    "cluster_size=<size>": "qcow2 cluster size",
    "compat=<str>": "Compatibility level (v2 [0.10] or v3 [1.1])",
    "compression_type=<str>": "Compression method used for image cluster compression",
    "data_file=<str>": "File name of an external data file",
    "data_file_raw=<bool (on/off)>": "The external data file must stay valid as a raw image",
    "extended_l2=<bool (on/off)>": "Extended L2 tables",
    "lazy_refcounts=<bool (on/off)>": "Postpone refcount updates",
    "preallocation=<str>": "Preallocation mode (allowed values: off, metadata, falloc, full)",
    "refcount_bits=<num>": "Width of a reference count entry in bits",
    "size=<size>": "Virtual disk size",
}
_RAW_OPTIONS = {
    "preallocation=<str>": "Preallocation mode (allowed values: off, falloc, full)",
    "size=<size>": "Virtual disk size",
}
_HELP = {"qcow2": _QCOW2_OPTIONS, "raw": _RAW_OPTIONS}

_ANNOUNCED = {
    "qcow2": (
        "cluster_size", "extended_l2", "preallocation", "compression_type", "size", "compat", "backing_file",
        "backing_fmt", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits",
    ),
    "raw": ("size", "preallocation"),
}  # fmt: skip
"""What is printed of the options, in QEMU's order."""
_DEFAULTS = {
    "qcow2": {
        "cluster_size": "65536",
        "extended_l2": "off",
        "compression_type": "zlib",
        "lazy_refcounts": "off",
        "refcount_bits": "16",
    }
}
_SIZES = ("cluster_size", "refcount_bits")


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    parser.add_argument("-f", "--format", default="raw", metavar="FMT", help="raw (default) or qcow2")
    parser.add_argument(
        "-o", "--options", action="append", default=[], metavar="OPT=VAL,...", help="options; -o help lists them"
    )
    parser.add_argument("-b", "--backing-file", metavar="FILE", help="base image, as the new image is to name it")
    parser.add_argument("-F", "--backing-format", metavar="FMT", help="format of the base image")
    parser.add_argument("-u", "--unsafe", action="store_true", help="do not open the base image")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("filename", nargs="?", metavar="FILE")
    parser.add_argument("size", nargs="?", type=size, metavar="SIZE", help="like 10G; the base image's if not given")
    parser.set_defaults(run=run)


async def run(args: argparse.Namespace) -> int:
    """Make it."""
    if any(word in ("help", "?") for text in args.options for word in text.split(",")):
        return _print_help(args.format)
    if args.filename is None:
        raise FailureError("Expecting image file name\nTry 'blocklayer create --help' for more information")
    args.filename = args.filename.removeprefix(FILE_PREFIX)
    options = _options(args)
    async with blocklayer.Graph() as graph:
        length = await _length(graph, args, options)
        if length is None:
            raise FailureError(
                f"{args.filename}: Image creation needs a size parameter: blocklayer create ... FILE SIZE"
            )
        if not args.quiet:
            print(_announcement(args, options, length))
        await graph.create(args.filename, format=args.format, size=align_up(length, SECTOR), **options)
    return 0


def _print_help(format: str) -> int:
    if format not in _HELP:
        raise FailureError(f"Unknown file format '{format}'; images can be made as {' and '.join(_HELP)}")
    print(f"Supported {format} options:")
    for name, text in _HELP[format].items():
        print(f"  {name:<22} - {text}")
    return 0


def _options(args: argparse.Namespace) -> dict[str, object]:
    """What -o, -b and -F say together; -b and -F win."""
    for text in args.options:
        if not text or text.startswith(",") or (text.endswith(",") and not text.endswith(",,")):
            raise FailureError(f"Invalid option list: {text}")
    options = parse_create_options(args.options)
    given = {"backing_file": args.backing_file, "backing_fmt": args.backing_format}
    return options | {key: value for key, value in given.items() if value is not None}


async def _length(graph: blocklayer.Graph, args: argparse.Namespace, options: dict[str, object]) -> int | None:
    """The size that was given, or else the base image's, which must be there in either case (unless -u)."""
    named = options.pop("size", None)
    if named is not None and args.size is not None:
        raise FailureError(f"{args.filename}: The image size must be specified only once: by -o size or as SIZE")
    base = await _base_size(graph, args, options)
    if args.size is not None:
        return int(args.size)
    return base if named is None else _size(str(named))


def _size(text: str) -> int:
    """A size that stands in an option. Raises ``FailureError``."""
    try:
        return size(text)
    except argparse.ArgumentTypeError as error:
        raise FailureError(str(error)) from None


async def _base_size(graph: blocklayer.Graph, args: argparse.Namespace, options: dict[str, object]) -> int | None:
    """Open the base image, if there is one, to see that it is there."""
    name, format = options.get("backing_file"), options.get("backing_fmt")
    if not isinstance(name, str):
        return None
    if args.format == "raw":
        raise FailureError(f"{args.filename}: Backing file not supported for file format 'raw'; use -f qcow2")
    path = os.path.join(os.path.dirname(args.filename), name.removeprefix(FILE_PREFIX))
    if format is None:
        seen = f" (it looks like {await graph.probe(path)})" if os.path.isfile(path) else ""
        raise FailureError(f"{args.filename}: Backing file specified without backing format{seen}; say it with -F")
    if os.path.realpath(path) == os.path.realpath(args.filename):
        raise FailureError(f"{args.filename}: it cannot be its own backing file")
    if args.unsafe:
        return None
    named = name.startswith(JSON_PREFIX)
    base = await graph.open(
        parse_options(name) if named else path,
        format=None if named else str(format),
        gate=gate(args),
        read_only=True,
        force_share=True,
    )
    length = virtual_size(base)
    await base.close()
    return length


def _announcement(args: argparse.Namespace, options: dict[str, object], length: int) -> str:
    values = {**_DEFAULTS.get(args.format, {}), **options, "size": length}
    for key in _SIZES:
        if key in options:
            values[key] = _size(str(options[key]))
    names = [key for key in _ANNOUNCED.get(args.format, ("size",)) if key in values]
    words = [f"{key}={str(values[key]).replace(',', ',,')}" for key in names]
    return " ".join([f"Formatting '{args.filename}', fmt={args.format}", *words])
