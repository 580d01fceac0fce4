"""Repairs make refcounts equal references, or are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import CorruptImageError, FormatError
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.entries import COPIED
from blocklayer.codec.qcow2.repair import RepairPlan, plan_flags, plan_leaks, plan_repair
from tests.helpers.crash import apply
from tests.helpers.qcow2_image import CLUSTER, Image

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.plan import Step


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


def drive(image: Image, generator: Any) -> Any:
    """What a plan that reads returns."""
    try:
        wanted = next(generator)
        while True:
            wanted = generator.send(bytes(image.data[wanted.offset : wanted.offset + wanted.length]))
    except StopIteration as end:
        return end.value


def write(image: Image, steps: list[Step]) -> None:
    apply(image.data, [(step.offset, bytes(step.data)) for step in steps])


@pytest.mark.parametrize("extended", [False, True])
def test_copied_flags_follow_the_references(extended: bool) -> None:
    """Missing in L1 and in L2, and present where a second entry uses the same L2 table."""
    image = Image(**({"extended_l2": True, "cluster_size": 16384} if extended else {}))
    image.put(image.l2, image.word(image.l2) & ~COPIED)
    l1 = image.header.l1_table_offset
    image.put(l1, image.word(l1) & ~COPIED)
    result = image.check()
    assert (result.flags.count, result.counts.count, result.repairable) == (2, 2, 2)
    with pytest.raises(CorruptImageError, match="COPIED"):
        plan_repair(result)
    write(image, drive(image, plan_flags(result)))
    assert plan_repair(result) is None
    assert image.check().is_clean


def test_a_wrong_count_hides_no_flag_and_a_wrong_flag_no_count() -> None:
    """Both at one cluster: two corruptions of which right references leave none."""
    image = Image()
    image.put(image.l2, image.word(image.l2) & ~COPIED)
    image.put(image.refcount_offset(image.plan.guest.offset // CLUSTER), 0, 2)
    result = image.check()
    assert (result.corruptions, result.repairable) == (1, 2)
    write(image, drive(image, plan_flags(result)))
    repair(image, plan_repair(result))
    assert image.check().is_clean


@pytest.mark.parametrize("bits", [1, 2, 16, 64])
def test_freeing_leaks_leaves_other_damage_alone(bits: int) -> None:
    """One cluster counts too much, one too little."""
    image = Image(refcount_bits=bits)
    image.put(image.l2 + 8, 0)
    result = image.check()
    assert (result.leaks.count, result.counts.count) == (1, 0)
    image.put(image.l2 + 16, image.word(image.l2 + 24))
    result = image.check()
    assert (result.leaks.count, result.counts.count > 0) == (2, True)
    before = result.corruptions
    write(image, drive(image, plan_leaks(result)))
    result = image.check()
    assert (result.leaks.count, result.corruptions) == (0, before)


def test_leaks_are_not_freed_where_references_are_not_certain() -> None:
    """A mapping that breaks the format may have meant the leaked cluster; a lost block cannot be lowered."""
    image = Image()
    image.put(image.l2 + 8, 3 * CLUSTER + 7 | COPIED)
    with pytest.raises(CorruptImageError, match="L2 table"):
        drive(image, plan_leaks(image.check()))
    image = Image()
    image.put(image.header.refcount_table_offset, 3)
    with pytest.raises(CorruptImageError, match="rebuilt"):
        drive(image, plan_leaks(image.check()))
