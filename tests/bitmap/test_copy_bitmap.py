"""The copy bitmap against a list of booleans."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import LimitError
from blocklayer.bitmap.copy_bitmap import CLUSTERS_MAX, CopyBitmap

runs = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair)))


@given(st.lists(st.tuples(st.booleans(), runs)), runs, st.integers(1, 50))
def test_it_agrees_with_a_list(
    steps: list[tuple[bool, tuple[int, int]]], where: tuple[int, int], length_max: int
) -> None:
    bitmap, model = CopyBitmap(40), [True] * 40
    for restore, (first, last) in steps:
        if restore:
            bitmap.restore(first, last)
        else:
            assert bitmap.clear(first, last) == sum(model[first:last])
        model[first:last] = [restore] * (last - first)
        assert bitmap.remaining == sum(model)
    first, last = where
    wanted = [index for index in range(first, last) if model[index]]
    assert bitmap.count(first, last) == len(wanted)
    assert bitmap.first_set(first, last) == (wanted[0] if wanted else -1)
    run = bitmap.next_run(first, last, length_max=length_max)
    if not wanted:
        assert run is None
    else:
        end = wanted[0]
        while end < min(last, wanted[0] + length_max) and model[end]:
            end += 1
        assert run == (wanted[0], end)


def test_all_is_asked_for_at_first() -> None:
    bitmap = CopyBitmap(3)
    assert [bitmap[index] for index in range(3)] == [True] * 3


def test_a_disk_of_no_clusters_has_nothing_to_copy() -> None:
    bitmap = CopyBitmap(0)
    assert (bitmap.remaining, bitmap.next_run(0, 0, length_max=1)) == (0, None)


def test_memory_is_bounded() -> None:
    with pytest.raises(LimitError, match="larger clusters"):
        CopyBitmap(CLUSTERS_MAX + 1)
