"""Images that our driver wrote are what QEMU reads, and the other way round."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import blocklayer
from tests.helpers.peers import needs, qemu_check, qemu_img
from tests.helpers.qcow2_programs import LAYOUTS, Layout, Program, content

if TYPE_CHECKING:
    from pathlib import Path

    from blocklayer.graph.node import Node

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


@pytest.mark.parametrize("seed", range(2))
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
            disk = await program.run(await graph.open(path, cache="unsafe"), 60, reopen=reopen)
            assert await disk.read(0, disk.size) == program.model
            await disk.close()
        except BaseException as error:
            error.add_note("\n".join(program.log))
            raise
    await asyncio.to_thread(compare, path, program.model)
