"""The demo's disk and the guest that changes it: the model holds what the disk holds."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

import blocklayer
from blocklayer.base.units import KIB, MIB
from blocklayer.cli import demo_disk
from blocklayer.cli.demo_disk import BATCH, BLOCK, Guest, call, file_blocks, find, have, make_disk
from tests.helpers.peers import needs

EXT4 = needs("mkfs.ext4", "debugfs")


def test_programs_are_found_also_among_those_of_the_system() -> None:
    assert have("sh")
    assert not have("sh", "no-such-program")
    assert find("no-such-program") is None


async def test_a_call_answers_status_and_everything_printed() -> None:
    assert await call("sh", "-c", "echo out; echo err >&2; exit 3") == (3, "out\nerr\n")


@EXT4
async def test_a_disk_is_a_file_system_whose_files_are_where_the_map_says(here: Path) -> None:
    model, files, scratch = await make_disk("disk.raw", 16 * MIB, seed=5)
    assert Path("disk.raw").read_bytes() == model
    assert len(model) == 16 * MIB
    assert len(files) == demo_disk.DIRECTORIES * demo_disk.FILES_EACH
    blocks = [block for each in (*files.values(), scratch) for block in each]
    assert len(set(blocks)) == len(blocks)
    assert len(scratch) == 4 * MIB // BLOCK
    guest = Guest(model, files, scratch, random.Random(1))
    name = "dir1/file2.bin"
    await call("debugfs", "-R", f"dump /{name} out.bin", "disk.raw")
    assert Path("out.bin").read_bytes() == guest.content(name)
    assert await file_blocks("disk.raw", name) == files[name]
    assert sorted(path.name for path in here.iterdir()) == ["disk.raw", "out.bin"]


async def test_without_file_system_tools_the_disk_is_random_data(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_disk, "find", lambda program: None)
    model, files, scratch = await make_disk("disk.raw", MIB, seed=5)
    assert Path("disk.raw").read_bytes() == model
    assert (len(model), files, scratch) == (MIB, {}, list(range(MIB // BLOCK // 2)))
    assert any(model[: MIB // 4])
    assert not any(model[MIB // 4 :])


async def test_a_seed_repeats_a_disk_without_a_file_system(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_disk, "find", lambda program: None)
    first, second, other = [(await make_disk("disk.raw", MIB, seed=seed))[0] for seed in (5, 5, 6)]
    assert first == second != other


async def test_a_guest_changes_disk_and_model_alike() -> None:
    model = bytearray(256 * KIB)
    files = {"a": [3, 4], "b": [9]}
    guest = Guest(model, files, list(range(20, 60)), random.Random(1))
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "memory", "size": len(model)})
        writing = asyncio.create_task(guest.run(disk))
        while guest.files_changed < 3:
            await asyncio.sleep(0)
        async with guest.lock:
            writing.cancel()
            assert await disk.read(0, len(model)) == model
            written = guest.writes
    assert written >= 3
    assert [block for block in range(64) if any(model[block * BLOCK : (block + 1) * BLOCK])][:3] == [3, 4, 9]
    assert not any(model[10 * BLOCK : 20 * BLOCK])


async def test_between_batches_no_write_is_half_done() -> None:
    """Who holds the lock sees a disk that is as the model is, whenever that is."""
    model = bytearray(256 * KIB)
    guest = Guest(model, {}, list(range(64)), random.Random(2))
    async with blocklayer.Graph() as graph:
        disk = await graph.open({"driver": "memory", "size": len(model)})
        writing = asyncio.create_task(guest.run(disk))
        for _ in range(20):
            await asyncio.sleep(0)
            async with guest.lock:
                assert guest.writes % BATCH == 0
                assert await disk.read(0, len(model)) == model
        writing.cancel()


def test_checksums_are_those_of_the_disk_that_is_given() -> None:
    model = bytearray(b"a" * BLOCK + b"b" * BLOCK + b"c" * BLOCK)
    guest = Guest(model, {"x": [2, 0]}, [1], random.Random(1))
    assert guest.content("x") == b"c" * BLOCK + b"a" * BLOCK
    older = bytes(3 * BLOCK)
    assert guest.content("x", older) == bytes(2 * BLOCK)
    assert guest.checksums(older) != guest.checksums(bytes(model))
    assert guest.checksums(bytes(model)).keys() == {"x"}
