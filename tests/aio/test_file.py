"""File: reading at once or not, writing, zeroes, holes, sizes, and what stays right when a change fails or is cancelled."""

from __future__ import annotations

import asyncio
import errno
import os
import stat

import pytest

from blocklayer.aio import fallocate as fallocate_module
from blocklayer.aio.fallocate import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from blocklayer.aio.file import File
from blocklayer.base.errors import (
    AccessDeniedError,
    IOFailedError,
    MissingFileError,
    NoSpaceError,
    UnsupportedError,
)
from blocklayer.base.modes import Preallocation
from blocklayer.base.units import KIB, MIB
from tests.helpers.blocking import Blocking, turns

SIZE = 256 * KIB
DATA = bytes(index % 251 + 1 for index in range(SIZE))


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "disk"
    target.write_bytes(DATA)
    return target


@pytest.fixture
async def file(engine, path):
    opened = await File.open(engine, str(path))
    yield opened
    await opened.close()


def fails(code):
    def function(*_args):
        raise OSError(code, os.strerror(code))

    return function


async def error_of(awaitable):
    with pytest.raises(IOFailedError) as caught:
        await awaitable
    return type(caught.value), caught.value.errno, str(caught.value)


def descriptors():
    return set(os.listdir("/proc/self/fd"))


# -- opening and closing -------------------------------------------------------------------------------------------


async def test_an_open_file_knows_what_it_is(file, path):
    assert repr(file) == f"<File '{path}' fd {file.fd} rw writeback {SIZE} bytes>"
    assert (file.size, file.is_device, file.request_alignment, file.memory_alignment) == (SIZE, False, 1, 1)
    assert os.get_inheritable(file.fd) is False


async def test_a_file_is_created_only_if_that_is_asked_for_and_never_emptied(engine, tmp_path, path):
    assert await error_of(File.open(engine, str(tmp_path / "new"))) == (
        MissingFileError,
        errno.ENOENT,
        f"file '{tmp_path / 'new'}': open failed: No such file or directory",
    )
    created = await File.open(engine, str(tmp_path / "new"), create=True)
    kept = await File.open(engine, str(path), create=True)
    assert (created.size, kept.size) == (0, SIZE)
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) & ~0o644 == 0
    await created.close()
    await kept.close()
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("read_only", [True, False])
async def test_a_folder_is_no_disk(engine, tmp_path, read_only):
    _, code, text = await error_of(File.open(engine, str(tmp_path), read_only=read_only))
    assert (code, text) == (errno.EISDIR, f"file '{tmp_path}': open failed: Is a directory")


async def test_a_named_pipe_is_refused_and_not_waited_for(engine, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    async with asyncio.timeout(10):
        _, code, _ = await error_of(File.open(engine, str(tmp_path / "pipe"), read_only=True))
    assert code == errno.ENOTBLK


async def test_an_open_that_fails_leaves_no_descriptor(engine, tmp_path, path, monkeypatch):
    await engine.call(int)
    before = descriptors()
    await error_of(File.open(engine, str(tmp_path), read_only=True))
    monkeypatch.setattr(os, "lseek", fails(errno.EIO))
    await error_of(File.open(engine, str(path)))
    assert descriptors() == before


async def test_an_open_that_is_cancelled_leaves_no_descriptor(engine, path, monkeypatch):
    await engine.call(int)
    before = descriptors()
    blocking = Blocking(os.open)
    monkeypatch.setattr(os, "open", blocking)
    opening = asyncio.ensure_future(File.open(engine, str(path)))
    await blocking.reached.wait()
    opening.cancel()
    blocking.let_go()
    await asyncio.gather(opening, return_exceptions=True)
    assert opening.cancelled()
    assert descriptors() == before


@pytest.mark.parametrize("count", range(6))
async def test_a_close_that_is_cancelled_at_any_moment_has_closed(engine, path, count):
    await engine.call(int)
    before = descriptors()
    file = await File.open(engine, str(path))
    closing = asyncio.ensure_future(file.close())
    await turns(count)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await file.close()
    assert descriptors() == before


async def test_closing_twice_closes_no_descriptor_that_was_given_to_somebody_else(engine, path):
    file = await File.open(engine, str(path))
    await file.close()
    other = await File.open(engine, str(path))
    assert other.fd == file.fd
    await file.close()
    buffer = bytearray(5)
    await other.read_into(0, memoryview(buffer))
    await other.close()
    assert buffer == DATA[:5]


# -- reading -------------------------------------------------------------------------------------------------------


async def test_cached_data_are_there_at_once_and_a_read_past_the_end_is_left_to_the_coroutine(file):
    inside, across, behind = bytearray(100), bytearray(100), bytearray(100)
    answers = [
        file.try_read_into(50, memoryview(inside)),
        file.try_read_into(SIZE - 50, memoryview(across)),
        file.try_read_into(SIZE, memoryview(behind)),
        file.try_read_into(0, memoryview(bytearray())),
    ]
    assert (answers, inside) == ([True, False, False, True], DATA[50:150])
    await file.read_into(SIZE - 50, memoryview(across))
    await file.read_into(SIZE, memoryview(behind))
    assert (across, behind) == (DATA[-50:] + bytes(50), bytes(100))


def nowait(outcomes, calls):
    """``os.preadv`` that answers a read at once by what ``outcomes`` say; other reads are as ever."""
    real = os.preadv

    def preadv(fd, buffers, offset, flags=0):
        if not flags:
            return real(fd, buffers, offset)
        calls.append(flags)
        outcome = outcomes.pop(0)
        if outcome < 0:
            raise OSError(-outcome, os.strerror(-outcome))
        return real(fd, [buffers[0][:outcome]], offset)

    return preadv


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EIO, errno.EINTR])
async def test_what_is_not_cached_is_tried_again_the_next_time(file, monkeypatch, code):
    calls = []
    monkeypatch.setattr(os, "preadv", nowait([-code, 60, 100], calls))
    buffer = bytearray(100)
    assert [file.try_read_into(0, memoryview(buffer)) for _ in range(3)] == [False, False, True]
    assert (buffer, calls) == (DATA[:100], [os.RWF_NOWAIT] * 3)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
