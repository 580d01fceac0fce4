"""Refcount blocks are compared whole; only differences are looked at one by one."""

from __future__ import annotations

import pytest

from blocklayer.codec.qcow2.check_counts import saturated
from blocklayer.codec.qcow2.refcounts import RefcountBlock
from blocklayer.codec.qcow2.references import MANY
from tests.helpers.qcow2_image import CLUSTER, Image


@pytest.mark.parametrize("order", range(7))
def test_counters_are_reduced_to_a_byte_each(order: int) -> None:
    """Large ones become MANY; all widths."""
    block = RefcountBlock(order, bytearray(64))
    values = [min(value, block.value_max) for value in (0, 1, 2, 200, 254, 255, 256, 70000)]
    block.store(0, values)
    assert saturated(block, len(values)) == bytes(min(value, MANY) for value in values)
    block.fill(0, len(values), 1)
    assert saturated(block, len(values)) == b"\1" * len(values)


def test_large_counts_are_compared_exactly() -> None:
    """300 is not 301, though both are MANY."""
    image = Image()
    l1 = image.header.l1_table_offset
    image.put(image.refcount_offset(l1 // CLUSTER), 300, 2)
    result = image.check()
    assert "refcount is 300" in result.leaks.described[0].text
    result.references.add(l1 // CLUSTER, 1, times=299)
    assert result.references.get(l1 // CLUSTER) == 300


def test_counts_behind_the_end_of_the_file_count_for_nothing() -> None:
    """As with QEMU: such clusters were allocated and never written."""
    image = Image()
    image.put(image.refcount_offset(len(image.data) // CLUSTER + 3), 1, 2)
    assert image.check().is_clean


def test_the_end_of_the_image_is_behind_its_last_used_cluster() -> None:
    """Not behind the end of the file."""
    image = Image()
    expected = len(image.data)
    image.data += bytes(10 * CLUSTER)
    assert image.check().image_end_offset == expected
