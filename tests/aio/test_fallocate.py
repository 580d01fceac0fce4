"""fallocate(2): holes, zeroes and reservations of a real file, and what it says when it cannot."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from blocklayer.aio import fallocate as module
from blocklayer.aio.fallocate import KEEP_SIZE, PUNCH_HOLE, UNSUPPORTED_ERRNOS, ZERO_RANGE, fallocate
from blocklayer.base.units import MIB


@pytest.fixture
def fd(tmp_path):
    number = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    os.pwrite(number, b"x" * MIB, 0)
    yield number
    os.close(number)


def content(fd):
    return os.pread(fd, 10 * MIB, 0)


def blocks(fd):
    return os.fstat(fd).st_blocks


def test_a_hole_reads_as_zeroes_and_gives_space_back(fd):
    os.fsync(fd)
    before = blocks(fd)
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 65536, 131072)
    assert content(fd) == b"x" * 65536 + bytes(131072) + b"x" * (MIB - 65536 - 131072)
    assert blocks(fd) == before - 131072 // 512


def test_a_zero_range_may_extend_the_file(fd):
    fallocate(fd, ZERO_RANGE, MIB - 10, 100)
    assert content(fd) == b"x" * (MIB - 10) + bytes(100)


def test_space_can_be_reserved_behind_the_end(fd):
    fallocate(fd, KEEP_SIZE, MIB, MIB)
    assert (len(content(fd)), blocks(fd) >= 2 * MIB // 512) == (MIB, True)


@pytest.mark.parametrize(
    ("mode", "offset", "length", "code"),
    [
        (0, 0, 0, errno.EINVAL),
        (0, -1, 10, errno.EINVAL),
        (PUNCH_HOLE, 0, 10, errno.EOPNOTSUPP),
        (0, 1 << 62, 1 << 62, errno.EFBIG),
        (0, 1 << 62, 1 << 61, errno.EFBIG),
    ],
)
def test_what_the_kernel_refuses_is_an_os_error(fd, mode, offset, length, code):
    with pytest.raises(OSError) as caught:
        fallocate(fd, mode, offset, length)
    assert (caught.value.errno, caught.value.strerror) == (code, os.strerror(code))


def test_a_closed_descriptor_is_an_os_error():
    with pytest.raises(OSError) as caught:
        fallocate(-1, 0, 0, 1)
    assert caught.value.errno == errno.EBADF
    assert errno.EBADF not in UNSUPPORTED_ERRNOS


def test_an_interrupted_call_is_repeated(monkeypatch):
    codes = [errno.EINTR, errno.EINTR, 0]
    calls = []

    def interrupted(*args):
        calls.append(args)
        ctypes.set_errno(code := codes.pop(0))
        return -1 if code else 0

    monkeypatch.setattr(module, "_fallocate", interrupted)
    fallocate(3, PUNCH_HOLE, 1, 2)
    assert calls == [(3, PUNCH_HOLE, 1, 2)] * 3


def test_a_platform_without_it_says_so_as_a_file_system_would(monkeypatch):
    monkeypatch.setattr(module, "_fallocate", None)
    with pytest.raises(OSError) as caught:
        fallocate(3, 0, 0, 1)
    assert caught.value.errno == errno.ENOSYS
    assert errno.ENOSYS in UNSUPPORTED_ERRNOS
