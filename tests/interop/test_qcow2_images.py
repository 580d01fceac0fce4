"""Images that our driver wrote are what QEMU reads, and the other way round."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

import blocklayer
from blocklayer.base.units import KIB, MIB
from tests.helpers.peers import needs, qemu_check, qemu_img, qemu_io
from tests.helpers.qcow2_programs import LAYOUTS, Layout, Program, content

if TYPE_CHECKING:
    from pathlib import Path

    from blocklayer.graph.node import Node

SEEDS = max(1, int(os.environ.get("BLOCKLAYER_SEEDS", "100")) // 100)

pytestmark = [needs("qemu-img", "qemu-io"), pytest.mark.interop]


def make_backing(folder: Path, layout: Layout) -> dict[str, str]:
    """The backing file, and the options that name it."""
    if not layout.backing:
        return {}
    name = f"base.{layout.backing_fmt}"
    (folder / "base.raw").write_bytes(content(layout.backing))
    if layout.backing_fmt == "qcow2":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", folder / "base.raw", folder / name)
    return {"backing_file": name, "backing_fmt": layout.backing_fmt}


def model_of(layout: Layout) -> bytearray:
    """What a new image of this layout reads as."""
    return bytearray(content(layout.backing)[: layout.size].ljust(layout.size, b"\0"))


def compare(path: Path, model: bytes | bytearray) -> None:
    """QEMU finds the image sound, and its content that of the model."""
    qemu_check(path.name, folder=path.parent)
    raw = path.with_suffix(".model")
    raw.write_bytes(model)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path.name, raw.name, folder=path.parent)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
async def test_what_we_write_qemu_reads(tmp_path: Path, layout: Layout, seed: int) -> None:
    path = tmp_path / "disk.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=layout.size, **layout.options, **make_backing(tmp_path, layout))

        async def reopen(disk: Node) -> Node:
            await disk.close()
            return await graph.open(path, cache="unsafe")

        program = Program(layout, model_of(layout), seed)
        try:
            disk = await program.run(await graph.open(path, cache="unsafe"), 80, reopen=reopen)
            assert await disk.read(0, disk.size) == program.model
            await disk.close()
        except BaseException as error:
            error.add_note("\n".join(program.log))
            raise
    await asyncio.to_thread(compare, path, program.model)


FROM_QEMU = [
    Layout("512", 300 * KIB, {"cluster_size": 512}),
    Layout("4k v2", 300 * KIB, {"cluster_size": 4096, "compat": "0.10"}),
    Layout("4k eight bits", 300 * KIB, {"cluster_size": 4096, "refcount_bits": 8}),
    Layout("4k zstd", 300 * KIB + 512, {"cluster_size": 4096, "compression_type": "zstd"}),
    Layout("64k", 2 * MIB),
    Layout("64k lazy", 2 * MIB, {"lazy_refcounts": "on"}),
    Layout("64k zstd extended", 2 * MIB, {"compression_type": "zstd", "extended_l2": "on"}),
    Layout("16k extended", MIB, {"cluster_size": 16 * KIB, "extended_l2": "on", "refcount_bits": 64}),
    Layout("2M", 9 * MIB, {"cluster_size": 2 * MIB}),
]
SHAPES = ["plain", "compressed", "snapshot", "compressed snapshot"]


def qemu_writes(path: Path, layout: Layout, shape: str) -> tuple[bytes, bytes]:
    """QEMU makes the image and works on it; answers its content at the snapshot, if there is one, and now."""
    raw, cluster = path.with_suffix(".raw"), layout.cluster
    last = (layout.size - 1) // cluster * cluster
    data = bytearray(content(layout.size))
    data[cluster : 2 * cluster], data[last:] = bytes(cluster), bytes(layout.size - last)
    raw.write_bytes(data)
    options = ",".join(f"{key}={value}" for key, value in layout.options.items()) or "compat=1.1"
    packed = ["-c"] if "compressed" in shape else []
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *packed, "-o", options, raw, path)
    qemu_io(path, f"write -P 1 {3 * cluster + 512} 512", f"write -z {2 * cluster} {cluster}", "write -P 2 0 512")
    if packed:
        qemu_io(path, f"write -c -P 3 {cluster} {cluster}", f"write -c -P 4 {last} {layout.size - last}")
    before = b""
    if "snapshot" in shape:
        before = contents(path)
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, f"write -P 5 {2 * cluster} 1k", "discard 0 128k", f"write -P 6 0 {cluster // 2}")
    return before, contents(path)


def contents(path: Path, *options: str) -> bytes:
    """All bytes of the disk as QEMU reads them."""
    raw = path.with_suffix(".out")
    qemu_img("convert", *options, "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", FROM_QEMU, ids=str)
async def test_what_qemu_writes_we_read_and_write_on(tmp_path: Path, layout: Layout, shape: str) -> None:
    """Compressed clusters and those that a snapshot shares are read, overwritten, and left to the snapshot."""
    path = tmp_path / "disk.qcow2"
    before, now = await asyncio.to_thread(qemu_writes, path, layout, shape)
    async with blocklayer.Graph() as graph:
        disk = await graph.open(path, read_only=True)
        assert await disk.read(0, disk.size) == now
        await disk.close()
        disk = await graph.open(path, cache="unsafe")
        program = Program(layout, bytearray(now), seed=1)
        try:
            disk = await program.run(disk, 50, resize="snapshot" not in shape)
            assert await disk.read(0, disk.size) == program.model
        except BaseException as error:
            error.add_note("\n".join(program.log))
            raise
        await disk.close()
    await asyncio.to_thread(compare, path, program.model)
    if before:
        assert await asyncio.to_thread(contents, path, "-l", "snapshot.name=one") == before
        await asyncio.to_thread(qemu_img, "snapshot", "-a", "one", path)
        await asyncio.to_thread(compare, path, before)
        await asyncio.to_thread(qemu_img, "snapshot", "-d", "one", path)
        await asyncio.to_thread(compare, path, before)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout("v2", 3 * MIB, {"compat": "0.10"}),
        Layout("small", 300 * KIB, {"cluster_size": 512}),
        Layout("extended", 3 * MIB, {"extended_l2": True}),
        Layout("over raw", MIB + 512, {}, backing=3 * MIB),
        Layout("data file", 3 * MIB, {"data_file": "data.raw"}, data_file=True),
    ],
    ids=str,
)
async def test_a_disk_that_grows_with_preallocation(tmp_path: Path, layout: Layout, preallocation: str) -> None:
    """Every new cluster is allocated and zero, the rest is as it was."""
    path = tmp_path / "disk.qcow2"
    size = 2 * layout.size + 512
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=layout.size, **layout.options, **make_backing(tmp_path, layout))
        disk = await graph.open(path)
        await disk.write(0, b"w" * 1000)
        await disk.discard(0, layout.size)
        await disk.write(512, b"w" * 1000)
        model = await disk.read(0, layout.size)
        await disk.truncate(size, blocklayer.Preallocation(preallocation))
        model += bytes(size - len(model))
        assert await disk.read(0, size) == model
        first_new = -(-layout.size // layout.cluster) * layout.cluster
        while first_new < size:
            allocated, length = await disk.is_allocated(first_new, size - first_new)
            assert allocated
            first_new += length
        await disk.close()
    if preallocation != "metadata" and not layout.data_file:
        assert path.stat().st_blocks * 512 >= size - layout.size
    await asyncio.to_thread(compare, path, model)
