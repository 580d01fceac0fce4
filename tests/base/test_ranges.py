"""Interval arithmetic against sets of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.ranges import (
    Range,
    align_down,
    align_up,
    div_round_up,
    is_power_of_two,
    split,
    split_aligned,
)

RANGES = st.builds(Range, st.integers(0, 40), st.integers(0, 40))
UNITS = st.integers(1, 17)


def members(area):
    return set(range(area.offset, area.end))


@given(RANGES, RANGES)
def test_ranges_overlap_if_they_share_a_byte(first, second):
    assert first.overlaps(second) == bool(members(first) & members(second))


@given(RANGES, RANGES)
def test_the_intersection_has_the_shared_bytes(first, second):
    assert members(first.intersect(second)) == members(first) & members(second)
    assert first.intersect(second).length >= 0


@given(RANGES, UNITS)
def test_aligning_out_takes_every_unit_that_is_touched(area, unit):
    outer = area.aligned_out(unit)
    touched = {byte // unit for byte in members(area)}
    assert (outer.offset % unit, outer.length % unit) == (0, 0)
    if area.length:
        assert {byte // unit for byte in members(outer)} == touched


@given(RANGES, UNITS)
def test_aligning_in_keeps_the_units_that_lie_inside_as_a_whole(area, unit):
    inner = area.aligned_in(unit)
    whole = {
        byte for byte in members(area) if set(range(byte // unit * unit, (byte // unit + 1) * unit)) <= members(area)
    }
    assert members(inner) == whole
    assert (inner.length % unit, inner.length >= 0) == (0, True)


@given(st.integers(-100, 1000), UNITS)
def test_aligning_a_number_goes_to_the_nearest_multiple_on_its_side(value, unit):
    multiples = [number for number in range(-200, 1200) if number % unit == 0]
    assert align_down(value, unit) == max(number for number in multiples if number <= value)
    assert align_up(value, unit) == min(number for number in multiples if number >= value)


@given(st.integers(0, 1000), UNITS)
def test_as_many_units_are_needed_as_hold_the_value(value, unit):
    count = div_round_up(value, unit)
    assert (count - 1) * unit < value <= count * unit


def test_powers_of_two_are_those_with_one_bit():
    found = [value for value in range(-4, 1025) if is_power_of_two(value)]
    assert found == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


@given(RANGES, UNITS)
def test_pieces_of_a_range_are_in_order_without_gaps_and_as_long_as_allowed(area, length_max):
    pieces = list(split(*area, length_max=length_max))
    assert [byte for piece in pieces for byte in range(piece.offset, piece.end)] == sorted(members(area))
    assert [piece.length for piece in pieces[:-1]] == [length_max] * (len(pieces) - 1 if pieces else 0)
    assert all(0 < piece.length <= length_max for piece in pieces)


@given(RANGES, UNITS)
def test_pieces_of_a_range_cut_at_units_lie_in_one_unit_each(area, unit):
    pieces = list(split_aligned(*area, unit=unit))
    assert [byte for piece in pieces for byte in range(piece.offset, piece.end)] == sorted(members(area))
    assert [{byte // unit for byte in members(piece)} for piece in pieces] == [
        {number} for number in sorted({byte // unit for byte in members(area)})
    ]


@pytest.mark.parametrize(("first", "second"), [(Range(0, 10), Range(5, 0)), (Range(3, 0), Range(3, 0))])
def test_an_empty_range_overlaps_nothing_wherever_it_lies(first, second):
    assert (first.overlaps(second), second.overlaps(first)) == (False, False)
