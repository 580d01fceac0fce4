"""The reference map counts like a dict of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import LimitError
from blocklayer.codec.qcow2 import references
from blocklayer.codec.qcow2.references import Mark, ReferenceMap


@given(st.lists(st.tuples(st.integers(0, 40000), st.integers(1, 20000), st.integers(1, 300)), max_size=5))
@settings(max_examples=30, deadline=None)
def test_the_reference_map_counts_like_a_dict(ranges: list[tuple[int, int, int]]) -> None:
    """Across pages, and past the largest small count."""
    found = ReferenceMap()
    expected: dict[int, int] = {}
    for first, count, times in ranges:
        found.add(first, count, times=times, mark=Mark.DATA)
        for cluster in range(first, first + count):
            expected[cluster] = expected.get(cluster, 0) + times
    probes = {0, *(edge for first, count, _ in ranges for edge in (first, first + count - 1, first + count))}
    assert {probe: found.get(probe) for probe in probes} == {probe: expected.get(probe, 0) for probe in probes}
    assert found.end == max(expected, default=-1) + 1
    assert found.used_ranges(1000) == {cluster // 1000 for cluster in expected}
    for first, count, times in ranges[:1]:
        found.subtract(first, 1)
        assert found.get(first) == expected[first] - 1
        assert found.marks_of(first) is Mark.DATA
        assert found.count_bytes(first, 3) == bytes(min(found.get(first + at), 255) for at in range(3))
        assert times
        assert count


def test_pages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """References scattered all over a huge sparse file cost no more than the limit."""
    monkeypatch.setattr(references, "PAGES_MAX", 3)
    found = ReferenceMap()
    for page in range(3):
        found.add(page * references.PAGE, 1)
    found.add(5, 1)
    with pytest.raises(LimitError):
        found.add(3 * references.PAGE, 1)


def test_marks_add_up() -> None:
    """One cluster may be referred to in several ways."""
    found = ReferenceMap()
    found.add(7, 2, mark=Mark.DATA)
    found.add(8, 1, mark=Mark.COPIED)
    assert found.marks_of(7) == Mark.DATA
    assert found.marks_of(8) == Mark.DATA | Mark.COPIED
    assert found.marks_of(1 << 40) is Mark.NONE
    assert found.mark_bytes(6, 4) == bytes([0, Mark.DATA, Mark.DATA | Mark.COPIED, 0])
