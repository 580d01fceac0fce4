"""Resizing: what is new reads as zeroes whatever lay there, what is cut does not come back, a failure leaves one size."""

from __future__ import annotations

import asyncio

import pytest

from blocklayer.base.errors import (
    IOFailedError,
    LimitError,
    NoSpaceError,
    OptionError,
    OutOfRangeError,
    UnsupportedError,
)
from blocklayer.base.modes import Preallocation
from blocklayer.base.units import KIB, MIB, TIB
from tests.helpers.qcow2_disk import (
    assert_sound,
    check_bytes,
    file_of,
    header_of,
    memory_graph,
    new_image,
    open_image,
    opened,
    qcow2,
)
from tests.helpers.scripted import FailNth, Gate
from tests.helpers.virtual_time import virtual_time

CLUSTER = 4096
SIZE = 256 * KIB

IMAGES = {
    "plain": {},
    "version 2": {"compat": "0.10"},
    "extended": {"cluster_size": 16 * KIB, "extended_l2": True},
    "small clusters": {"cluster_size": 512},
}


def backing() -> dict[str, object]:
    """A backing file larger than any disk here."""
    return {"backing": {"driver": "memfile", "content": bytearray(b"\xba" * 4 * SIZE)}}


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("size", [SIZE // 2, SIZE // 2 + 512, SIZE - 512, 512, 0])
@pytest.mark.parametrize("image", IMAGES)
@virtual_time
async def test_what_was_cut_does_not_come_back(image: str, size: int, backed: bool) -> None:
    content = new_image(SIZE, **{"cluster_size": CLUSTER, **IMAGES[image]})
    options = backing() if backed else {}
    async with opened(content, **options) as disk:
        await disk.write(0, b"x" * SIZE)
        await disk.truncate(size)
        assert disk.size == header_of(content).size == size
        with pytest.raises(OutOfRangeError):
            await disk.read(size, 1)
        await disk.truncate(2 * SIZE)
        wanted = b"x" * size + bytes(2 * SIZE - size)
        assert await disk.read(0, 2 * SIZE) == wanted
    assert_sound(content)
    async with opened(content, read_only=True, **(backing() if backed else {})) as disk:
        assert await disk.read(0, 2 * SIZE) == wanted


@virtual_time
async def test_space_of_what_was_cut_is_used_again() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        for turn in range(6):
            await disk.write(0, bytes([turn]) * SIZE)
            await disk.truncate(0)
            await disk.truncate(SIZE)
        await disk.write(0, b"end")
    assert len(content) < 4 * SIZE
    assert check_bytes(content).allocated_clusters == 1
    assert_sound(content)


@virtual_time
async def test_l1_grows_by_moving_and_its_old_place_becomes_free() -> None:
    content = new_image(SIZE, cluster_size=512)
    before = header_of(content)
    async with opened(content) as disk:
        await disk.write(0, b"x" * SIZE)
        await disk.truncate(64 * MIB)
        await disk.write(64 * MIB - 512, b"end")
        await disk.write(MIB, b"y" * 64 * KIB)
        assert await disk.read(0, SIZE + 512) == b"x" * SIZE + bytes(512)
        assert await disk.read(64 * MIB - 512, 3) == b"end"
    after = header_of(content)
    assert after.l1_size == 64 * MIB // (32 * KIB)
    assert after.l1_table_offset != before.l1_table_offset
    assert_sound(content)


@virtual_time
async def test_a_disk_without_bytes_grows_too() -> None:
    content = new_image(0)
    async with opened(content) as disk:
        await disk.truncate(MIB)
        await disk.write(MIB - 3, b"end")
        assert await disk.read(0, MIB) == bytes(MIB - 3) + b"end"
    assert_sound(content)


@pytest.mark.parametrize(
    ("size", "preallocation", "kind", "text"),
    [
        (SIZE + 1, "off", OptionError, "multiple of 512"),
        (1 << 62, "off", LimitError, "larger clusters"),
        (SIZE // 2, "full", OptionError, "shrinks"),
    ],
)
@virtual_time
async def test_sizes_that_cannot_be(size: int, preallocation: str, kind: type[Exception], text: str) -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    before = bytes(content)
    async with opened(content) as disk:
        with pytest.raises(kind, match=text):
            await disk.truncate(size, Preallocation(preallocation))
        assert disk.size == SIZE
    assert content == before


@virtual_time
async def test_an_image_with_snapshots_keeps_its_size() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        driver = qcow2(disk)
        driver.image.change_header(nb_snapshots=1)
        with pytest.raises(UnsupportedError, match="internal snapshots"):
            await disk.truncate(2 * SIZE)
        driver.image.change_header(nb_snapshots=0)


@virtual_time
async def test_bytes_behind_the_end_of_a_disk_that_others_left_do_not_appear_when_it_grows() -> None:
    """In the last cluster, in clusters behind it, and in tables behind these."""
    content = new_image(SIZE, cluster_size=512)
    async with opened(content) as disk:
        await disk.write(0, b"x" * SIZE)
    size = SIZE // 2 + 256 * 2
    content[24:32] = (size - 512).to_bytes(8, "big")
    async with opened(content) as disk:
        assert disk.size == size - 512
        await disk.truncate(SIZE)
        assert await disk.read(0, SIZE) == b"x" * (size - 512) + bytes(SIZE - size + 512)
    assert_sound(content)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("image", IMAGES)
@virtual_time
async def test_new_clusters_may_be_allocated_and_are_then_written_in_place(image: str, preallocation: str) -> None:
    content = new_image(SIZE, **{"cluster_size": CLUSTER, **IMAGES[image]})
    async with opened(content, **backing()) as disk:
        await disk.write(0, b"junk" * 10000)
        await disk.truncate(0)
        await disk.truncate(SIZE, Preallocation(preallocation))
        assert await disk.read(0, SIZE) == bytes(SIZE)
        length = len(content)
        await disk.write(100, b"x" * (SIZE - 200))
        await disk.flush()
        assert len(content) == length, "there was room for all of it"
    assert_sound(content)


@pytest.mark.parametrize("preallocation", ["off", "full"])
@virtual_time
async def test_a_failed_resize_leaves_a_disk_of_one_size_or_the_other(preallocation: str) -> None:
    base = new_image(SIZE, cluster_size=512)
    for target in (SIZE // 2, 3 * MIB):
        mode = Preallocation(preallocation) if target > SIZE else Preallocation.OFF
        nth, failed = 1, True
        while failed:
            content = bytearray(base)
            async with memory_graph() as graph:
                disk = await open_image(graph, content, **backing())
                await disk.write(0, b"x" * SIZE)
                await disk.flush()
                script = file_of(disk).script = FailNth("any", nth, lambda: NoSpaceError("full", errno=28))
                try:
                    await disk.truncate(target, mode)
                except IOFailedError:
                    pass
                failed = script.seen >= nth
                script.nth = -1
                assert disk.size in (SIZE, target)
                size = disk.size
                assert await disk.read(0, min(size, target, SIZE)) == b"x" * min(size, target, SIZE)
                await disk.truncate(4 * MIB)
                assert await disk.read(0, 4 * MIB) == b"x" * min(size, SIZE) + bytes(4 * MIB - min(size, SIZE))
                await disk.close()
            assert_sound(content)
            nth += 40 if preallocation == "full" else 1
    assert nth > 3


@virtual_time
async def test_requests_on_what_is_cut_or_added_wait_for_the_resize() -> None:
    content = new_image(SIZE, cluster_size=CLUSTER)
    async with opened(content) as disk:
        gate = file_of(disk).script = Gate("flush")
        resizing = asyncio.create_task(disk.truncate(SIZE // 2))
        await gate.reached.wait()
        writing = asyncio.create_task(disk.write(SIZE // 2 - 512, b"w" * 512))
        beyond = asyncio.create_task(disk.read(SIZE - 512, 512))
        for _ in range(20):
            await asyncio.sleep(0)
        assert writing.done()
        assert not beyond.done()
        gate.opened.set()
        await resizing
        await asyncio.wait([beyond])
        with pytest.raises(OutOfRangeError):
            await disk.read(SIZE - 512, 512)
    assert_sound(content)


@virtual_time
async def test_growing_to_sixteen_tebibytes_is_quick() -> None:
    """What was never written takes neither tables nor time."""
    content = new_image(MIB, cluster_size=2 * MIB)
    async with opened(content) as disk:
        await disk.truncate(16 * TIB)
        await disk.write(16 * TIB - 512, b"end")
        assert await disk.read(16 * TIB - 1024, 512) == bytes(512)
    assert len(content) < 32 * MIB
    assert_sound(content)
