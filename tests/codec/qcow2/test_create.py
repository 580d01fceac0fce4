"""Layouts of new images: refused options, bounded memory, and results that our own checker takes for clean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import OptionError
from blocklayer.base.modes import Preallocation
from blocklayer.base.options import build
from blocklayer.base.ranges import Range
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.check import check, run_check
from blocklayer.codec.qcow2.create import CreateOptions, CreatePlan, plan_create
from blocklayer.codec.qcow2.features import Autoclear, Incompatible

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.check_result import CheckResult

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


def checked(plan: CreatePlan) -> CheckResult:
    """The result of our check on the plan's writes; what is not written reads as zeroes."""
    writes = dict(plan.writes())
    header = qcow2_header.parse(writes[0], file_size=plan.file_size)
    assert header == plan.header

    def read(offset: int, length: int) -> bytes:
        found = bytearray(length)
        for start, data in writes.items():
            part = Range(start, len(data)).intersect(Range(offset, length))
            if part.length:
                found[part.offset - offset : part.end - offset] = data[part.offset - start : part.end - start]
        return bytes(found)

    return run_check(check(header, file_size=plan.file_size), read)


@given(
    st.sampled_from([512, 1024, 4096, 16384, 65536, 2 * MIB]),
    st.integers(0, 6),
    st.integers(0, 3 * MIB),
    st.sampled_from([Preallocation.OFF, Preallocation.METADATA]),
)
@settings(max_examples=40, deadline=None)
def test_every_layout_is_clean(cluster_size: int, order: int, size: int, preallocation: Preallocation) -> None:
    """Every cluster of the file is counted once and nothing else is."""
    options = CreateOptions(size, cluster_size=cluster_size, refcount_bits=1 << order, preallocation=preallocation)
    plan = plan_create(options)
    result = checked(plan)
    assert result.is_clean, (result.broken, result.counts, result.leaks)
    assert result.image_end_offset == plan.file_size
    expected = result.total_clusters if preallocation is Preallocation.METADATA else 0
    assert result.allocated_clusters == expected


def test_a_plain_image_has_this_layout() -> None:
    """Header, refcount table, one refcount block, L1 table: four clusters."""
    plan = plan_create(CreateOptions(GIB))
    assert plan.file_size == 4 * 65536
    assert (plan.header.refcount_table_offset, plan.header.l1_table_offset) == (65536, 3 * 65536)
    assert (plan.header.l1_size, plan.header.size) == (2, GIB)
    assert plan.guest == Range(plan.file_size, 0)
    assert [write.offset for write in plan.writes()] == [65536, 2 * 65536, 0]


def test_the_header_is_written_last() -> None:
    """A file whose creation was cut short is no image."""
    plan = plan_create(CreateOptions(GIB, preallocation=Preallocation.METADATA))
    assert [write.offset for write in plan.writes()][-1] == 0


def test_a_preallocated_tebibyte_is_streamed() -> None:
    """No single write is larger than a table, and none overlaps another."""
    plan = plan_create(CreateOptions(TIB, preallocation=Preallocation.FULL))
    end, total = 65536, 0
    for offset, data in plan.writes():
        if offset:
            assert offset >= end
            end = offset + len(data)
        assert len(data) <= MIB
        total += len(data)
    assert total > 128 * MIB
    assert plan.guest.length == TIB
    assert plan.file_size == plan.guest.end


def test_an_odd_size_is_rounded_up_to_a_sector() -> None:
    """As qemu-img does."""
    assert plan_create(CreateOptions(1000)).header.size == 1024


def test_a_data_file_holds_the_guest_at_its_own_offsets() -> None:
    """A raw one is mapped whole, so that it stays raw."""
    plain = plan_create(CreateOptions(GIB, data_file="d"))
    assert Incompatible.DATA_FILE in plain.header.incompatible
    assert not plain.l2_tables.length
    raw = plan_create(CreateOptions(GIB, data_file="d", data_file_raw=True))
    assert raw.header.autoclear == Autoclear.DATA_FILE_RAW
    assert raw.l2_tables.length == 2 * 65536
    assert raw.guest == Range(0, GIB)
    assert checked(raw).is_clean


REFUSED: list[dict[str, object]] = [
    {"compat": "0.10", "refcount_bits": 8},
    {"compat": "0.10", "lazy_refcounts": True},
    {"compat": "0.10", "extended_l2": True},
    {"compat": "0.10", "data_file": "d"},
    {"compat": "0.10", "compression_type": "zstd"},
    {"compat": "2.0"},
    {"compression_type": "lzma"},
    {"cluster_size": 256},
    {"cluster_size": 4 * MIB},
    {"cluster_size": 65537},
    {"refcount_bits": 3},
    {"refcount_bits": 128},
    {"refcount_bits": 0},
    {"size": -1},
    {"size": 1 << 62},
    {"size": 129 * GIB, "cluster_size": 512},
    {"size": 65 * GIB, "cluster_size": 512, "refcount_bits": 64, "preallocation": Preallocation.METADATA},
    {"extended_l2": True, "cluster_size": 8192},
    {"data_file_raw": True},
    {"backing_fmt": "raw"},
    {"backing_file": "b"},
    {"backing_file": "", "backing_fmt": "raw"},
    {"backing_file": "a\0b", "backing_fmt": "raw"},
    {"backing_file": "b", "backing_fmt": "x" * 16},
    {"backing_file": "b" * 1024, "backing_fmt": "raw"},
    {"backing_file": "b" * 500, "backing_fmt": "raw", "cluster_size": 512},
    {"backing_file": "b", "backing_fmt": "raw", "data_file": "d", "data_file_raw": True},
    {"backing_file": "b", "backing_fmt": "raw", "preallocation": Preallocation.METADATA},
    {"data_file": "d\0"},
]


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: str(options)[:80])
def test_options_that_qemu_img_refuses_are_refused(options: dict[str, object]) -> None:
    """Before anything is written."""
    with pytest.raises(OptionError):
        plan_create(CreateOptions(**{"size": MIB, **options}))  # type: ignore[arg-type]  # a table of arguments


def test_options_can_be_built_from_strings() -> None:
    """As they come from a command line."""
    words = {"size": "10M", "cluster_size": "4k", "extended_l2": "off", "preallocation": "falloc", "compat": "v2"}
    options = build(CreateOptions, words)
    assert options == CreateOptions(10 * MIB, cluster_size=4096, preallocation=Preallocation.FALLOC, compat="v2")
    assert options.version == 2