async def test_a_file_system_that_cannot_answer_at_once_is_asked_once(file, monkeypatch, code):
    calls = []
    monkeypatch.setattr(os, "preadv", nowait([-code], calls))
    buffer = bytearray(100)
    assert [file.try_read_into(0, memoryview(buffer)) for _ in range(3)] == [False] * 3
    assert len(calls) == 1
    await file.read_into(0, memoryview(buffer))
    assert buffer == DATA[:100]


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EIO, IOFailedError), (errno.ENOSPC, NoSpaceError), (errno.EROFS, AccessDeniedError)]
)
async def test_errors_name_the_file_the_place_and_the_system_s_reason(file, path, monkeypatch, code, kind):
    for name in ("preadv", "pwritev", "ftruncate"):
        monkeypatch.setattr(os, name, fails(code))
    monkeypatch.setattr(fallocate_module, "_fallocate", None)
    reason = os.strerror(code)
    assert [
        await error_of(file.read_into(512, memoryview(bytearray(8)))),
        await error_of(file.write(0, memoryview(b"abc"))),
        await error_of(file.truncate(4096)),
        await error_of(file.write_zeroes(0, 512, may_unmap=False)),
    ] == [
        (kind, code, f"file '{path}': read failed: {reason} (at 0x200+8)"),
        (kind, code, f"file '{path}': write failed: {reason} (at 0x0+3)"),
        (kind, code, f"file '{path}': truncate failed: {reason} (at 0x1000)"),
        (kind, code, f"file '{path}': write failed: {reason} (at 0x0+512)"),
    ]


async def test_after_a_failed_flush_every_later_flush_fails(file, path, monkeypatch):
    """The kernel tells of a lost write once; later it would say that all is well."""
    monkeypatch.setattr(os, "fdatasync", fails(errno.EIO))
    expected = (IOFailedError, errno.EIO, f"file '{path}': flush failed: Input/output error")
    assert await error_of(file.flush()) == expected
    monkeypatch.setattr(os, "fdatasync", lambda _fd: None)
    assert await error_of(file.flush()) == expected


async def test_a_read_only_file_has_nothing_to_flush_and_takes_no_writes(engine, path, monkeypatch):
    monkeypatch.setattr(os, "fdatasync", fails(errno.EIO))
    file = await File.open(engine, str(path), read_only=True)
    await file.flush()
    _, code, _ = await error_of(file.write(0, memoryview(b"x")))
    await file.close()
    assert (code, path.read_bytes()) == (errno.EBADF, DATA)


# -- zeroes and discards -------------------------------------------------------------------------------------------


