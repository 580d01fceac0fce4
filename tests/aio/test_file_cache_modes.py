"""File: what each cache mode does to writes, flushes and the page cache."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from blocklayer.aio import fallocate as fallocate_module
from blocklayer.aio.file import File
from blocklayer.base.buffers import aligned_buffer
from blocklayer.base.errors import IOFailedError
from blocklayer.base.modes import CacheMode, Preallocation
from blocklayer.base.units import KIB, MIB

DSYNC = os.RWF_DSYNC
DATA = bytes(index % 251 + 1 for index in range(256 * KIB))


@pytest.fixture
def opens(engine, tmp_path):
    """Opens the disk in a mode; skips where the file system has no O_DIRECT."""
    (tmp_path / "disk").write_bytes(DATA)

    async def open_file(cache, **options):
        try:
            return await File.open(engine, str(tmp_path / "disk"), cache=cache, **options)
        except IOFailedError as error:
            if cache.direct and error.errno == errno.EINVAL:
                pytest.skip("no O_DIRECT on this file system")
            raise

    return open_file


@pytest.fixture
def calls(monkeypatch):
    """Flags of each write and the word "sync" for each fdatasync, in their order."""
    seen = []
    write = os.pwritev

    def pwritev(fd, buffers, offset, flags=0):
        seen.append(flags)
        return write(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(os, "fdatasync", lambda _fd: seen.append("sync"))
    return seen


@pytest.mark.parametrize(
    ("cache", "plain", "durable", "flush"),
    [
        (CacheMode.WRITEBACK, [0], [DSYNC], ["sync"]),
        (CacheMode.WRITETHROUGH, [DSYNC], [DSYNC], ["sync"]),
        (CacheMode.NONE, [0], [DSYNC], ["sync"]),
        (CacheMode.DIRECTSYNC, [DSYNC], [DSYNC], ["sync"]),
        (CacheMode.UNSAFE, [0], [0], []),
    ],
)
async def test_a_mode_decides_when_a_write_is_durable(opens, calls, cache, plain, durable, flush):
    file = await opens(cache)
    seen = {}
    for name, action in {
        "plain": file.write(0, memoryview(DATA)[:4096]),
        "durable": file.write(0, memoryview(DATA)[:4096], durable=True),
        "flush": file.flush(),
    }.items():
        calls.clear()
        await action
        seen[name] = list(calls)
    await file.close()
    assert seen == {"plain": plain, "durable": durable, "flush": flush}


@pytest.mark.parametrize("may_unmap", [False, True])
@pytest.mark.parametrize(
    ("cache", "plain", "durable"),
    [
        (CacheMode.WRITEBACK, [], ["sync"]),
        (CacheMode.WRITETHROUGH, ["sync"], ["sync"]),
        (CacheMode.NONE, [], ["sync"]),
        (CacheMode.DIRECTSYNC, ["sync"], ["sync"]),
        (CacheMode.UNSAFE, [], []),
    ],
)
async def test_zeroes_are_as_durable_as_writes(opens, calls, cache, plain, durable, may_unmap):
    file = await opens(cache)
    await file.write_zeroes(0, 4096, may_unmap=may_unmap)
    first = list(calls)
    calls.clear()
    await file.write_zeroes(0, 4096, may_unmap=may_unmap, durable=True)
    await file.close()
    assert (first, calls) == (plain, durable)


@pytest.mark.parametrize("cache", CacheMode)
async def test_only_direct_modes_pass_the_page_cache_by(opens, cache):
    file = await opens(cache)
    assert bool(fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT) == cache.direct
    assert (file.request_alignment > 1, file.memory_alignment > 1) == (cache.direct, cache.direct)
    assert file.try_read_into(0, aligned_buffer(4096)) == (not cache.direct), "what passes the cache by has to wait"
    await file.close()


@pytest.mark.parametrize("cache", CacheMode)
async def test_every_mode_stores_and_reads_the_same(opens, tmp_path, cache):
    """Memory of any alignment, requests of whole alignment units, over the end too."""
    file = await opens(cache)
    expected = bytearray(DATA)
    memory = aligned_buffer(3 * MIB + 1)
    for index, (offset, length, skew) in enumerate([(0, 4096, 0), (8192, 65536, 1), (4096, 2 * MIB + 4096, 1)]):
        data = memory[skew : skew + length]
        data[:] = bytes([index + 1]) * length
        await file.write(offset, data if index % 2 else data.toreadonly())
        expected[offset : offset + length] = data
        assert file.size == len(expected)
    for offset, length, skew in [(0, len(expected), 0), (4096, 8192, 1), (len(expected) - 4096, 8192, 0)]:
        buffer = memory[skew : skew + length]
        buffer[:] = b"?" * length
        await file.read_into(offset, buffer)
        assert bytes(buffer) == bytes((expected + bytes(8192))[offset : offset + length])
    await file.write_zeroes(0, 8192, may_unmap=True)
    await file.write_zeroes(len(expected), 4096, may_unmap=True)
    await file.flush()
    await file.close()
    assert (tmp_path / "disk").read_bytes() == bytes(8192) + expected[8192:] + bytes(4096)


@pytest.mark.parametrize("cache", [CacheMode.NONE, CacheMode.DIRECTSYNC])
@pytest.mark.parametrize("size", [1, 1000, 4096 + 700])
async def test_the_end_of_a_file_of_odd_length_can_be_read_past_the_cache(opens, tmp_path, cache, size):
    file = await opens(cache)
    await file.truncate(size)
    buffer = aligned_buffer(3 * 4096)
    buffer[:] = b"?" * len(buffer)
    await file.read_into(0, buffer)
    await file.close()
    assert bytes(buffer) == DATA[:size] + bytes(len(buffer) - size)


@pytest.mark.parametrize("cache", [CacheMode.NONE, CacheMode.DIRECTSYNC])
async def test_zeroes_are_written_past_the_cache_where_there_is_no_faster_way(opens, monkeypatch, tmp_path, cache):
    file = await opens(cache)
    monkeypatch.setattr(fallocate_module, "_fallocate", None)
    await file.write_zeroes(4096, 8192, may_unmap=True)
    await file.close()
    assert (tmp_path / "disk").read_bytes() == DATA[:4096] + bytes(8192) + DATA[12288:]


@pytest.mark.parametrize("cache", CacheMode)
@pytest.mark.parametrize("size", [300 * KIB, 300 * KIB + 1000])
async def test_growing_with_preallocation_works_in_every_mode(opens, tmp_path, cache, size):
    file = await opens(cache)
    await file.truncate(300 * KIB - 77)
    await file.truncate(size, Preallocation.FULL)
    await file.close()
    assert (tmp_path / "disk").read_bytes() == DATA + bytes(size - len(DATA))


async def test_a_flush_that_failed_is_not_asked_for_when_flushes_are_ignored(opens, monkeypatch):
    def broken(_fd):
        raise OSError(errno.EIO, "bad medium")

    monkeypatch.setattr(os, "fdatasync", broken)
    file = await opens(CacheMode.UNSAFE)
    await file.write(0, memoryview(b"x"), durable=True)
    await file.flush()
    await file.close()
