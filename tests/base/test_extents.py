"""Extents: what is refused, clipping and joining against single bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.ranges import Range

EXTENTS = st.builds(
    Extent,
    offset=st.integers(0, 20),
    length=st.integers(1, 20),
    kind=st.sampled_from(ExtentKind),
    depth=st.integers(0, 1),
    node=st.sampled_from(["a", "b"]),
    host_offset=st.none() | st.integers(0, 40),
    host_node=st.none() | st.just("file"),
    compressed=st.booleans(),
    present=st.booleans(),
)


def status_of_bytes(extent):
    """What the extent says about each of its bytes."""
    return {
        extent.offset + index: replace(
            extent,
            offset=0,
            length=1,
            host_offset=None if extent.host_offset is None else extent.host_offset + index,
        )
        for index in range(extent.length)
    }


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, -1), (-1, 1)])
def test_a_run_that_a_loop_could_not_pass_is_refused(offset, length):
    with pytest.raises(ValueError) as caught:
        Extent(offset, length, ExtentKind.DATA)
    assert str(caught.value) == f"an extent needs offset >= 0 and length > 0, not {offset}+{length}"


@pytest.mark.parametrize(
    ("kind", "is_zero", "is_allocated"),
    [(ExtentKind.DATA, False, True), (ExtentKind.ZERO, True, True), (ExtentKind.UNALLOCATED, False, False)],
)
def test_a_kind_says_who_answers_and_whether_with_zeroes(kind, is_zero, is_allocated):
    extent = Extent(512, 1024, kind)
    assert (extent.is_zero, extent.is_allocated) == (is_zero, is_allocated)
    assert (extent.end, extent.range) == (1536, Range(512, 1024))


@given(EXTENTS, st.integers(0, 50), st.integers(1, 50))
def test_a_clipped_extent_says_the_same_of_the_bytes_that_it_keeps(extent, offset, length):
    wanted = {at: status for at, status in status_of_bytes(extent).items() if offset <= at < offset + length}
    if wanted:
        assert status_of_bytes(extent.clipped(offset, length)) == wanted
    else:
        with pytest.raises(ValueError):
            extent.clipped(offset, length)


@given(EXTENTS, EXTENTS)
def test_extents_join_exactly_if_one_extent_says_the_same_of_every_byte(first, second):
    both = status_of_bytes(first) | status_of_bytes(second)
    whole = replace(first, length=first.length + second.length)
    same = second.offset == first.end and status_of_bytes(whole) == both
    assert first.joins(second) == same
    if same:
        assert first.joined(second) == whole


@given(EXTENTS, st.integers(1, 19))
def test_the_parts_of_a_cut_extent_join_again(extent, cut):
    if cut < extent.length:
        first, second = extent.clipped(extent.offset, cut), extent.clipped(extent.offset + cut, extent.length)
        assert first.joins(second)
        assert first.joined(second) == extent