class Allocator:
    """fallocate as a file system with the given abilities has it; notes what was asked for."""

    def __init__(self, patch, *modes):
        real = fallocate_module._fallocate
        self.asked = []

        def function(fd, mode, offset, length):
            self.asked.append((mode, offset, length))
            if mode in modes:
                return real(fd, mode, offset, length)
            fallocate_module.ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

        patch.setattr(fallocate_module, "_fallocate", function)


ALL = (0, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE)
PUNCHES = (0, PUNCH_HOLE | KEEP_SIZE)


@pytest.mark.parametrize("may_unmap", [False, True])
@pytest.mark.parametrize("modes", [ALL, PUNCHES, (ZERO_RANGE,), ()], ids=["all", "holes", "zeroes", "nothing"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, SIZE), (4096, 8192), (1000, 3), (SIZE - 10, 20), (SIZE, 4096), (SIZE + 100, 50), (0, 3 * MIB)],
)
async def test_zeroes_are_zeroes_on_every_file_system(file, path, monkeypatch, modes, may_unmap, offset, length):
    Allocator(monkeypatch, *modes)
    await file.write_zeroes(offset, length, may_unmap=may_unmap)
    end = max(SIZE, offset + length)
    expected = bytearray((DATA + bytes(end))[:end])
    expected[offset : offset + length] = bytes(length)
    assert path.read_bytes() == expected
    assert file.size == end


@pytest.mark.parametrize(
    ("modes", "may_unmap", "expected"),
    [
        (ALL, True, [(PUNCH_HOLE | KEEP_SIZE, 0, 512)] * 2),
        (ALL, False, [(ZERO_RANGE, 0, 512)] * 2),
        ((ZERO_RANGE,), True, [(PUNCH_HOLE | KEEP_SIZE, 0, 512), (ZERO_RANGE, 0, 512), (ZERO_RANGE, 0, 512)]),
        ((), True, [(PUNCH_HOLE | KEEP_SIZE, 0, 512), (ZERO_RANGE, 0, 512)]),
        ((), False, [(ZERO_RANGE, 0, 512)]),
    ],
)
async def test_the_fastest_way_is_taken_and_one_that_was_refused_not_tried_again(
    file, monkeypatch, modes, may_unmap, expected
):
    allocator = Allocator(monkeypatch, *modes)
    for _ in range(2):
        await file.write_zeroes(0, 512, may_unmap=may_unmap)
    assert allocator.asked == expected


async def test_without_fallback_slow_zeroes_are_refused_and_nothing_is_written(file, path, monkeypatch):
    Allocator(monkeypatch)
    with pytest.raises(UnsupportedError) as caught:
        await file.write_zeroes(0, 512, may_unmap=True, fallback=False)
    assert str(caught.value) == f"file '{path}': the file system has no fast way to write zeroes (at 0x0+512)"
    assert path.read_bytes() == DATA


async def test_an_error_of_zeroing_is_no_reason_to_try_another_way(file, path, monkeypatch):
    def function(_fd, _mode, _offset, _length):
        fallocate_module.ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(fallocate_module, "_fallocate", function)
    expected = (NoSpaceError, errno.ENOSPC, f"file '{path}': fallocate failed: No space left on device (at 0x0+512)")
    assert await error_of(file.write_zeroes(0, 512, may_unmap=True)) == expected
    assert await error_of(file.discard(0, 512)) == expected
    assert path.read_bytes() == DATA


@pytest.mark.parametrize(
    ("offset", "length"), [(0, SIZE), (4096, 4096), (SIZE - 4096, 8192), (SIZE, 100), (SIZE + 5, 10)]
)
async def test_a_discard_makes_a_hole_and_never_changes_the_size(file, path, offset, length):
    await file.discard(offset, length)
    expected = bytearray(DATA)
    expected[offset : offset + length] = bytes(max(0, min(length, SIZE - offset)))
    assert (path.read_bytes(), file.size) == (expected, SIZE)


async def test_a_discard_that_the_file_system_cannot_do_does_nothing(file, path, monkeypatch):
    allocator = Allocator(monkeypatch)
    for _ in range(2):
        await file.discard(0, 4096)
    assert (path.read_bytes(), len(allocator.asked)) == (DATA, 1)


