"""The command lines and outputs of qemu-img bench and fio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import fio, qemu_img, storage_daemon
from benchmarks.fio import Load, parse_rate, rate_within
from benchmarks.images import MIB, Offsets, fill_raw
from benchmarks.qemu_img import Bench, parse_seconds
from tests.helpers.peers import needs

if TYPE_CHECKING:
    from pathlib import Path


def test_the_time_of_qemu_img_bench_is_in_its_last_line() -> None:
    assert parse_seconds("Sending 10 read requests\nRun completed in 1.250 seconds.\n") == 1.25


def test_output_without_a_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="says no time"):
        parse_seconds("Sending 10 read requests\n")


def test_both_sides_of_single_requests_use_one_step(tmp_path: Path) -> None:
    offsets = Offsets(MIB, 4096, 10)
    arguments = Bench(tmp_path, "raw", offsets, 16, write=True).arguments()
    assert arguments[arguments.index("-S") + 1] == str(offsets.step)
    assert "-w" in arguments


@needs(qemu_img.PROGRAM)
def test_qemu_img_bench_visits_the_same_offsets_as_we_do(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(MIB)
    offsets = Offsets(MIB, 4096, 100)
    with path.open("r+b") as file:
        for offset in range(0, MIB, 4096):
            file.seek(offset)
            file.write(b"\xff" * 4096)
    assert Bench(path, "raw", offsets, 4, write=True).rate() > 0
    content = path.read_bytes()
    written = {offset for offset in range(0, MIB, 4096) if content[offset] != 0xFF}
    assert written == set(offsets)


def test_fio_tells_its_rate_behind_its_warnings() -> None:
    assert parse_rate('fio: a warning\n{"jobs": [{"write": {"iops": 1234.5}}]}') == 1234.5


def test_only_completions_within_the_window_count() -> None:
    assert rate_within([0.5, 1.0, 2.0, 3.0, 3.5], 1.0, 3.0) == 1.5


def test_a_load_ends_by_count_or_by_time(tmp_path: Path) -> None:
    by_count = Load(tmp_path / "s", "disk", MIB, 16, tmp_path, count=10).arguments()
    by_time = Load(tmp_path / "s", "disk", MIB, 16, tmp_path, runtime_s=2).arguments()
    assert "--number_ios=10" in by_count
    assert "--runtime=2" not in by_count
    assert "--runtime=2" in by_time


@needs(fio.PROGRAM, storage_daemon.PROGRAM)
async def test_fio_writes_through_the_daemon_and_logs_each_completion(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    fill_raw(disk, MIB)
    load = Load(tmp_path / "sock", "disk", MIB, 4, tmp_path / "logs", count=50)
    async with storage_daemon.running() as daemon:
        await daemon.execute("blockdev-add", **storage_daemon.node_options("disk", disk, "raw", unsafe=True))
        await daemon.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(load.socket)}})
        await daemon.execute("block-export-add", type="nbd", id="e", node_name="disk", name="disk", writable=True)
        async with fio.running(load) as process:
            assert await fio.result(process) > 0
    assert len(load.completions()) == 50
