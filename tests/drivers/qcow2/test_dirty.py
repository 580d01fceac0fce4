"""Dirty tables: what a flush takes is exactly what changed, and comes back if it did not arrive."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from blocklayer.codec.qcow2.entries import load_table
from blocklayer.codec.qcow2.plan import Role
from blocklayer.drivers.qcow2.dirty import SECTOR_WORDS, WordTable

WORDS = 4 * SECTOR_WORDS
OFFSET = 1 << 20

changes = st.lists(
    st.tuples(st.integers(0, WORDS - 1), st.integers(1, 100), st.integers(0, 2**64 - 1)).map(
        lambda each: (each[0], min(each[1], WORDS - each[0]), each[2])
    ),
    max_size=8,
)


def change(table: WordTable, edits: list[tuple[int, int, int]]) -> None:
    """Overwrite runs of words."""
    for index, count, word in edits:
        table.words[index : index + count] = array("Q", [word] * count)
        table.touch(index, count)


def arrive(disk: array[int], steps: list) -> None:
    """Write steps to a disk that holds the table alone."""
    for step in steps:
        words = load_table(step.data)
        first = (step.offset - OFFSET) // 8
        disk[first : first + len(words)] = words


def table(*, fresh: bool = False) -> WordTable:
    """A table of zeroes."""
    return WordTable(Role.MAPPING, OFFSET, array("Q", bytes(8 * WORDS)), fresh=fresh)


@given(st.booleans(), st.lists(st.tuples(changes, st.booleans()), max_size=6))
def test_after_each_flush_that_arrived_the_disk_holds_the_table(fresh: bool, rounds: list) -> None:
    """Flushes fail or not, in any order, with changes between them."""
    it, disk = table(fresh=fresh), array("Q", bytes(8 * WORDS))
    for edits, arrives in rounds:
        change(it, edits)
        steps = list(it.take())
        assert not it.is_dirty
        if arrives:
            arrive(disk, steps)
            assert disk == it.words
        else:
            for step in steps:
                it.restore(step)
    arrive(disk, list(it.take()))
    assert disk == it.words


@given(changes)
def test_only_sectors_that_changed_are_written(edits: list) -> None:
    it = table()
    change(it, edits)
    touched = {index // SECTOR_WORDS for first, count, _ in edits for index in range(first, first + count)}
    steps = list(it.take())
    assert {(step.offset - OFFSET) // 512 for step in steps} == touched
    assert all(len(step.data) == 512 and step.role is Role.MAPPING for step in steps)


def test_a_fresh_table_goes_out_whole_as_new_and_its_changes_after_that_as_mappings() -> None:
    it = table(fresh=True)
    it.touch(0)
    (whole,) = it.take()
    assert (whole.role, whole.offset, len(whole.data)) == (Role.NEW, OFFSET, 8 * WORDS)
    it.touch(WORDS - 1)
    (part,) = it.take()
    assert (part.role, part.offset, len(part.data)) == (Role.MAPPING, OFFSET + 3 * 512, 512)
    it.restore(whole)
    assert it.fresh
    assert [step.role for step in it.take()] == [Role.NEW]


def test_a_table_may_be_dropped_when_the_file_holds_all_of_it_and_nobody_needs_it() -> None:
    it = table(fresh=True)
    assert not it.can_be_dropped
    list(it.take())
    assert it.can_be_dropped
    it.pins += 1
    assert not it.can_be_dropped
    it.pins -= 1
    it.touch(5)
    assert not it.can_be_dropped
