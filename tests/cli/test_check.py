"""``blocklayer check`` finds what ``qemu-img check`` finds, and what it repairs, QEMU finds sound."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.command import assert_same, assert_same_json, blocklayer, qemu
from tests.helpers.gallery import DAMAGED, UNREADABLE, WHOLE, count_of
from tests.helpers.peers import needs, qemu_check, qemu_img, qemu_io

pytestmark = needs("qemu-img", "qemu-io")

CORRUPT, LEAKS, UNSUPPORTED = 2, 3, 63


@pytest.mark.parametrize("image", [*WHOLE, *DAMAGED, *UNREADABLE])
def test_a_check_ends_and_prints_as_qemu_s(gallery: Path, image: str) -> None:
    assert_same("check", image)
    assert_same_json("check", image)


@pytest.mark.parametrize(
    ("image", "status"),
    [
        ("plain.qcow2", 0),
        ("nowhere.qcow2", 1),
        ("corrupt.qcow2", CORRUPT),
        ("leak.qcow2", LEAKS),
        ("full.raw", UNSUPPORTED),
    ],
)
def test_the_exit_status_tells_what_was_found(gallery: Path, image: str, status: int) -> None:
    outcome = blocklayer("check", "-q", image)
    assert (outcome.status, outcome.out) == (status, "")


def test_each_finding_is_described(gallery: Path) -> None:
    assert blocklayer("check", "both.qcow2").err.splitlines() == [
        "ERROR cluster 4 (at 0x40000): the refcount is 0, but there are 1 references",
        "ERROR cluster 4 (at 0x40000): the COPIED flag does not fit the refcount",
        "Leaked cluster 30 (at 0x1e0000): the refcount is 3, but there are 0 references",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "qcow2", "plain.qcow2"],
        ["-f", "raw", "plain.qcow2"],
        ["-f", "qcow2", "full.raw"],
        ["-f", "unheard-of", "full.raw"],
        ["-U", "plain.qcow2"],
        ["-T", "none", "plain.qcow2"],
        ["-T", "nonsense", "plain.qcow2"],
        ["-q", "leak.qcow2"],
        ["--image-opts", "driver=qcow2,file.filename=plain.qcow2"],
        ["--image-opts", "-f", "qcow2", "driver=qcow2,file.filename=plain.qcow2"],
        ['json:{"driver":"qcow2","file":{"driver":"file","filename":"leak.qcow2"}}'],
        ["-r", "sometimes", "plain.qcow2"],
        ["--output=xml", "plain.qcow2"],
        ["-r"],
        [],
        ["a", "b"],
    ],
)
def test_options_and_errors_are_those_of_qemu(gallery: Path, arguments: list[str]) -> None:
    assert_same("check", *arguments)


def test_a_missing_backing_file_does_not_keep_an_image_from_being_checked(gallery: Path) -> None:
    """qemu-img refuses: it opens the whole chain, of which it then checks the top alone."""
    assert blocklayer("check", "orphan.qcow2").status == 0
    assert qemu("check", "orphan.qcow2").status == 1


# -- repair --------------------------------------------------------------------------------------------------------


def repaired(tool, image: Path, mode: str, *options: str):
    """How ``tool`` repairs a copy, and the copy."""
    copy = f"{tool.__name__}.qcow2"
    shutil.copy(image, copy)
    return tool("check", "-r", mode, *options, copy), copy


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize(
    "name", ["plain", "leak", "flags", "dirty", "marked-corrupt", "lazy", "snapshots", "full", "data"]
)
def test_a_repair_ends_and_prints_as_qemu_s(gallery: Path, here: Path, name: str, mode: str) -> None:
    shutil.copy(gallery / "data.raw", "data.raw")
    for options in ([], ["--output=json"]):
        ours, our_copy = repaired(blocklayer, gallery / f"{name}.qcow2", mode, *options)
        theirs, their_copy = repaired(qemu, gallery / f"{name}.qcow2", mode, *options)
        if options:
            assert {**ours.json, "filename": ""} == {**theirs.json, "filename": ""}
        else:
            assert ours.out == theirs.out
        assert ours.status == theirs.status
    facts = [qemu("info", "--output=json", copy).json for copy in (our_copy, their_copy)]
    assert [each["dirty-flag"] for each in facts] == [facts[1]["dirty-flag"]] * 2
    assert facts[0]["format-specific"] == facts[1]["format-specific"]
    if not ours.status:
        qemu_check(our_copy)
        if name != "data":
            assert qemu("compare", our_copy, their_copy).status == 0


@pytest.mark.parametrize("name", ["corrupt", "both"])
def test_a_cluster_that_is_in_use_and_not_counted_is_counted_again(gallery: Path, here: Path, name: str) -> None:
    """In place, where qemu-img makes new refcount structures and so ends the image elsewhere."""
    ours, copy = repaired(blocklayer, gallery / f"{name}.qcow2", "all", "--output=json")
    theirs, _ = repaired(qemu, gallery / f"{name}.qcow2", "all", "--output=json")
    assert ours.status == theirs.status == 0
    assert {**ours.json, "filename": "", "image-end-offset": 0} == {
        **theirs.json,
        "filename": "",
        "image-end-offset": 0,
    }
    qemu_check(copy)


def test_leaks_are_freed_where_there_is_other_damage(gallery: Path, here: Path) -> None:
    """qemu-img gives up instead, with status 1."""
    outcome, copy = repaired(blocklayer, gallery / "both.qcow2", "leaks", "--output=json")
    facts = outcome.json
    assert (outcome.status, facts["leaks-fixed"], facts["corruptions"]) == (CORRUPT, 1, 2)
    assert qemu("check", "--output=json", copy).json.get("leaks") is None


@pytest.mark.parametrize("mode", ["leaks", "all"])
def test_what_cannot_be_repaired_safely_is_left_as_it_is(gallery: Path, here: Path, mode: str) -> None:
    """Two guest clusters in one host cluster without a snapshot: nobody knows whose data these are."""
    shutil.copy(gallery / "leak.qcow2", "shared.qcow2")
    with open("shared.qcow2", "r+b") as file:
        file.seek((4 << 16) + 10 * 8)
        file.write((1 << 63 | 3 << 16).to_bytes(8, "big"))  # maps data onto the L1 table
    before = Path("shared.qcow2").read_bytes()
    outcome = blocklayer("check", "-r", mode, "shared.qcow2")
    assert outcome.status == CORRUPT
    assert "blocklayer: nothing was repaired: cannot repair refcounts: " in outcome.err
    assert Path("shared.qcow2").read_bytes() == before


def test_without_r_nothing_is_written(gallery: Path, here: Path) -> None:
    for name in ("dirty.qcow2", "both.qcow2", "marked-corrupt.qcow2"):
        shutil.copy(gallery / name, name)
        os.chmod(name, 0o444)
        before = Path(name).read_bytes()
        blocklayer("check", name)
        assert Path(name).read_bytes() == before


def test_a_repair_of_a_format_without_checks_is_unsupported(gallery: Path, here: Path) -> None:
    shutil.copy(gallery / "full.raw", "full.raw")
    assert_same("check", "-r", "all", "-f", "raw", "full.raw")


def test_an_image_in_a_chain_is_repaired_without_its_base(gallery: Path, here: Path) -> None:
    shutil.copy(gallery / "orphan.qcow2", "orphan.qcow2")
    size = os.path.getsize("orphan.qcow2")
    os.truncate("orphan.qcow2", (size + 65535 & ~65535) + 65536)
    with open("orphan.qcow2", "r+b") as file:
        file.seek(count_of(4))
        file.write(b"\0\1")
    assert blocklayer("check", "orphan.qcow2").status == LEAKS
    assert blocklayer("check", "-r", "leaks", "orphan.qcow2").status == 0
    assert blocklayer("check", "orphan.qcow2").status == 0


@pytest.mark.parametrize(
    "options", ["cluster_size=512", "cluster_size=4k,refcount_bits=1", "extended_l2=on,cluster_size=16k"]
)
def test_a_lost_refcount_table_is_made_again(here: Path, options: str) -> None:
    """What the guest sees stays; QEMU may write on."""
    qemu_img("create", "-f", "qcow2", "-o", options, "disk.qcow2", "4M")
    qemu_io("disk.qcow2", "write -P 1 0 1M", "write -P 2 3M 100k")
    shutil.copy("disk.qcow2", "lost.qcow2")
    with open("lost.qcow2", "r+b") as file:
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        file.write(bytes(8))
    assert blocklayer("check", "lost.qcow2").status == CORRUPT
    outcome = blocklayer("check", "-r", "all", "lost.qcow2")
    assert outcome.status == 0
    assert "Double checking the fixed image now...\nNo errors were found on the image.\n" in outcome.out
    qemu_io("lost.qcow2", "write -P 3 2M 64k", "read -P 1 0 1M", "read -P 2 3M 100k")
    qemu_check("lost.qcow2")
