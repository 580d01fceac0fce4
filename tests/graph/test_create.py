"""Making images: nothing is touched before the options are known to be right; sizes come from backing files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import blocklayer

if TYPE_CHECKING:
    from pathlib import Path

KEPT = b"somebody's data" * 100


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("raw", {"size": "1M", "cluster_size": "64k"}),
        ("raw", {"size": "1M", "preallocation": "metadata"}),
        ("raw", {}),
        ("qcow2", {}),
        ("qcow2", {"size": "1M", "cluster_size": 1000}),
        ("qcow2", {"size": "1M", "compat": "0.10", "extended_l2": True}),
        ("qcow2", {"backing_file": "missing.qcow2", "backing_fmt": "qcow2"}),
    ],
)
async def test_wrong_options_leave_what_is_there(tmp_path: Path, format: str, options: dict[str, object]) -> None:
    path = tmp_path / "image"
    path.write_bytes(KEPT)
    async with blocklayer.Graph() as graph:
        with pytest.raises(blocklayer.BlockError):
            await graph.create(path, format=format, **options)
    assert path.read_bytes() == KEPT


async def test_an_image_is_not_its_own_backing_file(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size="1M")
        before = path.read_bytes()
        with pytest.raises(blocklayer.UsageError, match="its own backing file"):
            await graph.create(path, format="qcow2", backing_file="image.qcow2", backing_fmt="qcow2")
    assert path.read_bytes() == before


@pytest.mark.parametrize(("content", "expected"), [(1 << 20, 1 << 20), (1000, 1024)])
async def test_the_size_is_the_backing_files_in_whole_sectors(tmp_path: Path, content: int, expected: int) -> None:
    (tmp_path / "base.img").write_bytes(bytes(content))
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / "top.qcow2", format="qcow2", backing_file="base.img", backing_fmt="raw")
        node = await graph.open(tmp_path / "top.qcow2")
        assert node.size == expected
        await node.close()


async def test_an_image_that_is_in_use_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size="1M")
        await graph.open(path)
        before = path.read_bytes()
        with pytest.raises((blocklayer.LockedError, blocklayer.InUseError)):
            await graph.create(path, format="qcow2", size="2M")
    assert path.read_bytes() == before
