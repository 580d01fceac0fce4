"""Repairs make refcounts equal references, or are refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import CorruptImageError, FormatError
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.repair import RepairPlan, plan_repair
from tests.helpers.crash import apply
from tests.helpers.qcow2_image import CLUSTER, Image


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_damage_anywhere_is_found_or_harmless_and_never_another_exception(damage: list[tuple[int, int]]) -> None:
    """Fuzz: bytes of the metadata overwritten; a repair that is offered makes the counts right."""
    image = Image()
    for position, value in damage:
        image.data[position % image.plan.guest.offset] = value
    try:
        result = image.check()
        plan = plan_repair(result)
    except (FormatError, CorruptImageError):
        return
    if plan is not None:
        repair(image, plan)
        assert image.check().is_clean


def repair(image: Image, plan: RepairPlan | None) -> None:
    """Perform the plan on the image."""
    assert plan is not None
    apply(image.data, [(step.offset, bytes(step.data)) for step in plan.steps()])
    apply(image.data, [(0, qcow2_header.serialize(plan.header))])
    assert len(image.data) <= plan.file_size


def test_wrong_counts_are_repaired_in_place() -> None:
    """What a dirty bit stands for: counts too low and too high, mappings right."""
    image = Image()
    size = len(image.data)
    image.put(image.refcount_offset(image.plan.guest.offset // CLUSTER), 0, 2)
    image.put(image.l2 + 80, 0)
    repair(image, plan_repair(image.check()))
    assert image.check().is_clean
    assert len(image.data) == size


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_a_lost_refcount_table_is_rebuilt_behind_the_end(bits: int) -> None:
    """All widths; the header names the new table."""
    image = Image(refcount_bits=bits)
    table = image.header.refcount_table_offset
    image.data[table : table + CLUSTER] = bytes(CLUSTER)
    repair(image, plan_repair(image.check()))
    result = image.check()
    assert result.is_clean, (result.broken, result.counts, result.leaks)
    assert result.header.refcount_table_offset >= image.plan.file_size


def test_a_misplaced_refcount_block_asks_for_a_rebuild() -> None:
    """Off its cluster boundary, behind the end, in place of other metadata, or of data that are mapped."""
    for entry in (3, 1 << 40, 512 * 1, 2**64 - 512, Image().plan.guest.offset):
        image = Image()
        image.put(image.header.refcount_table_offset, entry)
        result = image.check()
        assert result.rebuild
        repair(image, plan_repair(result))
        assert plan_repair(result) is None
        assert image.check().is_clean


def test_a_clean_image_needs_no_repair() -> None:
    """None, not an empty plan."""
    assert plan_repair(Image().check()) is None
