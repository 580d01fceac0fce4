"""The disks that benchmarks measure with."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest

from benchmarks.images import (
    CLUSTER,
    MIB,
    Offsets,
    fill_raw,
    make_disk,
    make_overlay,
    make_sparse,
    warm,
    warm_in_small_pages,
    workspace,
)
from tests.helpers.peers import needs

if TYPE_CHECKING:
    from pathlib import Path

needs_qemu = needs("qemu-io")


def data_of(path: Path) -> int:
    """Bytes that the topmost layer holds, by qemu-img map."""
    done = subprocess.run(
        ("qemu-img", "map", "--output=json", str(path)), check=True, capture_output=True, text=True, timeout=60
    )
    return sum(extent["length"] for extent in json.loads(done.stdout) if extent["data"] and extent["depth"] == 0)


@pytest.mark.parametrize("size", [MIB, 64 * MIB, 1 << 30, 1 << 40])
def test_offsets_lie_on_the_disk_and_do_not_repeat(size: int) -> None:
    offsets = list(Offsets(size, 4096, min(1000, size // 4096)))
    assert len(set(offsets)) == len(offsets)
    assert all(0 <= offset <= size - 4096 and offset % 4096 == 0 for offset in offsets)


def test_every_place_is_visited_before_one_is_again() -> None:
    assert set(Offsets(MIB, 4096, 256)) == set(range(0, MIB, 4096))


def test_the_step_is_one_that_qemu_img_takes() -> None:
    assert Offsets(1 << 40, 4096, 1).step < 1 << 31


def test_a_raw_disk_is_incompressible_and_always_the_same(tmp_path: Path) -> None:
    fill_raw(tmp_path / "a", 5 * MIB)
    fill_raw(tmp_path / "b", 5 * MIB)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert len(content) == 5 * MIB
    assert len({content[i : i + 4096] for i in range(0, len(content), 4096)}) == len(content) // 4096


def test_a_workspace_is_gone_afterwards_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), workspace(tmp_path, "x") as place:
        place.read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_holes_can_be_warmed(tmp_path: Path) -> None:
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x" * 4096)
    warm(path)
    warm_in_small_pages(path)
    assert path.stat().st_size == 1 << 40


@needs_qemu
def test_a_qcow2_disk_is_full_of_data(tmp_path: Path) -> None:
    assert data_of(make_disk(tmp_path / "d.qcow2", "qcow2", 4 * MIB)) == 4 * MIB


@needs_qemu
def test_an_overlay_holds_the_share_that_was_asked_for(tmp_path: Path) -> None:
    base = make_disk(tmp_path / "base.qcow2", "qcow2", 4 * MIB)
    overlay = make_overlay(tmp_path / "o.qcow2", base, "qcow2", allocated=0.25, size=4 * MIB)
    assert data_of(overlay) == MIB


@needs_qemu
def test_a_sparse_disk_holds_lone_clusters(tmp_path: Path) -> None:
    assert data_of(make_sparse(tmp_path / "s.qcow2", 1 << 40, 16 * CLUSTER)) == 16 * CLUSTER
