"""Image locks: which bytes are held, who excludes whom, and that a refusal changes nothing."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.aio import locking
from blocklayer.aio.file import File
from blocklayer.aio.locking import ImageLock, supported
from blocklayer.base.errors import IOFailedError, LockedError
from blocklayer.base.modes import Permission

READ, WRITE, UNCHANGED, RESIZE = (
    Permission.CONSISTENT_READ,
    Permission.WRITE,
    Permission.WRITE_UNCHANGED,
    Permission.RESIZE,
)
NONE, ALL = Permission.NONE, Permission.ALL
ADVICE = ": is another process using the image? Stop it, or open with force_share to read only"
SETS = st.integers(0, 15).map(Permission)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"")
    return path


@pytest.fixture
def users(image):
    """Makes users of the image, each with an open file description of its own."""
    opened = []

    def user(flags=os.O_RDWR):
        opened.append(os.open(image, flags))
        return ImageLock(opened[-1], "disk")

    yield user
    for fd in opened:
        os.close(fd)


def held(image):
    """Bytes on which anybody holds a lock."""
    found = set()
    fd = os.open(image, os.O_RDWR)
    for byte in range(90, 230):
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        if struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK:
            found.add(byte)
    os.close(fd)
    return found


@pytest.mark.parametrize(
    ("used", "shared", "expected"),
    [
        (NONE, ALL, set()),
        (ALL, NONE, {100, 101, 102, 103, 200, 201, 202, 203}),
        (READ, ALL, {100}),
        (READ | WRITE, READ | UNCHANGED, {100, 101, 201, 203}),
        (RESIZE, ALL & ~RESIZE, {103, 203}),
        (UNCHANGED, ALL & ~READ, {102, 200}),
    ],
)
def test_each_permission_that_is_used_or_not_shared_has_its_byte(image, users, used, shared, expected):
    users().change(used, shared)
    assert held(image) == expected


def test_locks_follow_every_change(image, users):
    lock = users()
    seen = []
    for used, shared in [(READ | WRITE, READ), (READ, ALL), (READ | RESIZE, ALL & ~WRITE), (NONE, ALL)]:
        lock.change(used, shared)
        seen.append(held(image))
    assert seen == [{100, 101, 201, 202, 203}, {100}, {100, 103, 201}, set()]


@given(first=st.tuples(SETS, SETS), second=st.tuples(SETS, SETS))
def test_two_go_together_if_each_uses_only_what_the_other_shares(tmp_path_factory, first, second):
    path = tmp_path_factory.getbasetemp() / "shared"
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2)]
    try:
        ImageLock(fds[0], "disk").change(*first)
        before = held(path)
        compatible = not (first[0] & ~second[1] or second[0] & ~first[1])
        try:
            ImageLock(fds[1], "disk").change(*second)
        except LockedError:
            assert not compatible
            assert held(path) == before, "a refusal leaves no byte locked"
        else:
            assert compatible
    finally:
        for fd in fds:
            os.close(fd)


WORDS = {READ: "consistent read", WRITE: "write", UNCHANGED: "write unchanged", RESIZE: "resize"}


@pytest.mark.parametrize(("permission", "word"), WORDS.items())
def test_a_refusal_says_which_permission_in_the_words_of_qemu(users, permission, word):
    holder, late = users(), users()
    holder.change(NONE, ALL & ~permission)
    with pytest.raises(LockedError) as caught:
        late.change(permission, ALL)
    assert (caught.value.errno, caught.value.filename) == (errno.EAGAIN, "disk")
    assert str(caught.value) == f"file 'disk': Failed to get \"{word}\" lock{ADVICE}"
    holder.change(permission, ALL)
    with pytest.raises(LockedError) as caught:
        late.change(NONE, ALL & ~permission)
    assert str(caught.value) == f"file 'disk': Failed to get shared \"{word}\" lock{ADVICE}"


def test_a_refused_change_keeps_what_was_held_before(image, users):
    lock, other = users(), users()
    lock.change(READ, ALL & ~RESIZE)
    other.change(READ | WRITE, ALL)
    before = held(image)
    with pytest.raises(LockedError):
        lock.change(READ | WRITE, NONE)
    assert held(image) == before == {100, 101, 203}
    other.change(READ, ALL)
    lock.change(READ | WRITE, READ)
    assert held(image) == {100, 101, 201, 202, 203}


def test_what_one_gives_up_another_may_take(users):
    first, second = users(), users()
    first.change(READ | WRITE, READ)
    with pytest.raises(LockedError):
        second.change(READ | WRITE, READ)
    first.change(READ, READ | WRITE)
    second.change(READ | WRITE, READ)


def test_many_readers_share_an_image_also_through_read_only_descriptors(image, users):
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDONLY):
        users(flags).change(READ, READ | UNCHANGED)
    assert held(image) == {100, 201, 203}


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_program_that_locks_the_whole_file_for_itself_is_another_user(image, users, kind):
    """lockf(3) of this very process would not be seen; an open file description's lock is."""
    fd = os.open(image, os.O_RDWR)
    mode = fcntl.F_WRLCK if kind == fcntl.LOCK_EX else fcntl.F_RDLCK
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", mode, os.SEEK_SET, 0, 0, 0))
    with pytest.raises(LockedError) as caught:
        users().change(READ, READ)
    os.close(fd)
    what = "Failed to take a lock" if kind == fcntl.LOCK_EX else 'Failed to get "consistent read" lock'
    assert str(caught.value) == f"file 'disk': {what}{ADVICE}"


def test_other_errors_of_locking_are_mapped(users, monkeypatch):
    lock = users()

    def no_locks(*_args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locking, "_probe", no_locks)
    with pytest.raises(IOFailedError) as caught:
        lock.change(READ, NONE)
    assert (type(caught.value), caught.value.errno) == (IOFailedError, errno.ENOLCK)
    assert str(caught.value) == "file 'disk': lock failed: No locks available"


def test_where_there_are_no_such_locks_it_is_known_before(image, monkeypatch):
    fd = os.open(image, os.O_RDONLY)
    assert supported(fd)
    os.close(fd)
    assert not supported(fd)
    monkeypatch.setattr(locking, "_SET", None)
    assert not supported(0)


async def test_the_locks_of_a_file_go_with_it(engine, image):
    first, second = [await File.open(engine, str(image)) for _ in range(2)]
    first.change_lock(READ | WRITE, READ)
    with pytest.raises(LockedError):
        second.change_lock(READ | WRITE, READ)
    await first.close()
    second.change_lock(READ | WRITE, READ)
    await second.close()
    assert held(image) == set()


async def test_a_file_without_locks_takes_none(engine, image):
    files = [await File.open(engine, str(image)) for _ in range(2)]
    for file in files:
        file.lock = None
        file.change_lock(ALL, NONE)
    assert held(image) == set()
    for file in files:
        await file.close()


def test_every_pair_of_newcomers_sees_each_other(users):
    """Both have taken their bytes before one of them looks: whoever looks gives up."""
    for wanted, other in itertools.product([(READ | WRITE, READ), (ALL, NONE)], repeat=2):
        first, second = users(), users()
        for byte in locking._bytes(100, wanted[0]) + locking._bytes(200, ~wanted[1]):
            locking._set(first._fd, byte, fcntl.F_RDLCK)
        with pytest.raises(LockedError):
            second.change(*other)
        with pytest.raises(LockedError):
            users().change(*wanted)
        for byte in range(100, 204):
            locking._set(first._fd, byte, fcntl.F_UNLCK)
