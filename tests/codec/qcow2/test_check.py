"""The checker finds each kind of damage, and its work stays bounded on hostile images."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from itertools import pairwise

import pytest

from blocklayer.base.errors import CorruptImageError, FormatError
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED
from blocklayer.codec.qcow2.features import Incompatible
from blocklayer.codec.qcow2.repair import plan_repair
from tests.helpers.qcow2_image import CLUSTER, Image


def test_a_new_image_is_clean() -> None:
    """Everything allocated, nothing fragmented."""
    result = Image().check()
    assert result.is_clean
    assert (result.total_clusters, result.allocated_clusters, result.fragmented_clusters) == (100, 100, 0)


def test_a_missing_count_is_a_corruption_and_an_extra_one_a_leak() -> None:
    """With the COPIED flag's contradiction counted beside, as qemu-img does."""
    image = Image()
    victim = image.plan.guest.offset // CLUSTER
    image.put(image.refcount_offset(victim), 0, 2)
    image.put(image.refcount_offset(victim + 1), 7, 2)
    result = image.check()
    assert [finding.offset // CLUSTER for finding in result.counts.described] == [victim, victim, victim + 1]
    assert [finding.offset // CLUSTER for finding in result.leaks.described] == [victim + 1]
    assert (result.corruptions, result.leaks.count) == (3, 1)
    assert not result.flags.count


def test_an_unreferenced_cluster_is_a_leak() -> None:
    """Its L2 entry was cleared without lowering the count."""
    image = Image()
    image.put(image.l2, 0)
    result = image.check()
    assert (result.corruptions, result.leaks.count, result.allocated_clusters) == (0, 1, 99)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (COPIED | 513 * 2, "not valid"),
        (1 << 57, "not valid"),
        (COPIED, "header"),
        (COPIED | 1 << 40, "behind the end"),
        (COMPRESSED | 1 << 40, "behind the end"),
    ],
)
def test_a_bad_l2_entry_breaks_the_image(entry: int, text: str) -> None:
    """Reserved bits, offset 0, offsets behind the end."""
    image = Image()
    image.put(image.l2, entry)
    result = image.check()
    assert result.broken.count == 1
    assert text in result.broken.described[0].text
    with pytest.raises(CorruptImageError):
        plan_repair(result)


@pytest.mark.parametrize("target", ["header", "l1", "l2", "table"])
def test_data_over_metadata_break_the_image(target: str) -> None:
    """Writing to that guest cluster would destroy the metadata, whatever its refcount."""
    image = Image()
    offsets = {
        "header": 0,
        "l1": image.header.l1_table_offset,
        "l2": image.l2,
        "table": image.header.refcount_table_offset,
    }
    image.put(image.l2, COPIED | offsets[target])
    assert image.check().broken.count


def test_one_cluster_mapped_twice_is_a_corruption() -> None:
    """Two guest clusters at one host cluster: the count is too low, and both flags lie."""
    image = Image()
    image.put(image.l2, image.word(image.l2 + 8))
    result = image.check()
    assert result.counts.count == 1
    assert result.leaks.count == 1
    assert result.flags.count == 1
    with pytest.raises(CorruptImageError):
        plan_repair(result)


def test_a_missing_copied_flag_is_a_corruption() -> None:
    """qemu-img counts it as one."""
    image = Image()
    image.put(image.l2, image.word(image.l2) & ~COPIED)
    result = image.check()
    assert (result.corruptions, result.leaks.count) == (1, 0)


def test_an_l2_table_used_twice_is_walked_once() -> None:
    """However many L1 entries name it: bounded work."""
    image = Image()
    l1 = image.header.l1_table_offset
    image.put(l1 + 8, image.word(l1))
    result = image.check()
    assert "twice" in result.broken.described[0].text
    assert result.allocated_clusters == 64


def test_a_bad_l1_entry_breaks_the_image() -> None:
    """Reserved bits and offsets behind the end; the rest is still checked."""
    for entry in (1 << 60, COPIED | 1 << 45, COPIED | 3):
        image = Image()
        image.put(image.header.l1_table_offset, entry)
        result = image.check()
        assert result.broken.count == 1
        assert result.allocated_clusters == 36


def test_a_dirty_data_file_image_is_checked_without_counting_guest_clusters() -> None:
    """They lie in another file, and must all be marked as copied."""
    image = Image(data_file="data.raw")
    assert Incompatible.DATA_FILE in image.header.incompatible
    assert image.check().is_clean
    image.put(image.l2, image.word(image.l2 + 8) & ~COPIED)
    assert image.check().counts.count == 1


def test_subclusters_that_contradict_each_other_break_the_image() -> None:
    """Both allocated and zero; allocated without a host cluster."""
    for descriptor, bitmap in ((None, 1 << 32 | 1), (0, 1)):
        image = Image(cluster_size=16384, extended_l2=True)
        if descriptor is not None:
            image.put(image.l2, descriptor)
        image.put(image.l2 + 8, bitmap)
        assert image.check().broken.count == 1


def test_a_snapshot_table_that_is_cut_short_is_a_format_error() -> None:
    """It claims more entries than the file has bytes."""
    image = Image()
    offset = len(image.data)
    image.data += bytes(CLUSTER)
    header = replace(image.header, nb_snapshots=1000, snapshots_offset=offset)
    image.data[: len(qcow2_header.serialize(header))] = qcow2_header.serialize(header)
    with pytest.raises(FormatError):
        image.check()


def test_a_snapshot_shares_clusters_with_the_active_tables() -> None:
    """Its L1 table names the same L2 tables: each cluster is counted twice and not copied."""
    image = Image()
    l1, snapshots = len(image.data), len(image.data) + CLUSTER
    active = image.header.l1_table_offset
    image.data += image.data[active : active + CLUSTER]
    entry = struct.pack(">QIHHIIQII", l1, image.header.l1_size, 1, 3, 0, 0, 0, 0, 16) + bytes(16) + b"1one"
    image.data += entry.ljust(CLUSTER, b"\0")
    header = replace(image.header, nb_snapshots=1, snapshots_offset=snapshots)
    image.data[: len(qcow2_header.serialize(header))] = qcow2_header.serialize(header)
    result = image.check()
    assert not result.broken.count
    guest = image.plan.guest.offset // CLUSTER
    assert result.references.get(guest) == 2
    assert result.references.get(image.l2 // CLUSTER) == 2
    assert result.references.get(l1 // CLUSTER) == 1


def test_a_scattered_table_is_counted_like_any_other() -> None:
    """Entries in random order, some missing: the same references, marks and statistics as run by run."""
    image = Image()
    words = [image.word(image.l2 + 8 * index) for index in range(64)]
    random.Random(7).shuffle(words)
    words[5] = words[40] = 0
    for index, word in enumerate(words):
        image.put(image.l2 + 8 * index, word)
    used = [word for word in words if word]
    result = image.check()
    assert not result.corruptions
    assert result.leaks.count == 2
    assert result.allocated_clusters == 98
    assert result.fragmented_clusters == sum(later != word + CLUSTER for word, later in pairwise(used))
    assert result.references.get((used[0] & ~COPIED) // CLUSTER) == 1
    image.put(image.l2, used[1])
    assert image.check().flags.count == 1
