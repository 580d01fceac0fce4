"""Opening backing chains: depth, loops, missing files, the gate at every reference, formats, and explicit children."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

import blocklayer
from blocklayer.base.errors import (
    ChainError,
    MissingFileError,
    OptionError,
    PermissionConflictError,
    ReferenceRefusedError,
    UnknownFormatError,
)
from blocklayer.base.modes import Permission
from blocklayer.graph.gate import Gate
from blocklayer.graph.opener import CHAIN_DEPTH_MAX, Ancestry, NodeReference, PendingOwner, filename_of
from tests.helpers.strict import strict_graph

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 64 * 1024


async def image(graph: blocklayer.Graph, path: Path, backing: str | None = None, format: str | None = "qcow2") -> Path:
    """A new qcow2 image whose header names ``backing``, whatever that is."""
    path.parent.mkdir(exist_ok=True)
    named = {} if backing is None else {"backing_file": backing, "backing_fmt": format}
    await graph.create(path, format="qcow2", size=SIZE, cluster_size=4096, **named)
    return path


async def chain(graph: blocklayer.Graph, folder: Path, depth: int) -> Path:
    """``depth`` images; the bottom holds one byte."""
    bottom = await graph.open(await image(graph, folder / "0.qcow2"))
    await bottom.write(1000, b"bottom")
    await bottom.close()
    for number in range(1, depth):
        await image(graph, folder / f"{number}.qcow2", f"{number - 1}.qcow2")
    return folder / f"{depth - 1}.qcow2"


# -- depth and loops ---------------------------------------------------------------------------------------------


async def test_a_deep_chain_reads_through_writes_on_top_and_closes(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        top = await graph.open(await chain(graph, tmp_path, CHAIN_DEPTH_MAX))
        assert top.chain_depth == CHAIN_DEPTH_MAX - 1
        assert await top.read(998, 10) == b"\0\0bottom\0\0"
        assert top.try_read(998, 10) in (None, b"\0\0bottom\0\0")
        assert [extent.depth async for extent in top.extents(0, 4096)] == [CHAIN_DEPTH_MAX - 1]
        async with top.drained():
            pass
        bottom = top
        while bottom.backing is not None:
            bottom = bottom.backing
        async with bottom.drained():
            pass
        bottom.children["file"].node.driver.try_read_into = lambda *_: False  # so that every layer has to wait
        assert await top.read(998, 10) == b"\0\0bottom\0\0"
        await top.write(2000, b"top")
        assert await top.read(998, 1010) == b"\0\0bottom".ljust(1002, b"\0") + b"top" + bytes(5)
        await top.flush()
        await top.close()
        assert graph.nodes == {}


async def test_a_chain_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        path = await chain(graph, tmp_path, CHAIN_DEPTH_MAX + 1)
        with pytest.raises(ChainError) as raised:
            await graph.open(path)
        assert str(raised.value) == f"file '{tmp_path}/0.qcow2': the chain is deeper than 100 nodes"
        assert graph.nodes == {}


@pytest.mark.parametrize("length", [1, 2, 5])
async def test_a_chain_that_comes_back_is_refused_and_names_the_image(tmp_path: Path, length: int) -> None:
    async with blocklayer.Graph() as graph:
        for number in range(length):
            path = await image(graph, tmp_path / f"{number}.qcow2")
            rename_backing(path, f"{(number + 1) % length}.qcow2")
        with pytest.raises(ChainError) as raised:
            await graph.open(tmp_path / "0.qcow2")
        assert str(raised.value) == f"file '{tmp_path}/0.qcow2': its backing chain comes back to it: a loop"
        assert raised.value.filename == str(tmp_path / "0.qcow2")
        assert graph.nodes == {}


async def test_a_loop_through_a_symbolic_link_is_a_loop(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        path = await image(graph, tmp_path / "0.qcow2")
        (tmp_path / "link.qcow2").symlink_to("0.qcow2")
        rename_backing(path, "link.qcow2")
        with pytest.raises(ChainError, match="a loop"):
            await graph.open(path)


async def test_a_loop_through_json_is_a_loop(tmp_path: Path) -> None:
    async with blocklayer.Graph(gate=Gate.permissive()) as graph:
        path = await image(graph, tmp_path / "0.qcow2")
        rename_backing(path, json_name(driver="qcow2", file={"driver": "file", "filename": str(path)}))
        with pytest.raises(ChainError, match="a loop") as raised:
            await graph.open(path)
        assert raised.value.filename == str(path)


def rename_backing(path: Path, name: str) -> None:
    """Write ``name`` into the header as QEMU would: behind the extensions, with the format recorded."""
    data = bytearray(path.read_bytes())
    text = name.encode()
    length = int.from_bytes(data[100:104], "big")
    extension = b"\xe2\x79\x2a\xca" + (5).to_bytes(4, "big") + b"qcow2\0\0\0" + bytes(8)
    data[length : length + len(extension)] = extension
    place = length + len(extension)
    data[place : place + len(text)] = text
    data[8:16] = place.to_bytes(8, "big")
    data[16:20] = len(text).to_bytes(4, "big")
    path.write_bytes(data)


def json_name(**options: object) -> str:
    return "json:" + json.dumps(options)


def test_the_way_down_knows_real_paths_and_its_depth(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    way = Ancestry().below(str(tmp_path / "file")).below(None)
    assert way.depth == 2
    assert way.below(str(tmp_path / "other")).depth == 3
    with pytest.raises(ChainError):
        way.below(str(tmp_path / "link"))


# -- missing files -----------------------------------------------------------------------------------------------


async def test_a_missing_backing_file_is_named_with_the_image_that_names_it(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        top = await chain(graph, tmp_path, 2)
        os.unlink(tmp_path / "0.qcow2")
        with pytest.raises(MissingFileError) as raised:
            await graph.open(top)
        assert raised.value.filename == str(tmp_path / "0.qcow2")
        assert f"backing file '0.qcow2' of '{tmp_path}/1.qcow2' does not exist" in str(raised.value)


async def test_deep_in_a_chain_it_is_the_image_that_names_it_and_not_the_top(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        top = await chain(graph, tmp_path, 4)
        os.unlink(tmp_path / "0.qcow2")
        with pytest.raises(MissingFileError) as raised:
            await graph.open(top)
        assert raised.value.filename == str(tmp_path / "0.qcow2")
        assert f"backing file '0.qcow2' of '{tmp_path}/1.qcow2' does not exist" in str(raised.value)
        assert graph.nodes == {}


# -- the gate ----------------------------------------------------------------------------------------------------


async def test_by_default_a_backing_file_outside_the_directory_is_refused(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        await image(graph, tmp_path / "secret/base.qcow2")
        top = await image(graph, tmp_path / "images/top.qcow2")
        rename_backing(top, "../secret/base.qcow2")
        with pytest.raises(ReferenceRefusedError) as raised:
            await graph.open(top)
        assert raised.value.reference == "../secret/base.qcow2"
        assert raised.value.filename == str(top)
        assert graph.nodes == {}
        for gate in (Gate.within(tmp_path), Gate.anywhere(), Gate.permissive()):
            node = await graph.open(top, gate=gate)
            assert node.chain_depth == 1
            await node.close()
        with pytest.raises(ReferenceRefusedError):
            await graph.open(top, gate=Gate.within(tmp_path / "images"))


async def test_the_graphs_gate_holds_unless_open_is_told_otherwise(tmp_path: Path) -> None:
    async with blocklayer.Graph(gate=Gate.deny()) as graph:
        async with blocklayer.Graph() as other:
            top = await chain(other, tmp_path, 2)
        with pytest.raises(ReferenceRefusedError):
            await graph.open(top)
        await (await graph.open(top, gate=Gate())).close()


async def test_a_gate_is_asked_at_every_image_of_the_chain(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        await image(graph, tmp_path / "c/bottom.qcow2")
        rename_backing(await image(graph, tmp_path / "b/middle.qcow2"), "../c/bottom.qcow2")
        rename_backing(await image(graph, tmp_path / "a/top.qcow2"), "../b/middle.qcow2")
        with pytest.raises(ReferenceRefusedError) as raised:
            await graph.open(tmp_path / "a/top.qcow2", gate=Gate.within(tmp_path / "a", tmp_path / "b"))
        assert raised.value.reference == "../c/bottom.qcow2"
        assert raised.value.filename is not None
        assert os.path.samefile(raised.value.filename, tmp_path / "b/middle.qcow2")


async def test_a_symbolic_link_does_not_lead_out_of_the_directory(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        await image(graph, tmp_path / "secret/base.qcow2")
        top = await image(graph, tmp_path / "images/top.qcow2")
        (tmp_path / "images/base.qcow2").symlink_to("../secret/base.qcow2")
        rename_backing(top, "base.qcow2")
        with pytest.raises(ReferenceRefusedError, match="lies outside"):
            await graph.open(top)


async def test_json_references_are_followed_by_the_permissive_gate_only(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        base = await image(graph, tmp_path / "base.qcow2")
        top = await image(graph, tmp_path / "top.qcow2")
        reference = json_name(driver="qcow2", file={"driver": "file", "filename": str(base)})
        rename_backing(top, reference)
        for gate in (Gate(), Gate.anywhere(), Gate.within(tmp_path)):
            with pytest.raises(ReferenceRefusedError, match="it uses the protocol 'json'") as raised:
                await graph.open(top, gate=gate)
            assert raised.value.reference == reference
        node = await graph.open(top, gate=Gate.permissive())
        assert node.backing is not None
        assert (node.backing.driver.name, node.backing.read_only) == ("qcow2", True)


async def test_what_the_caller_names_passes_no_gate(tmp_path: Path) -> None:
    async with blocklayer.Graph(gate=Gate.deny()) as graph:
        base = await image(graph, tmp_path / "elsewhere/base.qcow2")
        top = await image(graph, tmp_path / "images/top.qcow2")
        rename_backing(top, "../elsewhere/base.qcow2")
        backing = {"driver": "qcow2", "file": {"driver": "file", "filename": str(base)}}
        node = await graph.open(top, backing=backing)
        assert node.chain_depth == 1
        await node.close()
        node = await graph.open(top, backing=None)
        assert node.chain_depth == 0


# -- formats of backing files ------------------------------------------------------------------------------------


async def test_a_backing_file_without_a_recorded_format_is_opened_only_if_the_gate_lets_it_be_guessed(
    tmp_path: Path,
) -> None:
    async with blocklayer.Graph() as graph:
        await image(graph, tmp_path / "base.qcow2")
        top = await image(graph, tmp_path / "top.qcow2")
        rename_backing(top, "base.qcow2")
        data = bytearray(top.read_bytes())
        at = data.index(b"\xe2\x79\x2a\xca")
        data[at : at + 4] = b"none"
        top.write_bytes(data)
        with pytest.raises(UnknownFormatError) as raised:
            await graph.open(top)
        assert raised.value.filename == str(top)
        assert "without its format, and content is not to be trusted for that" in str(raised.value)
        node = await graph.open(top, gate=Gate.anywhere(probe=True))
        assert node.backing is not None
        assert node.backing.driver.name == "qcow2"


async def test_a_raw_backing_file_that_looks_like_an_image_stays_raw(tmp_path: Path) -> None:
    """CVE-2008-2004: a guest writes an image's header into its raw disk."""
    async with blocklayer.Graph() as graph:
        evil = await image(graph, tmp_path / "base.raw")
        rename_backing(evil, "/etc/passwd")
        top = await image(graph, tmp_path / "top.qcow2", "base.raw", format="raw")
        node = await graph.open(top)
        assert node.backing is not None
        assert node.backing.driver.name == "raw"
        assert (await node.read(0, 4)) == b"QFI\xfb"


