"""File: what block status tells while the file changes, copies inside the kernel, and block devices."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess

import pytest

from blocklayer.aio import fallocate as fallocate_module
from blocklayer.aio import file as file_module
from blocklayer.aio.fallocate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from blocklayer.aio.file import File
from blocklayer.base.errors import IOFailedError, NoSpaceError, UnsupportedError
from blocklayer.base.modes import CacheMode, Preallocation
from blocklayer.base.units import KIB, MIB
from tests.helpers.blocking import Blocking

UNIT = 64 * KIB
"""Holes of any file system's block size."""

SIZE = 8 * UNIT


@pytest.fixture
async def file(engine, tmp_path):
    """Units: data, hole, hole, data, data, hole, hole, hole."""
    path = tmp_path / "disk"
    with path.open("wb") as writer:
        writer.truncate(SIZE)
        for unit in (0, 3, 4):
            os.pwrite(writer.fileno(), b"d" * UNIT, unit * UNIT)
    opened = await File.open(engine, str(path))
    yield opened
    await opened.close()


async def runs(file):
    """The whole file as runs of units."""
    found, offset = [], 0
    while offset < file.size:
        is_data, length = await file.block_status(offset, file.size - offset)
        found.append((is_data, length / UNIT))
        offset += length
    return found


# -- block status --------------------------------------------------------------------------------------------------


async def test_data_and_holes_are_told_as_they_alternate(file):
    assert await runs(file) == [(True, 1), (False, 2), (True, 2), (False, 3)]


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 1, (True, 1)),
        (100, SIZE, (True, UNIT - 100)),
        (UNIT, UNIT, (False, UNIT)),
        (UNIT + 1, SIZE, (False, 2 * UNIT - 1)),
        (SIZE - 1, 1, (False, 1)),
        (SIZE - 1, 100, (False, 1)),
    ],
)
async def test_a_status_holds_from_the_offset_on_and_no_longer_than_asked(file, offset, length, expected):
    assert await file.block_status(offset, length) == expected


async def test_the_run_that_was_found_last_is_known_at_once(file):
    assert file.try_block_status(0, 1) is None
    await file.block_status(UNIT, 1)
    assert file.try_block_status(UNIT, SIZE) == (False, 2 * UNIT)
    assert file.try_block_status(2 * UNIT + 5, 10) == (False, 10)
    assert [file.try_block_status(offset, 1) for offset in (UNIT - 1, 3 * UNIT)] == [None, None]


CHANGES = {
    "write": lambda file: file.write(UNIT, memoryview(b"x" * UNIT)),
    "write_zeroes": lambda file: file.write_zeroes(0, UNIT, may_unmap=True),
    "discard": lambda file: file.discard(0, UNIT),
    "truncate": lambda file: file.truncate(UNIT // 2),
    "copy": lambda file: file.copy_range_to(file, 3 * UNIT, UNIT, UNIT),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_makes_it_forget_what_it_knew(file, change):
    await file.block_status(UNIT, 1)
    await CHANGES[change](file)
    assert file.try_block_status(UNIT, 1) is None


@pytest.mark.parametrize("change", CHANGES)
async def test_an_answer_that_a_change_overtook_is_not_kept(file, monkeypatch, change):
    """The thread has looked; before anybody hears of it the file changes."""
    look = file_module._seek
    blocking = Blocking()

    def looks(*args):
        answer = look(*args)
        blocking()
        return answer

    monkeypatch.setattr(file_module, "_seek", looks)
    asked = asyncio.ensure_future(file.block_status(UNIT, 2 * UNIT))
    await blocking.reached.wait()
    await CHANGES[change](file)
    blocking.let_go()
    assert await asked == (False, 2 * UNIT)
    assert file.try_block_status(UNIT, 1) is None


async def test_an_answer_that_came_during_a_change_is_forgotten_when_the_change_is_done(file, monkeypatch):
    blocking = Blocking(os.pwritev)
    monkeypatch.setattr(os, "pwritev", blocking)
    writing = asyncio.ensure_future(file.write(UNIT, memoryview(b"x" * UNIT)))
    await blocking.reached.wait()
    assert await file.block_status(UNIT, UNIT) == (False, UNIT)
    blocking.let_go()
    await writing
    assert file.try_block_status(UNIT, 1) is None
    assert await file.block_status(UNIT, UNIT) == (True, UNIT)


async def test_answers_to_several_at_once_are_all_right(file):
    answers = await asyncio.gather(*(file.block_status(unit * UNIT, SIZE) for unit in range(8)))
    assert answers == [
        (kind, count * UNIT)
        for kind, count in [(True, 1), (False, 2), (False, 1), (True, 2), (True, 1), (False, 3), (False, 2), (False, 1)]
    ]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EIO])
async def test_where_nobody_can_tell_all_is_data(file, monkeypatch, code):
    def lseek(_fd, _offset, _how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "lseek", lseek)
    assert await runs(file) == [(True, 8)]


# -- copies --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def target(engine, tmp_path):
    path = tmp_path / "target"
    path.write_bytes(b"t" * 2 * UNIT)
    opened = await File.open(engine, str(path))
    yield opened
    await opened.close()


def content(file):
    return os.pread(file.fd, 100 * MIB, 0)


async def test_the_kernel_copies_and_the_target_grows(file, target):
    assert await file.copy_range_to(target, 3 * UNIT + 5, UNIT, 2 * UNIT) is True
    assert content(target) == b"t" * UNIT + b"d" * (2 * UNIT - 5) + bytes(5)
    assert target.size == 3 * UNIT


