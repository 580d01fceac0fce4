"""``blocklayer compare`` agrees with ``qemu-img compare`` on what is the same."""

from __future__ import annotations

import shutil
from itertools import product
from typing import TYPE_CHECKING

import pytest

from tests.helpers.command import assert_same, blocklayer, qemu
from tests.helpers.peers import needs, qemu_img, qemu_io

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs("qemu-img", "qemu-io")

SAME_WRITES = ("plain.qcow2", "tiny-clusters.qcow2", "old.qcow2", "extended.qcow2", "zstd.qcow2", "data.qcow2")
OTHERS = ("base.qcow2", "top.qcow2", "compressed.qcow2", "sparse.raw", "odd.raw", "empty.raw", "short-base.qcow2")


@pytest.mark.parametrize(("first", "second"), [*product(SAME_WRITES[:1], SAME_WRITES), *product(OTHERS, OTHERS)])
def test_what_is_the_same_and_what_is_not(gallery: Path, first: str, second: str) -> None:
    assert_same("compare", first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("full.raw", "full.raw"),
        ("sparse.raw", "full.raw"),
        ("plain.qcow2", "plain.qcow2"),
        ("plain.qcow2", "data.qcow2"),
        ("plain.qcow2", "compressed.qcow2"),
        ("sparse.raw", "on-raw.qcow2"),
        ("sparse.raw", "fresh.qcow2"),
        ("empty.raw", "empty.qcow2"),
        ("odd.raw", "odd.raw"),
    ],
)
def test_strictly_the_same(gallery: Path, first: str, second: str) -> None:
    assert_same("compare", "-s", first, second)


def test_strictly_allocation_counts_too(here: Path) -> None:
    """Unallocated, zero, data that are zero, and compressed data."""
    commands = {
        "none": [],
        "zero": ["write -z 64k 64k"],
        "data": ["write -P 0 64k 64k"],
        "small": ["write -c -P 0 64k 64k"],
    }
    for name, writes in commands.items():
        qemu_img("create", "-f", "qcow2", name, "1M")
        qemu_io(name, *writes, "write -P 7 512k 64k")
    for first, second in product(commands, commands):
        assert_same("compare", first, second)
        outcome = assert_same("compare", "-s", first, second)
        assert outcome.out == (
            "Images are identical.\n" if first == second else "Strict mode: Offset 65536 block status mismatch!\n"
        ) or (first, second) == ("none", "zero")


@pytest.mark.parametrize("at", [0, 511, 512, 1024777, 2 << 20, (4 << 20) - 1])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_the_first_difference_is_told_by_its_sector(here: Path, kind: str, at: int) -> None:
    """Among data, where the other image has a hole."""
    for name, with_data in (("data", True), ("hole", False)):
        with open(name, "wb") as file:
            file.truncate(4 << 20)
            if with_data:
                file.write(b"a" * (4 << 20))
    for base in ("data", "hole"):
        shutil.copy(base, "changed.raw")
        with open("changed.raw", "r+b") as file:
            file.seek(at)
            file.write(b"b")
        if kind == "qcow2":
            qemu_img("convert", "-O", "qcow2", "changed.raw", "changed.qcow2")
        outcome = assert_same("compare", base, f"changed.{kind}")
        assert outcome.out == f"Content mismatch at offset {at // 512 * 512}!\n"


@pytest.mark.parametrize("options", [[], ["-s"], ["-q"], ["-q", "-p"]])
@pytest.mark.parametrize("tail", [b"", b"\0x", b"\0" * 900 + b"x"])
def test_of_different_sizes_the_longer_image_must_end_in_zeroes(here: Path, options: list[str], tail: bytes) -> None:
    for name, end in (("short", b""), ("long", tail)):
        with open(name, "wb") as file:
            file.write(b"a" * 65536)
            file.truncate(131072 if name == "short" else 131072 + 65536)
            if end:
                file.seek(0, 2)
                file.seek(-2048, 1)
                file.write(end)
    assert_same("compare", *options, "short", "long")
    assert_same("compare", *options, "long", "short")


def test_progress_goes_from_nothing_to_everything(gallery: Path) -> None:
    outcome = blocklayer("compare", "-p", "full.raw", "full.raw")
    assert outcome.out == "    (0.00/100%)\r    (100.00/100%)\rImages are identical.\n\n"
    assert outcome == qemu("compare", "-p", "full.raw", "full.raw")
    assert blocklayer("compare", "-p", "empty.raw", "empty.raw") == qemu("compare", "-p", "empty.raw", "empty.raw")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "qcow2", "full.raw", "full.raw"],
        ["-F", "qcow2", "full.raw", "full.raw"],
        ["-f", "unheard-of", "full.raw", "full.raw"],
        ["-f", "raw", "-F", "raw", "plain.qcow2", "plain.qcow2"],
        ["-U", "full.raw", "full.raw"],
        ["-T", "none", "full.raw", "full.raw"],
        ["-T", "nonsense", "full.raw", "full.raw"],
        ["--image-opts", "driver=raw,file.filename=sparse.raw", "driver=qcow2,file.filename=on-raw.qcow2"],
        ["nowhere", "full.raw"],
        ["full.raw", "nowhere"],
        ["orphan.qcow2", "full.raw"],
        ["garbage.qcow2", "full.raw"],
        ["folder", "full.raw"],
        ["full.raw"],
        ["full.raw", "full.raw", "full.raw"],
        ["-z", "full.raw", "full.raw"],
        ["full.raw", "-q", "sparse.raw"],
    ],
)
def test_options_and_errors_are_those_of_qemu(gallery: Path, arguments: list[str]) -> None:
    """2 for what cannot be opened, 1 for wrong usage."""
    assert_same("compare", *arguments)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({4 << 16: (1 << 63 | 5 << 16 | 512).to_bytes(8, "big")}, 3),  # the first L2 entry points between clusters
        ({(4 << 16) + 128: (1 << 62 | 5 << 16).to_bytes(8, "big")}, 4),  # compressed data that are none
    ],
)
def test_what_cannot_be_mapped_and_what_cannot_be_read_differ(
    gallery: Path, here: Path, change: dict[int, bytes], status: int
) -> None:
    shutil.copy(gallery / "plain.qcow2", "damaged.qcow2")
    with open("damaged.qcow2", "r+b") as file:
        for offset, data in change.items():
            file.seek(offset)
            file.write(data)
    outcome = blocklayer("compare", gallery / "plain.qcow2", "damaged.qcow2")
    assert (outcome.status, outcome.out) == (status, "")
    assert outcome.status == qemu("compare", gallery / "plain.qcow2", "damaged.qcow2").status
    assert "damaged.qcow2" in outcome.err
