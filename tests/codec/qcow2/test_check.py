"""The checker finds each kind of damage, counts what qemu-img counts, and stays bounded on hostile images."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import CorruptImageError, FormatError
from blocklayer.base.modes import Preallocation
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.check import check, run_check
from blocklayer.codec.qcow2.check_result import DESCRIBED_MAX, CheckResult
from blocklayer.codec.qcow2.create import CreateOptions, plan_create
from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED
from blocklayer.codec.qcow2.features import Incompatible
from blocklayer.codec.qcow2.references import Mark, ReferenceMap
from blocklayer.codec.qcow2.repair import RepairPlan, plan_repair
from tests.helpers.crash import apply

CLUSTER = 512


class Image:
    """A preallocated image in memory: 100 data clusters behind two L2 tables."""

    def __init__(self, **options: object) -> None:
        settings = {"cluster_size": CLUSTER, "preallocation": Preallocation.METADATA, **options}
        plan = plan_create(CreateOptions(100 * CLUSTER, **settings))  # type: ignore[arg-type]  # keyword table
        self.plan = plan
        self.header = plan.header
        self.data = apply(bytearray(plan.file_size), plan.writes())

    def word(self, offset: int) -> int:
        """The 8-byte word at a file offset."""
        return int.from_bytes(self.data[offset : offset + 8], "big")

    def put(self, offset: int, word: int, width: int = 8) -> None:
        """Overwrite a word."""
        self.data[offset : offset + width] = word.to_bytes(width, "big")

    def check(self) -> CheckResult:
        """Run the check on the header as it is in the file."""
        header = qcow2_header.parse(bytes(self.data[: self.header.cluster_size]), file_size=len(self.data))
        return run_check(check(header, file_size=len(self.data)), lambda at, count: bytes(self.data[at : at + count]))

    @property
    def l2(self) -> int:
        """Offset of the first L2 table."""
        return self.plan.l2_tables.offset

    def refcount_offset(self, cluster: int) -> int:
        """Where the 16-bit refcount of a cluster is (all blocks are neighbours)."""
        return self.plan.refcount_blocks.offset + 2 * cluster


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


def test_descriptions_are_bounded_and_counts_are_not() -> None:
    """An image with more damage than anyone reads."""
    image = Image(refcount_bits=8, cluster_size=1024)
    image.data[image.plan.refcount_blocks.offset :][:100] = bytes(100)
    block = image.plan.refcount_blocks
    image.data[block.offset : block.end] = bytes(block.length)
    result = image.check()
    assert result.counts.count > DESCRIBED_MAX
    assert len(result.counts.described) == DESCRIBED_MAX


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
