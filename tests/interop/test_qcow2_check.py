"""Our check and qemu-img check agree on images that QEMU wrote, whole and damaged, and on our repairs."""

from __future__ import annotations

import json
import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest

from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.check import check, run_check
from blocklayer.codec.qcow2.entries import OFFSET_MASK
from blocklayer.codec.qcow2.repair import plan_repair
from tests.helpers.peers import needs

if TYPE_CHECKING:
    from pathlib import Path

    from blocklayer.codec.qcow2.check_result import CheckResult

pytestmark = needs("qemu-img", "qemu-io")

OPTIONS = [
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=1",
    "cluster_size=64k,refcount_bits=64",
    "cluster_size=2M,refcount_bits=2",
    "compat=0.10",
    "extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on",
    "compression_type=zstd",
]


def run(*command: str | Path) -> str:
    """Run a program of qemu-utils; what it prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 2, 3), done.stderr
    return done.stdout


def qemu_check(path: Path) -> dict[str, int]:
    """qemu-img check as json."""
    result: dict[str, int] = json.loads(run("qemu-img", "check", "--output", "json", "-f", "qcow2", path))
    return result


def our_check(path: Path) -> CheckResult:
    """The same by our own checker."""
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    try:
        header = qcow2_header.parse(os.pread(descriptor, 2 << 20, 0), file_size=size)
        return run_check(check(header, file_size=size), lambda offset, length: os.pread(descriptor, length, offset))
    finally:
        os.close(descriptor)


def written_by_qemu(path: Path, options: str, *, snapshots: bool = False) -> None:
    """An image with data, zeroes, discards and compressed clusters."""
    source = random.Random(options)
    run("qemu-img", "create", "-f", "qcow2", "-o", options, path, "8M")
    for round_number in range(2):
        commands = [] if round_number else ["-c", "write -c -P 5 6M 2M"]
        for _ in range(20):
            offset, length = source.randrange(11800 + 4000 * round_number) * 512, source.randrange(1, 400) * 512
            verb = source.choice(["write -P 7", "write -P 9", "write -z", "discard"])
            commands += ["-c", f"{verb} {offset} {length}"]
        run("qemu-io", "-f", "qcow2", *commands, path)
        if snapshots and not round_number:
            run("qemu-img", "snapshot", "-c", "one", path)


def assert_equal_results(path: Path) -> CheckResult:
    """All that both report."""
    ours, theirs = our_check(path), qemu_check(path)
    assert {
        "corruptions": ours.corruptions,
        "leaks": ours.leaks.count,
        "allocated-clusters": ours.allocated_clusters,
        "compressed-clusters": ours.compressed_clusters,
        "fragmented-clusters": ours.fragmented_clusters,
        "total-clusters": ours.total_clusters,
        "image-end-offset": ours.image_end_offset,
    } == {
        "corruptions": theirs.get("corruptions", 0),
        "leaks": theirs.get("leaks", 0),
        "allocated-clusters": theirs.get("allocated-clusters", 0),
        "compressed-clusters": theirs.get("compressed-clusters", 0),
        "fragmented-clusters": theirs.get("fragmented-clusters", 0),
        "total-clusters": theirs["total-clusters"],
        "image-end-offset": theirs["image-end-offset"],
    }
    return ours


@pytest.mark.parametrize("options", OPTIONS)
def test_we_count_what_qemu_counts_on_its_images(tmp_path: Path, options: str) -> None:
    """Clean, with the same numbers."""
    path = tmp_path / "image.qcow2"
    written_by_qemu(path, options)
    assert assert_equal_results(path).is_clean


@pytest.mark.parametrize("options", ["cluster_size=4k", "compat=0.10", "extended_l2=on"])
def test_snapshots_and_bitmaps_are_counted(tmp_path: Path, options: str) -> None:
    """Clusters shared with a snapshot, its tables, stored bitmaps with bits in them."""
    path = tmp_path / "image.qcow2"
    written_by_qemu(path, options, snapshots=True)
    if "compat" not in options:
        run("qemu-img", "bitmap", "--add", "--enable", path, "first")
        run("qemu-io", "-f", "qcow2", "-c", "write 1M 1M", path)
    assert assert_equal_results(path).is_clean


@pytest.mark.parametrize("seed", range(6))
def test_we_find_the_damage_that_qemu_finds_and_repair_it(tmp_path: Path, seed: int) -> None:
    """Refcounts overwritten at random: equal leaks and corruptions, and afterwards qemu-img is content."""
    source = random.Random(seed)
    path = tmp_path / "image.qcow2"
    written_by_qemu(path, source.choice(["cluster_size=4k", "cluster_size=64k", "extended_l2=on,cluster_size=16k"]))
    with path.open("r+b") as file:
        header = qcow2_header.parse(file.read(2 << 20), file_size=path.stat().st_size)
        file.seek(header.refcount_table_offset)
        block = int.from_bytes(file.read(8), "big") & OFFSET_MASK
        for _ in range(5):
            file.seek(block + 2 * source.randrange(1, 60))
            file.write(source.choice([b"\0\0", b"\0\1", b"\0\2", b"\1\0"]))
    result = our_check(path)
    theirs = qemu_check(path)
    assert (result.corruptions, result.leaks.count) == (theirs.get("corruptions", 0), theirs.get("leaks", 0))
    plan = plan_repair(result)
    assert plan is not None
    with path.open("r+b") as file:
        for step in plan.steps():
            file.seek(step.offset)
            file.write(step.data)
        file.seek(0)
        file.write(qcow2_header.serialize(plan.header))
    repaired = assert_equal_results(path)
    assert repaired.is_clean
