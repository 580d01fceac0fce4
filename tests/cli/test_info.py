"""``blocklayer info`` says of every image what ``qemu-img info`` says."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

import blocklayer as library
from tests.helpers.command import assert_same, assert_same_json, blocklayer, qemu
from tests.helpers.gallery import DAMAGED, UNREADABLE, WHOLE
from tests.helpers.peers import needs, qemu_img

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs("qemu-img", "qemu-io")

EVERY = (*WHOLE, *DAMAGED, "orphan.qcow2", "json.qcow2", "loop.qcow2")


@pytest.mark.parametrize("image", [*EVERY, *UNREADABLE])
def test_an_image_is_described_as_qemu_describes_it(gallery: Path, image: str) -> None:
    assert_same("info", image)
    assert_same_json("info", image)


@pytest.mark.parametrize("image", ["top.qcow2", "on-raw.qcow2", "no-format.qcow2", "data.qcow2", "odd.raw"])
def test_a_chain_is_described_from_top_to_bottom(gallery: Path, image: str) -> None:
    assert_same("info", "--backing-chain", image)
    assert_same_json("info", "--backing-chain", image)


@pytest.mark.parametrize("image", ["orphan.qcow2", "loop.qcow2", "nowhere.qcow2"])
def test_a_chain_that_does_not_end_well_is_an_error(gallery: Path, image: str) -> None:
    assert_same("info", "--backing-chain", image)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "qcow2", "plain.qcow2"],
        ["-f", "raw", "plain.qcow2"],
        ["--format=raw", "plain.qcow2"],
        ["-f", "qcow2", "full.raw"],
        ["-f", "file", "full.raw"],
        ["-f", "unheard-of", "full.raw"],
        ["-U", "plain.qcow2"],
        ["--force-share", "plain.qcow2"],
        ["plain.qcow2", "-U"],
        ["file:full.raw"],
        ["--image-opts", "driver=raw,file.filename=full.raw"],
        ["--image-opts", "driver=qcow2,file.driver=file,file.filename=top.qcow2"],
        ["--image-opts", "driver=file,filename=full.raw"],
        ["--image-opts", "-f", "raw", "driver=raw,file.filename=full.raw"],
        ["--image-opts", "driver=qcow2"],
        ["--image-opts", "file.filename=top.qcow2"],
        ["--image-opts", "file.filename=full.raw"],
        ["--image-opts", "backing.driver=raw"],
        ["--image-opts", "=="],
        ['json:{"driver":"raw","file":{"driver":"file","filename":"full.raw"}}'],
        ['json:{"driver":"qcow2","file.driver":"file","file.filename":"top.qcow2"}'],
        ["json:x"],
        ["json:{}"],
        [""],
        [],
        ["a", "b"],
        ["--output", "xml", "plain.qcow2"],
        ["--no-such-option", "plain.qcow2"],
        ["-f"],
    ],
)
def test_options_mean_what_they_mean_to_qemu(gallery: Path, arguments: list[str]) -> None:
    assert_same("info", *arguments)


def test_a_backing_file_in_another_folder_is_named_as_it_can_be_opened_from_here(gallery: Path, here: Path) -> None:
    (here / "sub").mkdir()
    for name in ("base.qcow2", "middle.qcow2"):
        shutil.copy(gallery / name, here / "sub" / name)
    outcome = assert_same("info", "sub/middle.qcow2")
    assert "backing file: base.qcow2 (actual path: sub/base.qcow2)" in outcome.out
    assert_same_json("info", "--backing-chain", "sub/middle.qcow2")


async def test_an_image_that_is_being_written_to_is_described_only_if_asked_to(here: Path) -> None:
    qemu_img("create", "-f", "qcow2", "disk.qcow2", "1M")
    async with library.Graph() as graph:
        await graph.open("disk.qcow2")
        refused, allowed = await in_a_thread("info", "disk.qcow2"), await in_a_thread("info", "-U", "disk.qcow2")
    assert (refused.status, allowed.status) == (1, 0)
    assert refused.err.startswith("blocklayer: file 'disk.qcow2': ")
    assert "virtual size: 1 MiB (1048576 bytes)" in allowed.out


async def in_a_thread(*arguments: str):
    """The command has an event loop of its own."""
    import asyncio

    return await asyncio.to_thread(blocklayer, *arguments)


def test_what_a_header_names_is_not_opened(here: Path) -> None:
    """A backing file and a data file that would show in an error if they were touched."""
    qemu_img("create", "-f", "qcow2", "-o", "data_file=data.raw", "disk.qcow2", "1M")
    (here / "data.raw").unlink()
    outcome = blocklayer("info", "--output", "json", "disk.qcow2")
    assert outcome.json["format-specific"]["data"]["data-file"] == "data.raw"
    assert outcome.json == qemu("info", "--output", "json", "disk.qcow2").json
    assert blocklayer("info", "--backing-chain", "disk.qcow2").status == 1


def test_a_json_reference_is_followed_only_if_the_image_is_trusted(gallery: Path) -> None:
    """Where qemu-img follows it without being asked."""
    refused = blocklayer("info", "--backing-chain", "json.qcow2")
    assert (refused.status, refused.out) == (1, "")
    assert "--trust follows it, if the image is one that you trust" in refused.err
    trusted = blocklayer("info", "--backing-chain", "--trust", "--output", "json", "json.qcow2")
    assert trusted.json == qemu("info", "--backing-chain", "--output", "json", "json.qcow2").json


def test_a_file_name_that_is_no_text_is_printed_as_the_bytes_that_it_is(here: Path) -> None:
    """As a real process: only there is a stream that takes bytes."""
    import os
    import subprocess
    import sys

    name = b"disk-\xff.raw"
    with open(name, "wb") as file:
        file.write(bytes(512))
    command = [sys.executable, "-m", "blocklayer", "info", name]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"image: disk-\xff.raw\nfile format: raw\n")
