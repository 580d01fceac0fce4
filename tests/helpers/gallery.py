"""A folder of images of every kind that qemu-img makes, and some damaged ones; made once, never changed."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from tests.helpers.peers import qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

WRITES = ("write -P 1 1M 192k", "write -P 2 4M 4k", "write -z 6M 256k", "write -P 5 7M 64k", "discard 7M 64k")

QCOW2_OPTIONS = {
    "plain": "cluster_size=64k",
    "tiny-clusters": "cluster_size=512",
    "one-bit-counts": "cluster_size=4k,refcount_bits=1",
    "large-clusters": "cluster_size=2M,refcount_bits=64",
    "old": "compat=0.10",
    "extended": "extended_l2=on,cluster_size=16k",
    "lazy": "lazy_refcounts=on",
    "zstd": "compression_type=zstd",
    "full": "preallocation=full",
    "data": "data_file=data.raw",
    "data-raw": "data_file=data-raw.raw,data_file_raw=on",
}
"""Images that are written as ``WRITES`` say."""

RAW = ("sparse.raw", "full.raw", "empty.raw", "odd.raw")
CHAINS = ("base.qcow2", "middle.qcow2", "top.qcow2", "on-raw.qcow2", "short-base.qcow2", "no-format.qcow2")
WHOLE = (*RAW, *(f"{name}.qcow2" for name in QCOW2_OPTIONS), *CHAINS, "empty.qcow2", "fresh.qcow2", "compressed.qcow2",
         "snapshots.qcow2", "bitmaps.qcow2", "marked-corrupt.qcow2", "dirty.qcow2")  # fmt: skip
DAMAGED = ("leak.qcow2", "corrupt.qcow2", "both.qcow2", "flags.qcow2")
"""Readable, but not sound."""
UNREADABLE = ("garbage.qcow2", "nowhere.qcow2", "folder")
"""What nobody can open; ``nowhere.qcow2`` does not exist."""


def make_gallery(folder: Path) -> None:
    """Fill ``folder``."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        _raw()
        for name, options in QCOW2_OPTIONS.items():
            _create(f"{name}.qcow2", "-o", options, "8M")
            qemu_io(f"{name}.qcow2", *WRITES)
        _chains()
        _particular()
        _damage()
    finally:
        os.chdir(here)


def _create(name: str, *arguments: str) -> None:
    qemu_img("create", "-f", "qcow2", *arguments[:-1], name, *arguments[-1:])


def _raw() -> None:
    qemu_img("create", "-f", "raw", "sparse.raw", "8M")
    qemu_io("sparse.raw", "write -P 1 1M 64k", "write -P 2 4M 4k", format="raw")
    qemu_img("create", "-f", "raw", "full.raw", "1M")
    qemu_io("full.raw", "write -P 3 0 1M", format="raw")
    qemu_img("create", "-f", "raw", "empty.raw", "0")
    with open("odd.raw", "wb") as file:
        file.write(b"x" * 5000)


def _chains() -> None:
    _create("base.qcow2", "4M")
    qemu_io("base.qcow2", "write -P 1 0 1M", "write -z 2M 64k")
    _create("middle.qcow2", "-b", "base.qcow2", "-F", "qcow2", "8M")
    qemu_io("middle.qcow2", "write -P 2 512k 1M", "write -P 3 5M 64k")
    _create("top.qcow2", "-b", "middle.qcow2", "-F", "qcow2", "8M")
    qemu_io("top.qcow2", "write -P 4 0 64k", "write -z 640k 128k")
    _create("on-raw.qcow2", "-b", "sparse.raw", "-F", "raw", "16M")
    qemu_io("on-raw.qcow2", "write -P 4 0 64k")
    _create("short-base.qcow2", "-b", "odd.raw", "-F", "raw", "1M")
    _create("no-format.qcow2", "-u", "-b", "base.qcow2", "-F", "qcow2", "8M")
    _forget_backing_format("no-format.qcow2")
    _create("orphan.qcow2", "-u", "-b", "/nowhere/gone.qcow2", "-F", "qcow2", "8M")
    name = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}'
    _create("json.qcow2", "-b", name, "-F", "qcow2", "8M")
    _create("loop.qcow2", "-u", "-b", "xoop.qcow2", "-F", "qcow2", "8M")
    with open("loop.qcow2", "r+b") as file:
        data = file.read()
        file.seek(data.index(b"xoop"))
        file.write(b"loop")


def _forget_backing_format(name: str) -> None:
    """Turn the extension with the format into one that nobody knows."""
    with open(name, "r+b") as file:
        data = file.read()
        file.seek(data.index(bytes.fromhex("e2792aca")))
        file.write(bytes.fromhex("12345678"))


def _particular() -> None:
    _create("empty.qcow2", "0")
    _create("fresh.qcow2", "64M")
    _create("compressed.qcow2", "8M")
    qemu_io("compressed.qcow2", "write -c -P 5 0 64k", "write -c -P 6 128k 64k", "write -P 7 1M 64k")
    _create("snapshots.qcow2", "8M")
    qemu_io("snapshots.qcow2", "write -P 4 1M 64k")
    qemu_img("snapshot", "-c", "one", "snapshots.qcow2")
    qemu_io("snapshots.qcow2", "write -P 4 1M 64k")
    qemu_img("snapshot", "-c", "a name that is longer than its column", "snapshots.qcow2")
    _create("bitmaps.qcow2", "8M")
    qemu_img("bitmap", "--add", "bitmaps.qcow2", "first")
    qemu_img("bitmap", "--add", "-g", "1M", "--disable", "bitmaps.qcow2", "second")
    qemu_io("bitmaps.qcow2", "write 0 64k")


def _damage() -> None:
    _copy("snapshots.qcow2", "marked-corrupt.qcow2", {72: (2).to_bytes(8, "big")})
    _copy("lazy.qcow2", "dirty.qcow2", {72: (1).to_bytes(8, "big")})
    _copy("compressed.qcow2", "leak.qcow2", {count_of(30): b"\0\1"}, length=40 << 16)
    _copy("compressed.qcow2", "corrupt.qcow2", {count_of(4): b"\0\0"})
    _copy("compressed.qcow2", "both.qcow2", {count_of(4): b"\0\0", count_of(30): b"\0\3"}, length=40 << 16)
    _copy("plain.qcow2", "flags.qcow2", {(4 << 16) + 16 * 8: b"\0"})
    with open("garbage.qcow2", "wb") as file:
        file.write(b"QFI\xfb\0\0\0\3" + b"\xff" * 100)
    os.mkdir("folder")


def count_of(cluster: int) -> int:
    """Where the 16-bit refcount of a cluster stands in a small image of 64 KiB clusters."""
    return (2 << 16) + 2 * cluster


def _copy(source: str, target: str, changes: dict[int, bytes], length: int | None = None) -> None:
    shutil.copy(source, target)
    with open(target, "r+b") as file:
        for offset, data in changes.items():
            file.seek(offset)
            file.write(data)
        if length is not None:
            file.truncate(length)