async def test_growing_by_a_hole_does_not_cut_off_what_is_written_behind_it_meanwhile(file, path, monkeypatch):
    """Another thread's write lands between the look at the size and the call that changes it."""
    real = os.fstat

    def fstat(fd):
        seen = real(fd)
        if seen.st_size < SIZE + 10_000:
            os.pwrite(fd, b"behind", SIZE + 20_000)
        return seen

    monkeypatch.setattr(os, "fstat", fstat)
    await file.write_zeroes(SIZE, 10_000, may_unmap=True)
    assert path.read_bytes() == DATA + bytes(20_000) + b"behind"


# -- size ----------------------------------------------------------------------------------------------------------


async def test_writes_behind_the_end_extend_the_file(file, path):
    await asyncio.gather(*(file.write(SIZE + index * 1000, memoryview(b"x" * 1000)) for index in range(20, 0, -1)))
    assert (file.size, path.stat().st_size) == (SIZE + 21_000, SIZE + 21_000)


@pytest.mark.parametrize("outcome", ["cancelled", "failed"])
async def test_the_size_is_right_after_a_write_that_ended_badly_but_reached_the_file(file, monkeypatch, outcome):
    real = os.pwritev

    def pwritev(*args):
        done = real(*args)
        if outcome == "failed":
            raise OSError(errno.EIO, "late")
        return done

    blocking = Blocking(pwritev)
    monkeypatch.setattr(os, "pwritev", blocking)
    writing = asyncio.ensure_future(file.write(SIZE, memoryview(b"x" * 4096)))
    await blocking.reached.wait()
    if outcome == "cancelled":
        writing.cancel()
    blocking.let_go()
    await asyncio.gather(writing, return_exceptions=True)
    assert (writing.cancelled(), file.size) == (outcome == "cancelled", SIZE + 4096)
    await file.write_zeroes(SIZE, 4096, may_unmap=True)
    buffer = bytearray(b"?" * 4096)
    await file.read_into(SIZE, memoryview(buffer))
    assert buffer == bytes(4096), "and zeroing by a hole, which is made inside the known size, reaches it"


@pytest.mark.parametrize("preallocation", [Preallocation.OFF, Preallocation.FALLOC, Preallocation.FULL])
@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE, SIZE + 1, 3 * MIB + 7])
async def test_truncating_cuts_or_adds_zeroes(file, path, size, preallocation):
    await file.truncate(size, preallocation)
    assert path.read_bytes() == (DATA + bytes(size))[:size]
    assert file.size == size


@pytest.mark.parametrize(
    ("preallocation", "reserved"),
    [(Preallocation.OFF, False), (Preallocation.FALLOC, True), (Preallocation.FULL, True)],
)
async def test_preallocation_reserves_what_is_added(file, path, preallocation, reserved):
    await file.truncate(SIZE + MIB, preallocation)
    os.fsync(file.fd)
    assert (path.stat().st_blocks * 512 >= SIZE + MIB) == reserved


async def test_preallocation_that_the_file_system_cannot_do_is_refused(file, path, monkeypatch):
    Allocator(monkeypatch)
    _, code, text = await error_of(file.truncate(SIZE + MIB, Preallocation.FALLOC))
    assert (code, text) == (errno.EOPNOTSUPP, f"file '{path}': truncate failed: Operation not supported (at 0x140000)")
    assert (file.size, path.read_bytes()) == (SIZE, DATA)


@pytest.mark.parametrize("preallocation", [Preallocation.FALLOC, Preallocation.FULL])
async def test_growing_that_fails_half_way_is_undone(file, path, monkeypatch, preallocation):
    """The disk is full after a part: the file is as long as before, and so is what we think of it."""
    real_allocate, real_write = fallocate_module._fallocate, os.pwritev

    def allocate(fd, mode, offset, length):
        real_allocate(fd, mode, offset, length // 2)
        fallocate_module.ctypes.set_errno(errno.ENOSPC)
        return -1

    def pwritev(fd, buffers, offset, flags=0):
        if offset > SIZE:
            raise OSError(errno.ENOSPC, "full")
        return real_write(fd, buffers, offset, flags)

    monkeypatch.setattr(fallocate_module, "_fallocate", allocate)
    monkeypatch.setattr(os, "pwritev", pwritev)
    expected = (NoSpaceError, errno.ENOSPC, f"file '{path}': truncate failed: No space left on device (at 0x340000)")
    assert await error_of(file.truncate(SIZE + 3 * MIB, preallocation)) == expected
    assert (file.size, path.read_bytes() == DATA) == (SIZE, True)
