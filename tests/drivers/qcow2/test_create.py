"""Making images: what the pure plan says is what the file holds; what cannot be made leaves no trace."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import blocklayer
from blocklayer.base.errors import IOFailedError, MissingFileError, OptionError
from blocklayer.base.units import KIB, MIB
from tests.helpers.qcow2_disk import assert_sound, header_of, new_image
from tests.helpers.tiny import names

if TYPE_CHECKING:
    from pathlib import Path

    from blocklayer.graph.child import Child

LAYOUTS = [
    {"size": 0},
    {"size": 3 * MIB + 512, "compat": "0.10"},
    {"size": 3 * MIB, "cluster_size": 512, "refcount_bits": 1},
    {"size": 3 * MIB, "extended_l2": True, "lazy_refcounts": True, "compression_type": "zstd"},
    {"size": 3 * MIB, "cluster_size": 4096, "preallocation": "metadata"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
async def test_the_file_holds_what_the_plan_says(tmp_path: Path, layout: dict[str, object]) -> None:
    path = tmp_path / "new.qcow2"
    path.write_bytes(b"old content " * MIB)
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", **layout)
    settings = dict(layout)
    if "preallocation" in settings:
        settings["preallocation"] = blocklayer.Preallocation(settings["preallocation"])
    assert path.read_bytes() == new_image(**settings)
    assert_sound(path.read_bytes())


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
async def test_room_for_the_data_is_reserved_or_written(tmp_path: Path, preallocation: str) -> None:
    path = tmp_path / "new.qcow2"
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=4 * MIB, preallocation=preallocation)
        assert path.stat().st_blocks * 512 >= 4 * MIB
        disk = await graph.open(path)
        assert await disk.read(0, 4 * MIB) == bytes(4 * MIB)
        await disk.write(MIB, b"in place")
        assert path.stat().st_size < 5 * MIB
    assert_sound(path.read_bytes())


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("raw", [False, True])
async def test_a_data_file_is_made_as_large_as_the_disk(tmp_path: Path, raw: bool, preallocation: str) -> None:
    path, options = (
        tmp_path / "new.qcow2",
        {"data_file": "new.data", "data_file_raw": raw, "preallocation": preallocation},
    )
    (tmp_path / "new.data").write_bytes(b"old" * MIB)
    async with blocklayer.Graph() as graph:
        await graph.create(path, format="qcow2", size=2 * MIB, **options)
        assert (tmp_path / "new.data").read_bytes() == bytes(2 * MIB)
        if preallocation in ("falloc", "full"):
            assert (tmp_path / "new.data").stat().st_blocks * 512 >= 2 * MIB
        disk = await graph.open(path)
        await disk.write(MIB, b"data")
        assert await disk.read(0, 2 * MIB) == bytes(MIB) + b"data" + bytes(MIB - 4)
    assert (tmp_path / "new.data").read_bytes()[MIB : MIB + 4] == b"data"


async def test_without_a_size_an_overlay_gets_that_of_its_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * (MIB + 100))
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / "new.qcow2", format="qcow2", backing_file="base.raw", backing_fmt="raw")
        disk = await graph.open(tmp_path / "new.qcow2")
        assert disk.size == MIB + 512
        assert await disk.read(MIB, 512) == b"b" * 100 + bytes(412)
    header = header_of((tmp_path / "new.qcow2").read_bytes())
    assert (header.backing_file, header.backing_format) == ("base.raw", "raw")


BAD = [
    ({"size": MIB, "cluster_size": 1000}, "cluster_size 1000 is not a power of two"),
    ({"size": MIB, "cluster_size": 256}, "cluster_size 256"),
    ({"size": MIB, "refcount_bits": 3}, "refcount_bits 3"),
    ({"size": MIB, "compat": "1.2"}, "compat is '1.2'"),
    ({"size": MIB, "compat": "0.10", "lazy_refcounts": True}, "lazy_refcounts needs compat 1.1"),
    ({"size": MIB, "extended_l2": True, "cluster_size": 4096}, "extended_l2 needs a cluster_size of at least 16k"),
    ({"size": MIB, "backing_file": "base.raw"}, "backing_file needs backing_fmt"),
    ({"size": MIB, "encryption": True}, "encryption"),
    ({"size": 1 << 62}, "size"),
    ({"size": MIB, "data_file": "x" * 70000}, "header needs"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=[text for _, text in BAD])
async def test_bad_options_are_refused_before_any_file_is_touched(
    tmp_path: Path, options: dict[str, object], text: str
) -> None:
    (tmp_path / "kept.qcow2").write_bytes(b"kept")
    async with blocklayer.Graph() as graph:
        for name in ("kept.qcow2", "new.qcow2"):
            with pytest.raises(OptionError, match=text):
                await graph.create(tmp_path / name, format="qcow2", **options)
    assert names(tmp_path) == {"kept.qcow2"}
    assert (tmp_path / "kept.qcow2").read_bytes() == b"kept"


async def test_a_backing_file_that_is_not_there_cannot_give_its_size(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        with pytest.raises(MissingFileError):
            await graph.create(tmp_path / "new.qcow2", format="qcow2", backing_file="base.raw", backing_fmt="raw")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("failing", ["write", "truncate", "flush"])
async def test_when_writing_fails_both_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    async def fail(*_: object) -> None:
        raise IOFailedError("no")

    async with blocklayer.Graph() as graph:
        with monkeypatch.context() as patch, pytest.raises(IOFailedError):
            patch.setattr(blocklayer.drivers.file.FileDriver, failing, fail)
            await graph.create(tmp_path / "new.qcow2", format="qcow2", size=MIB, data_file="new.data")
        assert not graph.nodes
    assert names(tmp_path) == set()


async def test_the_header_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then the file is no image, whoever looks at it."""
    seen: list[int] = []
    write = blocklayer.graph.child.Child.write

    async def look(self: Child, offset: int, data: memoryview, *more: object) -> None:
        seen.append(offset)
        assert os.path.getsize(tmp_path / "new.qcow2") >= 4 * 64 * KIB
        await write(self, offset, data, *more)

    monkeypatch.setattr(blocklayer.graph.child.Child, "write", look)
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / "new.qcow2", format="qcow2", size=MIB, preallocation="metadata")
    assert seen[-1] == 0
    assert 0 not in seen[:-1]


async def test_the_header_is_written_when_all_that_it_names_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave an image without tables."""
    order: list[str] = []
    write, sync = os.pwritev, os.fdatasync

    def pwritev(fd, buffers, offset, *flags):
        order.append("tables" if offset else "header")
        return write(fd, buffers, offset, *flags)

    def fdatasync(fd):
        order.append("flush")
        return sync(fd)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / "disk.qcow2", format="qcow2", size="1G")
    header = order.index("header")
    assert order[header - 1] == "flush"
    assert "tables" in order[:header]
    assert "tables" not in order[header:]
