"""Refcount blocks of all widths behave like a list of numbers."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import CorruptImageError, LimitError
from blocklayer.codec.qcow2 import refcounts
from blocklayer.codec.qcow2.refcounts import RefcountBlock, raised

ORDERS = range(7)


def slow_get(order: int, data: bytes, index: int) -> int:
    """One counter bit by bit: big endian from a byte up, least significant bit first below."""
    width = 1 << order
    if width >= 8:
        return int.from_bytes(data[index * width // 8 : (index + 1) * width // 8], "big")
    return sum(
        (data[bit // 8] >> bit % 8 & 1) << bit - index * width for bit in range(index * width, (index + 1) * width)
    )


def block_of(order: int, values: list[int]) -> RefcountBlock:
    """A block of 64 bytes, filled one counter at a time."""
    block = RefcountBlock(order, bytearray(64))
    for index, value in enumerate(values[: len(block)]):
        block.set(index, value)
    return block


def all_values(block: RefcountBlock) -> list[int]:
    """By the slow oracle."""
    return [slow_get(block.order, bytes(block.data), index) for index in range(len(block))]


@pytest.mark.parametrize(
    ("order", "data", "values"),
    [
        (0, "05", [1, 0, 1, 0, 0, 0, 0, 0]),
        (1, "e4", [0, 1, 2, 3]),
        (2, "21", [1, 2]),
        (3, "0102", [1, 2]),
        (4, "00010203", [1, 0x203]),
        (4, "00010002", [1, 2]),
        (5, "0000000100000203", [1, 0x203]),
        (6, "00000000000000010000000000000203", [1, 0x203]),
    ],
)
def test_counters_lie_in_the_block_like_this(order: int, data: str, values: list[int]) -> None:
    """Golden bytes beside the numbers."""
    block = RefcountBlock(order, bytearray.fromhex(data))
    assert [block.get(index) for index in range(len(block))] == values
    assert list(block.load(0, len(block))) == values
    written = RefcountBlock(order, bytearray(len(block.data)))
    written.store(0, values)
    assert written.data == block.data
    if max(values) < 256:
        written.store(0, bytes(values))
        assert written.data == block.data


def test_array_items_have_the_widths_that_their_codes_promise() -> None:
    """Platforms may differ; the codec does not."""
    assert [array(code).itemsize for code in refcounts._CODES.values()] == [1, 2, 4, 8]


@given(st.sampled_from(ORDERS), st.integers(0, 2**32), st.data())
@settings(max_examples=200, deadline=None)
def test_ranges_equal_those_of_a_list(order: int, seed: int, data: st.DataObject) -> None:
    """Load, store, fill, add, free runs, searches and the last used counter, all widths."""
    source = random.Random(seed)
    block = RefcountBlock(order, bytearray(64))
    top = min(block.value_max, 5)
    values = [source.choice([0, 0, source.randint(0, top)]) for _ in range(len(block))]
    block = block_of(order, values)
    assert all_values(block) == values == [block.get(index) for index in range(len(block))]
    index = data.draw(st.integers(0, len(block) - 1))
    count = data.draw(st.integers(1, len(block) - index))
    assert list(block.load(index, count)) == values[index : index + count]
    assert block.is_uniform(index, count) == (len(set(values[index : index + count])) == 1)
    assert block.free_run(index, count) == next((at for at in range(count) if values[index + at]), count)
    wanted = data.draw(st.integers(1, 9))
    expected = next((at for at in range(index, len(values) - wanted + 1) if not any(values[at : at + wanted])), None)
    assert block.find_free(index, wanted) == expected
    assert [block.used(count) for count in range(1, len(values) + 1)] == [
        sum(map(bool, values[:count])) for count in range(1, len(values) + 1)
    ]
    assert block.last_used() == max((at for at, value in enumerate(values) if value), default=None)
    action = data.draw(st.sampled_from(["add", "fill", "store"]))
    if action == "add":
        delta = data.draw(st.integers(-2, 3))
        after = [value + delta if index <= at < index + count else value for at, value in enumerate(values)]
        if min(after) < 0 or max(after) > block.value_max:
            with pytest.raises((CorruptImageError, LimitError)):
                block.add(index, count, delta)
            after = values
        else:
            block.add(index, count, delta)
    elif action == "fill":
        block.fill(index, count, top)
        after = values[:index] + [top] * count + values[index + count :]
    else:
        block.store(index, [top - value for value in values[index : index + count]])
        after = [top - value if index <= at < index + count else value for at, value in enumerate(values)]
    assert all_values(block) == after


@pytest.mark.parametrize("order", ORDERS)
def test_a_counter_neither_overflows_nor_falls_below_zero(order: int) -> None:
    """The error's class says which; nothing has changed."""
    block = RefcountBlock(order, bytearray(64))
    block.fill(0, len(block), block.value_max)
    before = bytes(block.data)
    for count in (1, 3):
        with pytest.raises(LimitError):
            block.add(2, count, 1)
    with pytest.raises(LimitError):
        block.set(0, block.value_max + 1)
    assert block.data == before
    block.set(3, 0)
    for count in (1, 4):
        with pytest.raises(CorruptImageError):
            block.add(3, count, -1)
    assert block.get(4) == block.value_max


def test_a_free_run_across_the_search_window_is_found() -> None:
    """Small widths are searched in windows of 8192 counters."""
    for order in (0, 1, 2):
        block = RefcountBlock(order, bytearray(b"\xff" * 8192))
        block.fill(8190, 5, 0)
        assert block.find_free(0, 5) == 8190
        assert block.find_free(0, 6) is None
        assert block.find_free(8191, 4) == 8191


@given(st.sampled_from(ORDERS), st.binary(min_size=16, max_size=16), st.data())
def test_the_raised_version_of_a_block_has_each_larger_counter(order: int, old: bytes, data: st.DataObject) -> None:
    """So that freed clusters stay protected until nothing refers to them."""
    at = data.draw(st.integers(0, 15))
    changed = data.draw(st.binary(max_size=16 - at))
    new = old[:at] + changed + old[at + len(changed) :]
    expected = [
        max(slow_get(order, old, index), slow_get(order, new, index))
        for index in range(len(RefcountBlock(order, bytearray(16))))
    ]
    assert all_values(RefcountBlock(order, bytearray(raised(order, old, new)))) == expected


def test_a_write_outside_the_block_is_refused() -> None:
    """Slices would grow the block in silence."""
    block = RefcountBlock(4, bytearray(64))
    with pytest.raises(IndexError):
        block.fill(30, 3, 1)
    with pytest.raises(IndexError):
        block.set(32, 1)
