"""The words that layers share are those of QEMU's users, and say what they say there."""

from __future__ import annotations

import pytest

from blocklayer.base.modes import CacheMode, DetectZeroes, DiscardMode, Permission, Preallocation, WriteFlags


@pytest.mark.parametrize(
    ("word", "direct", "write_through", "no_flush"),
    [
        ("writeback", False, False, False),
        ("writethrough", False, True, False),
        ("none", True, False, False),
        ("directsync", True, True, False),
        ("unsafe", False, False, True),
    ],
)
def test_a_cache_mode_is_one_word_for_three_switches(word, direct, write_through, no_flush):
    mode = CacheMode(word)
    assert (mode.direct, mode.write_through, mode.no_flush) == (direct, write_through, no_flush)


def test_permissions_have_the_bits_of_qemus_file_locks():
    names = ("CONSISTENT_READ", "WRITE", "WRITE_UNCHANGED", "RESIZE")
    assert [Permission[name].value for name in names] == [1, 2, 4, 8]
    assert Permission.ALL == Permission(15)
    assert ~Permission.ALL == Permission.NONE


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (CacheMode, ["writeback", "writethrough", "none", "directsync", "unsafe"]),
        (DetectZeroes, ["off", "on", "unmap"]),
        (DiscardMode, ["ignore", "unmap"]),
        (Preallocation, ["off", "metadata", "falloc", "full"]),
    ],
)
def test_the_words_are_those_of_qemu(kind, words):
    assert [member.value for member in kind] == words


def test_write_flags_combine_freely():
    every = [flag for flag in WriteFlags if flag is not WriteFlags.NONE]
    combined = WriteFlags.NONE
    for flag in every:
        assert flag not in combined, "each has a bit of its own"
        combined |= flag
    assert [flag for flag in every if flag in combined] == every
