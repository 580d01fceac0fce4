"""O_DIRECT: a kernel that is strict about alignment, and one that is not, get what they want."""

from __future__ import annotations

import errno
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.aio.direct import BOUNCE_MAX, is_aligned, probe_alignment, read_direct, write_direct
from blocklayer.base.buffers import aligned_buffer
from blocklayer.base.units import KIB, MIB


class StrictDisk:
    """Takes only what is aligned: offset and length to ``request``, addresses to ``memory``; keeps its bytes."""

    def __init__(self, patch, request, memory, size=64 * KIB):
        self.request, self.memory = request, memory
        self.content = bytearray(index % 251 for index in range(size))
        self.lengths = []
        self.flags = set()
        patch.setattr(os, "preadv", self.preadv)
        patch.setattr(os, "pwritev", self.pwritev)

    def check(self, buffers, offset):
        (buffer,) = buffers
        self.lengths.append(len(buffer))
        if offset % self.request or len(buffer) % self.request or not is_aligned(buffer, self.memory):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return buffer

    def preadv(self, _fd, buffers, offset, _flags=0):
        buffer = self.check(buffers, offset)
        data = self.content[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def pwritev(self, _fd, buffers, offset, flags=0):
        buffer = self.check(buffers, offset)
        self.flags.add(flags)
        self.content[offset : offset + len(buffer)] = buffer
        return len(buffer)


def skewed(length, skew):
    """Memory that starts ``skew`` bytes behind a page."""
    return aligned_buffer(length + mmap.PAGESIZE)[skew : skew + length]


@pytest.mark.parametrize("request_", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("memory", [512, 1024, 4096])
def test_probing_finds_what_a_strict_disk_wants(monkeypatch, request_, memory):
    StrictDisk(monkeypatch, request_, memory)
    assert probe_alignment(3) == (request_, memory)


def test_a_disk_that_wants_more_than_anybody_does_gets_the_most(monkeypatch):
    StrictDisk(monkeypatch, 8192, 8192)
    assert probe_alignment(3) == (4096, mmap.PAGESIZE)


def test_a_disk_that_takes_single_bytes_gets_pages(monkeypatch):
    StrictDisk(monkeypatch, 1, 1)
    assert probe_alignment(3) == (4096, mmap.PAGESIZE)


def test_a_disk_that_cannot_be_read_is_no_matter_of_alignment(monkeypatch):
    def broken(*_args):
        raise OSError(errno.EIO, "bad medium")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError) as caught:
        probe_alignment(3)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("buffer", "alignment", "expected"),
    [
        (skewed(10, 0), 4096, True),
        (skewed(10, 512), 512, True),
        (skewed(10, 512), 1024, False),
        (skewed(10, 1), 2, False),
        (skewed(10, 1), 1, True),
        (memoryview(bytes(10)), 1, False),
        (aligned_buffer(0), 1, False),
    ],
    ids=["page", "sector", "half", "odd", "any", "read-only", "empty"],
)
def test_memory_is_aligned_or_not_and_what_cannot_be_told_is_not(buffer, alignment, expected):
    assert is_aligned(buffer, alignment) == expected


def test_looking_at_the_address_keeps_no_hold_of_the_memory():
    memory = bytearray(4096)
    is_aligned(memoryview(memory), 512)
    memory.clear()


SECTORS = st.integers(0, 16)


@given(first=SECTORS, count=SECTORS, skew=st.sampled_from([0, 1, 256, 512]))
def test_reads_into_any_memory_are_what_the_disk_holds_and_zeroes_behind_it(first, count, skew):
    with pytest.MonkeyPatch.context() as patch:
        disk = StrictDisk(patch, 512, 512, size=4096 + 512)
        buffer = skewed(count * 512, skew)
        buffer[:] = b"?" * len(buffer)
        read_direct(3, buffer, first * 512, 512)
    assert bytes(buffer) == (bytes(disk.content) + bytes(64 * KIB))[first * 512 :][: count * 512]


@given(
    first=SECTORS,
    cuts=st.lists(st.integers(0, 4096), max_size=4),
    skew=st.sampled_from([0, 1, 512]),
    writable=st.booleans(),
    durable=st.booleans(),
)
def test_writes_from_any_memory_reach_the_disk(first, cuts, skew, writable, durable):
    """``cuts`` makes several buffers, of any lengths, of one aligned request."""
    data = bytes(index % 253 for index in range(4096))
    edges = [0, *sorted(cuts), 4096]
    buffers = []
    for start, end in zip(edges, edges[1:], strict=False):
        memory = skewed(end - start, skew)
        memory[:] = data[start:end]
        buffers.append(memory if writable else memory.toreadonly())
    with pytest.MonkeyPatch.context() as patch:
        disk = StrictDisk(patch, 512, 512)
        expected = bytearray(disk.content)
        write_direct(3, buffers, first * 512, durable, 512)
    expected[first * 512 : first * 512 + 4096] = data
    assert (disk.content, disk.flags) == (expected, {os.RWF_DSYNC if durable else 0})


def test_aligned_memory_goes_to_the_disk_without_a_copy_in_between(monkeypatch):
    disk = StrictDisk(monkeypatch, 512, 512, size=4 * MIB)
    read_direct(3, skewed(3 * MIB, 512), 0, 512)
    write_direct(3, [skewed(3 * MIB, 512)], 0, False, 512)
    assert disk.lengths == [3 * MIB, 3 * MIB]


def test_other_memory_is_copied_through_a_bounded_buffer(monkeypatch):
    disk = StrictDisk(monkeypatch, 512, 512, size=4 * MIB)
    buffer = skewed(2 * BOUNCE_MAX + 1024, 1)
    read_direct(3, buffer, 512, 512)
    assert bytes(buffer) == disk.content[512 : 512 + len(buffer)]
    write_direct(3, [buffer], 1024, False, 512)
    assert disk.content[1024 : 1024 + len(buffer)] == bytes(buffer)
    assert disk.lengths == [BOUNCE_MAX, BOUNCE_MAX, 1024] * 2


def test_a_file_that_ends_in_the_middle_of_a_sector_is_read_to_its_end(monkeypatch):
    """Going on behind the short read would be unaligned."""
    disk = StrictDisk(monkeypatch, 512, 512, size=1000)
    buffer = aligned_buffer(2048)
    buffer[:] = b"?" * 2048
    read_direct(3, buffer, 0, 512)
    assert bytes(buffer) == disk.content + bytes(1048)