# -- children ----------------------------------------------------------------------------------------------------


async def test_backing_images_are_opened_for_reading_and_shared_with_readers(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        await chain(graph, tmp_path, 2)
        other = await image(graph, tmp_path / "other.qcow2", "0.qcow2")
        tops = [await graph.open(path) for path in (tmp_path / "1.qcow2", other)]
        assert all(top.backing is not None and top.backing.read_only for top in tops)
        with pytest.raises(blocklayer.LockedError):
            await graph.open(tmp_path / "0.qcow2")


async def test_children_inherit_the_cache_and_names_they_are_opened_from(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        top = await graph.open(await chain(graph, tmp_path, 2), cache="writethrough")
        assert top.backing is not None
        assert top.backing.options.cache is blocklayer.CacheMode.WRITETHROUGH
        assert top.children["file"].node.options.cache is blocklayer.CacheMode.WRITETHROUGH
        assert top.filename == str(tmp_path / "1.qcow2")
        assert top.backing.filename == str(tmp_path / "0.qcow2")


async def test_a_live_backing_node_needs_an_edge_that_lets_it_be_written() -> None:
    async with strict_graph() as graph:
        from blocklayer.drivers.filter import FilterDriver

        assert FilterDriver.is_filter
        base = await graph.open({"driver": "memory", "size": 512}, node_name="base")
        with pytest.raises(PermissionConflictError, match="node 'top' \\(as its file\\) does not allow"):
            await graph.open({"driver": "plain-filter", "file": base}, node_name="top", read_only=True)
        reference = NodeReference(base, shares=Permission.ALL)
        top = await graph.open({"driver": "plain-filter", "file": reference}, node_name="top", read_only=True)
        await base.write(0, b"live")
        assert await top.read(0, 4) == b"live"


async def test_a_reference_without_a_say_shares_what_the_driver_says() -> None:
    async with strict_graph() as graph:
        base = await graph.open({"driver": "memory", "size": 512}, node_name="base", read_only=True)
        top = await graph.open({"driver": "plain-filter", "file": NodeReference(base)}, read_only=True)
        assert top.children["file"].shares == Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED


async def test_explicit_backing_options_count_as_depth_and_find_loops(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        path = await image(graph, tmp_path / "0.qcow2")
        backing = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        with pytest.raises(ChainError, match="a loop"):
            await graph.open(path, backing=backing)
        assert graph.nodes == {}


async def test_json_that_is_no_object_says_so(tmp_path: Path) -> None:
    async with blocklayer.Graph(gate=Gate.permissive()) as graph:
        top = await image(graph, tmp_path / "top.qcow2")
        rename_backing(top, "json:{broken")
        with pytest.raises(OptionError, match="not a json: name"):
            await graph.open(top)
        assert graph.nodes == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"filename": "a"}, "a"),
        ({"file": {"filename": "a"}}, "a"),
        ({"driver": "raw", "file": {"driver": "raw", "file": {"filename": "a"}}}, "a"),
        ({"file": "node"}, None),
        ({"filename": 5}, None),
        ({}, None),
    ],
)
def test_options_are_named_by_their_file(options, expected) -> None:
    assert filename_of(options) == expected


def test_the_owner_of_a_node_to_be_remembers_that_it_was_drained() -> None:
    owner = PendingOwner("disk", blocklayer.Driver)
    owner.drain_begin()
    owner.drain_begin()
    owner.drain_end()
    assert (owner.describe(), owner.drained) == ("node 'disk'", 1)