async def test_a_copy_from_behind_the_end_is_left_to_somebody_who_writes_zeroes(file, target):
    """What lies behind the end of the source reads as zeroes; the kernel would leave the target as it is."""
    assert await file.copy_range_to(target, SIZE - 100, 0, 200) is False
    assert target.size == 2 * UNIT


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF])
async def test_a_kernel_that_will_not_copy_is_no_error(file, target, monkeypatch, code):
    def refuses(*_args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuses)
    assert await file.copy_range_to(target, 0, 0, UNIT) is False


async def test_a_copy_that_fails_is_an_error_and_the_size_stays_right(file, target, monkeypatch):
    real = os.copy_file_range

    def fails_late(source, into, length, source_offset, target_offset):
        if target_offset > 2 * UNIT:
            raise OSError(errno.EIO, "bad medium")
        return real(source, into, min(length, UNIT), source_offset, target_offset)

    monkeypatch.setattr(os, "copy_file_range", fails_late)
    with pytest.raises(IOFailedError) as caught:
        await file.copy_range_to(target, 0, 2 * UNIT, 3 * UNIT)
    assert (caught.value.errno, str(caught.value)) == (
        errno.EIO,
        f"file '{file.path}': copy failed: Input/output error (at 0x0+196608)",
    )
    assert target.size == os.fstat(target.fd).st_size == 3 * UNIT


async def test_short_copies_go_on(file, target, monkeypatch):
    real = os.copy_file_range

    def little(source, into, length, source_offset, target_offset):
        return real(source, into, min(length, 10_000), source_offset, target_offset)

    monkeypatch.setattr(os, "copy_file_range", little)
    assert await file.copy_range_to(target, 2 * UNIT, 0, 3 * UNIT) is True
    assert content(target) == bytes(UNIT) + b"d" * 2 * UNIT


@pytest.mark.parametrize(("cache", "synced"), [(CacheMode.WRITETHROUGH, 1), (CacheMode.WRITEBACK, 0)])
async def test_a_copy_into_a_write_through_file_is_durable_before_it_is_done(
    engine, file, tmp_path, monkeypatch, cache, synced
):
    calls = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    into = await File.open(engine, str(tmp_path / "other"), create=True, cache=cache)
    await file.copy_range_to(into, 0, 0, UNIT)
    await into.close()
    assert calls == [into.fd] * synced


# -- ranges that are not whole blocks, and devices -----------------------------------------------------------------


async def test_a_range_that_is_refused_is_no_reason_to_refuse_all_others(file, monkeypatch):
    real, asked = fallocate_module._fallocate, []

    def whole_blocks(fd, mode, offset, length):
        asked.append((mode, offset, length))
        if offset % 512 or length % 512:
            fallocate_module.ctypes.set_errno(errno.EINVAL)
            return -1
        return real(fd, mode, offset, length)

    monkeypatch.setattr(fallocate_module, "_fallocate", whole_blocks)
    punch = PUNCH_HOLE | KEEP_SIZE
    await file.write_zeroes(3 * UNIT + 1, 2, may_unmap=True)
    await file.write_zeroes(3 * UNIT, 512, may_unmap=True)
    await file.discard(3 * UNIT + 512, 512)
    assert asked == [
        (punch, 3 * UNIT + 1, 2),
        (ZERO_RANGE, 3 * UNIT + 1, 2),
        (punch, 3 * UNIT, 512),
        (punch, 3 * UNIT + 512, 512),
    ]
    assert content(file)[3 * UNIT : 3 * UNIT + 1025] == bytes(1024) + b"d"


@pytest.fixture
def device(tmp_path):
    """A loop device of 8 MiB, where the machine lets us make one."""
    image = tmp_path / "image"
    with image.open("wb") as writer:
        writer.truncate(8 * MIB)
    try:
        made = subprocess.run(["losetup", "--show", "-f", image], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("not installed: losetup")
    if made.returncode:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


@pytest.mark.parametrize("cache", [CacheMode.WRITEBACK, CacheMode.NONE])
async def test_a_block_device_holds_what_a_file_holds_and_cannot_grow(engine, device, cache):
    file = await File.open(engine, device, cache=cache)
    assert (file.size, file.is_device, file.request_alignment) == (8 * MIB, True, 512 if cache.direct else 1)
    expected = bytearray(os.urandom(MIB))
    await file.write(0, memoryview(expected))
    await file.write_zeroes(4096, 8192, may_unmap=True)
    await file.write_zeroes(16384, 8192, may_unmap=False)
    if not cache.direct:
        await file.write_zeroes(100, 7, may_unmap=True)
        expected[100:107] = bytes(7)
    await file.discard(65536, 4096)
    for offset, length in ((4096, 8192), (16384, 8192), (65536, 4096)):
        expected[offset : offset + length] = bytes(length)
    await file.flush()
    buffer = bytearray(MIB)
    await file.read_into(0, memoryview(buffer))
    assert buffer == expected
    assert await file.block_status(MIB, 100 * MIB) == (True, 7 * MIB), "a device does not tell holes"
    for behind in (file.write(8 * MIB, memoryview(bytes(4096))), file.write_zeroes(8 * MIB, 4096, may_unmap=False)):
        with pytest.raises(NoSpaceError):
            await behind
    with pytest.raises(UnsupportedError) as caught:
        await file.truncate(9 * MIB, Preallocation.OFF)
    assert str(caught.value) == f"file '{device}': a block device of 8388608 bytes cannot grow to 9437184"
    await file.truncate(MIB)
    assert file.size == 8 * MIB
    await file.close()
