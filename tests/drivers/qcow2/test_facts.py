"""What ``info`` tells of a qcow2 image is what ``qemu-img info`` tells, key by key and in its order."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

import blocklayer
from blocklayer.base.errors import FormatError
from blocklayer.base.units import MIB
from tests.helpers.peers import needs, qemu_img, qemu_io
from tests.helpers.qcow2_disk import new_image, opened, qcow2
from tests.helpers.virtual_time import virtual_time

if TYPE_CHECKING:
    from pathlib import Path

SIZE = MIB


@virtual_time
async def test_version_2_tells_little() -> None:
    async with opened(new_image(SIZE, compat="0.10"), read_only=True) as disk:
        assert await disk.driver.info() == {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
        assert await qcow2(disk).snapshots() == ()


@virtual_time
async def test_version_3_tells_its_features() -> None:
    content = new_image(SIZE, compression_type="zstd", refcount_bits=4, lazy_refcounts=True, extended_l2=True)
    async with opened(content, read_only=True) as disk:
        assert await disk.driver.info() == {
            "compat": "1.1",
            "compression-type": "zstd",
            "lazy-refcounts": True,
            "refcount-bits": 4,
            "corrupt": False,
            "extended-l2": True,
        }


OPTIONS = [
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512,refcount_bits=64",
    "compression_type=zstd,lazy_refcounts=on",
    "extended_l2=on",
    "data_file=data.raw",
    "data_file=data.raw,data_file_raw=on",
]


@needs("qemu-img")
@pytest.mark.interop
@pytest.mark.parametrize("options", OPTIONS)
async def test_qemu_tells_the_same_in_the_same_order(tmp_path: Path, options: str) -> None:
    path = tmp_path / "disk.qcow2"
    await asyncio.to_thread(qemu_img, "create", "-f", "qcow2", "-o", options, path, "1M", folder=tmp_path)
    assert await ours(path) == await asyncio.to_thread(qemus, path)


@needs("qemu-img", "qemu-io")
@pytest.mark.interop
async def test_bitmaps_and_snapshots_are_told_as_qemu_tells_them(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"

    def make() -> None:
        qemu_img("create", "-f", "qcow2", path, "1M")
        qemu_img("bitmap", "--add", "-g", "128k", path, "first")
        qemu_img("bitmap", "--add", "--disable", path, "second bitmap")
        qemu_io(path, "write 0 64k")
        for number in range(3):
            qemu_img("snapshot", "-c", f"snapshot {number}", path)

    await asyncio.to_thread(make)
    assert await ours(path) == await asyncio.to_thread(qemus, path)
    async with blocklayer.Graph() as graph:
        disk = await graph.open(path, read_only=True)
        found = [(snapshot.identifier, snapshot.name) for snapshot in await qcow2(disk).snapshots()]
    assert found == [(b"1", b"snapshot 0"), (b"2", b"snapshot 1"), (b"3", b"snapshot 2")]


async def ours(path: Path) -> str:
    """Facts as JSON: order counts."""
    async with blocklayer.Graph() as graph:
        disk = await graph.open(path, read_only=True)
        return json.dumps(await disk.driver.info())


def qemus(path: Path) -> str:
    """The same from QEMU, which looks for data files from its working directory."""
    info: dict[str, Any] = json.loads(qemu_img("info", "--output", "json", path, folder=path.parent))
    return json.dumps(info["format-specific"]["data"])


@virtual_time
async def test_a_snapshot_table_that_is_cut_short_is_a_format_error() -> None:
    content = new_image(SIZE)
    content[60:64] = (5).to_bytes(4, "big")
    content[64:72] = len(content).to_bytes(8, "big")
    content.extend(b"\0" * 100)
    async with opened(content, read_only=True) as disk:
        with pytest.raises(FormatError, match="snapshot"):
            await qcow2(disk).snapshots()
