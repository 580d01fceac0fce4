"""``blocklayer map`` finds the data of every chain where ``qemu-img map`` finds them."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from blocklayer.cli.map import as_hex
from tests.helpers.command import assert_same, blocklayer, qemu
from tests.helpers.gallery import DAMAGED, UNREADABLE, WHOLE
from tests.helpers.peers import needs, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs("qemu-img", "qemu-io")

OTHERWISE = {"extended.qcow2", "short-base.qcow2"}
"""See the tests at the end."""


@pytest.mark.parametrize(
    "image", [name for name in (*WHOLE, *DAMAGED, "orphan.qcow2", *UNREADABLE) if name not in OTHERWISE]
)
def test_a_map_is_printed_as_qemu_prints_it(gallery: Path, image: str) -> None:
    """Byte for byte: scripts read the JSON line by line."""
    assert_same("map", image)
    assert_same("map", "--output=json", image)


@pytest.mark.parametrize("image", ["sparse.raw", "top.qcow2", "odd.raw"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["-s", "1M", "-l", "1M"],
        ["--start-offset=100"],
        ["--max-length", "100"],
        ["-s", "1.5k"],
        ["-s", "0x1000", "-l", "64K"],
        ["-s", "5000"],
        ["-s", "9M"],
        ["-s", "8M", "-l", "1"],
        ["-l", "0"],
        ["-s", "1M", "-s", "2M"],
        ["-s", "x"],
        ["-s", ""],
        ["-l", "-1"],
        ["-s", "9E"],
    ],
)
def test_a_part_of_an_image(gallery: Path, image: str, arguments: list[str]) -> None:
    assert_same("map", "--output", "json", *arguments, image)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "raw", "plain.qcow2"],
        ["-f", "qcow2", "full.raw"],
        ["-U", "plain.qcow2"],
        ["--image-opts", "driver=raw,offset=1M,file.filename=sparse.raw"],
        ["--image-opts", "driver=raw,offset=1M,size=1M,file.filename=sparse.raw"],
        ['json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}'],
        [],
        ["a", "b"],
        ["--output=xml", "plain.qcow2"],
    ],
)
def test_options_mean_what_they_mean_to_qemu(gallery: Path, arguments: list[str]) -> None:
    assert_same("map", *arguments)


def test_files_are_named_as_they_can_be_opened_from_here(gallery: Path, here: Path) -> None:
    (here / "sub").mkdir()
    for name in ("base.qcow2", "middle.qcow2"):
        shutil.copy(gallery / name, here / "sub" / name)
    assert "sub/base.qcow2" in assert_same("map", "sub/middle.qcow2").out


def test_compressed_clusters_have_no_place_that_a_table_could_show(gallery: Path) -> None:
    outcome = assert_same("map", "compressed.qcow2")
    assert (outcome.status, outcome.out) == (1, "Offset          Length          Mapped to       File\n")
    assert outcome.err.endswith("compressed clusters; use --output json\n")


def test_a_loop_ends(gallery: Path) -> None:
    """qemu-img opens the same file again and again until it has no descriptors left."""
    outcome = blocklayer("map", "loop.qcow2")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "blocklayer: file 'loop.qcow2': its backing chain comes back to it: a loop\n"


def test_a_json_reference_is_followed_only_if_the_image_is_trusted(gallery: Path) -> None:
    assert blocklayer("map", "json.qcow2").status == 1
    assert blocklayer("map", "--trust", "json.qcow2").out == qemu("map", "json.qcow2").out


def test_space_behind_unallocated_subclusters_is_not_shown(gallery: Path) -> None:
    """qemu-img adds an offset to some extents that hold nothing there; the extents themselves are the same."""

    def joined(extents: list[dict[str, object]]) -> list[tuple[object, ...]]:
        found: list[list[object]] = []
        for extent in extents:
            kind = [extent["depth"], extent["present"], extent["zero"], extent["data"]]
            place = extent.get("offset") if extent["present"] else None
            if found and found[-1][2:] == [*kind, place] and place is None:
                found[-1][1] += extent["length"]
            else:
                found.append([extent["start"], extent["length"], *kind, place])
        return [tuple(each) for each in found]

    ours, theirs = (run("map", "--output=json", "extended.qcow2").json for run in (blocklayer, qemu))
    assert ours == [{**extent} for extent in ours if extent["present"] or "offset" not in extent]
    assert joined(ours) == joined(theirs)


def test_a_base_that_ends_within_a_sector_ends_there(gallery: Path) -> None:
    """qemu-img calls the rest of the sector zeroes of the base; here they are the overlay's, like all behind it."""
    extents = blocklayer("map", "--output=json", "short-base.qcow2").json
    assert [(each["start"], each["length"], each["depth"], each["data"]) for each in extents] == [
        (0, 5000, 1, True),
        (5000, (1 << 20) - 5000, 0, False),
    ]
    assert blocklayer("map", "short-base.qcow2") == qemu("map", "short-base.qcow2")


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (1, "0x1"), (65536, "0x10000")])
def test_numbers_are_printed_as_c_does(number: int, text: str) -> None:
    assert as_hex(number) == text


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k,refcount_bits=1", "cluster_size=2M"])
def test_room_that_was_never_written_reads_as_zeroes(tmp_path: Path, preallocation: str, options: str) -> None:
    """The format calls it data; only the file knows that nothing was stored there."""
    image = str(tmp_path / "disk.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"preallocation={preallocation},{options}", image, "8M")
    qemu_io(image, "write -P 3 1M 64k", "write -P 4 3001k 5k")
    assert_same("map", image)
    assert_same("map", "--output=json", image)
