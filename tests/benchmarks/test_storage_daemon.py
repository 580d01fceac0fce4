"""The driver of qemu-storage-daemon: it starts, answers, does its job and is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import storage_daemon
from benchmarks.backups import Backup
from benchmarks.images import MIB, make_disk
from benchmarks.storage_daemon import DaemonError, node_options, peak_memory
from tests.helpers.peers import needs

pytestmark = needs(storage_daemon.PROGRAM)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_daemon_is_gone_when_its_block_is_left() -> None:
    async with storage_daemon.running() as daemon:
        pid = daemon.pid
        assert is_alive(pid)
    assert not is_alive(pid)


async def test_a_daemon_is_gone_after_an_error_too() -> None:
    pids: list[int] = []

    async def fail() -> None:
        async with storage_daemon.running() as daemon:
            pids.append(daemon.pid)
            await daemon.execute("no-such-command")

    with pytest.raises(DaemonError):
        await fail()
    assert [is_alive(pid) for pid in pids] == [False]


async def test_a_refused_command_is_an_error_that_names_it() -> None:
    async with storage_daemon.running() as daemon:
        with pytest.raises(DaemonError, match=r"^blockdev-del: .*nothing"):
            await daemon.execute("blockdev-del", node_name="nothing")


async def test_a_backup_runs_to_its_event_and_lets_go_of_its_nodes(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source.raw", "raw", MIB)
    target = tmp_path / "target.raw"
    target.write_bytes(bytes(MIB))
    async with storage_daemon.running() as daemon:
        await daemon.execute("blockdev-add", **node_options("source", source, "raw", unsafe=True))
        await daemon.execute("blockdev-add", **node_options("target", target, "raw", unsafe=True))
        await daemon.execute("blockdev-backup", job_id="job", device="source", target="target", sync="full")
        await daemon.finish_job()
        await daemon.forget_job()
        await daemon.execute("blockdev-del", node_name="target")
    assert source.read_bytes() == target.read_bytes()


def test_the_peers_side_of_a_backup_tells_time_and_memory_and_leaves_no_target(tmp_path: Path) -> None:
    source = make_disk(tmp_path / "source.raw", "raw", MIB)
    figures = Backup(source, "raw", tmp_path / "target", "qcow2", MIB, durable=True).by_peer()
    assert figures["time"] > 0
    assert figures["peak"] > 1
    assert list(tmp_path.iterdir()) == [source]


def test_the_peak_of_this_process_is_at_least_what_it_uses() -> None:
    assert peak_memory(os.getpid()) > MIB
