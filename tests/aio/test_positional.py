"""Positional transfers against a kernel that reads and writes as little as it likes."""

from __future__ import annotations

import errno
import os
from itertools import chain, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.aio.positional import VECTORS_MAX, read_full, write_full

CONTENT = bytes(index % 251 + 1 for index in range(300))


class Kernel:
    """A file in memory whose calls transfer at most what ``portions`` say, one after the other; then all."""

    def __init__(self, patch, portions=(), content=CONTENT):
        self.content = bytearray(content)
        self.portions = chain(portions, repeat(1 << 20))
        self.calls = []
        self.errors = {}
        """Number of a call: what it raises."""
        patch.setattr(os, "preadv", self.preadv)
        patch.setattr(os, "pwritev", self.pwritev)

    def begin(self, *call):
        self.calls.append(call)
        if len(self.calls) in self.errors:
            code = self.errors[len(self.calls)]
            raise OSError(code, os.strerror(code))

    def preadv(self, fd, buffers, offset, flags=0):
        self.begin("read", fd, offset, sum(map(len, buffers)), flags)
        (buffer,) = buffers
        data = self.content[offset : offset + min(len(buffer), next(self.portions))]
        buffer[: len(data)] = data
        return len(data)

    def pwritev(self, fd, buffers, offset, flags=0):
        data = b"".join(buffers)[: next(self.portions)]
        self.begin("write", fd, offset, sum(map(len, buffers)), flags)
        assert len(buffers) <= VECTORS_MAX
        self.content[offset : offset + len(data)] = data
        return len(data)


@given(offset=st.integers(0, 350), length=st.integers(0, 350), portions=st.lists(st.integers(1, 100), max_size=8))
def test_a_read_goes_on_until_the_buffer_is_full_or_the_file_ends(offset, length, portions):
    with pytest.MonkeyPatch.context() as patch:
        Kernel(patch, portions)
        buffer = bytearray(b"?" * length)
        read_full(3, memoryview(buffer), offset)
    assert buffer == (CONTENT + bytes(800))[offset : offset + length]


@given(
    buffers=st.lists(st.binary(max_size=40), max_size=10),
    portions=st.lists(st.integers(1, 100), max_size=8),
    durable=st.booleans(),
)
def test_a_write_goes_on_until_all_buffers_are_stored(buffers, portions, durable):
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel(patch, portions)
        write_full(3, [memoryview(buffer) for buffer in buffers], 50, durable)
    data = b"".join(buffers)
    assert kernel.content == CONTENT[:50] + data + CONTENT[50 + len(data) :]
    assert {call[-1] for call in kernel.calls} <= {os.RWF_DSYNC if durable else 0}


@pytest.mark.parametrize("count", [VECTORS_MAX, VECTORS_MAX + 1, 3 * VECTORS_MAX])
def test_more_buffers_than_one_call_takes_need_several(monkeypatch, count):
    kernel = Kernel(monkeypatch, [5, 3], content=b"")
    write_full(3, [memoryview(bytes([index % 256])) for index in range(count)], 0, False)
    assert kernel.content == bytes(index % 256 for index in range(count))


def test_every_part_of_a_durable_write_is_durable(monkeypatch):
    kernel = Kernel(monkeypatch, [1, 1])
    write_full(3, [memoryview(b"abc")], 0, True)
    assert kernel.calls == [
        ("write", 3, 0, 3, os.RWF_DSYNC),
        ("write", 3, 1, 2, os.RWF_DSYNC),
        ("write", 3, 2, 1, os.RWF_DSYNC),
    ]


def test_a_write_that_stores_nothing_is_an_error_and_no_endless_loop(monkeypatch):
    Kernel(monkeypatch, [2, 0])
    with pytest.raises(OSError) as caught:
        write_full(3, [memoryview(b"abc")], 0, False)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINVAL])
@pytest.mark.parametrize("number", [1, 2])
def test_an_error_in_the_middle_of_a_write_is_raised(monkeypatch, code, number):
    kernel = Kernel(monkeypatch, [1])
    kernel.errors = {number: code}
    with pytest.raises(OSError) as caught:
        write_full(3, [memoryview(b"abc")], 0, False)
    assert caught.value.errno == code


@pytest.mark.parametrize(("number", "code"), [(1, errno.EIO), (1, errno.EINVAL), (2, errno.EIO)])
def test_an_error_in_the_middle_of_a_read_is_raised(monkeypatch, number, code):
    kernel = Kernel(monkeypatch, [10])
    kernel.errors = {number: code}
    with pytest.raises(OSError) as caught:
        read_full(3, memoryview(bytearray(20)), 0)
    assert caught.value.errno == code


def test_the_end_of_a_file_at_an_unaligned_offset_is_an_end_with_o_direct_too(monkeypatch):
    """The first read is cut by the end of the file; what goes on from there is EINVAL on some file systems."""
    kernel = Kernel(monkeypatch, content=CONTENT)
    kernel.errors = {2: errno.EINVAL}
    buffer = bytearray(b"?" * 512)
    read_full(3, memoryview(buffer), 0)
    assert buffer == CONTENT + bytes(212)
