"""Geometry: derived numbers and splits equal the specification's formulas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import FormatError, LimitError
from blocklayer.codec.qcow2.geometry import Geometry

GIB = 1 << 30
TIB = 1 << 40


def test_the_default_geometry_has_these_numbers() -> None:
    """64 KiB clusters, 16-bit refcounts."""
    geometry = Geometry()
    assert (geometry.cluster_size, geometry.l2_entries, geometry.l2_coverage) == (65536, 8192, 512 << 20)
    assert (geometry.refcount_bits, geometry.refcount_block_entries, geometry.refcount_max) == (16, 32768, 65535)
    assert geometry.refcount_block_coverage == 2 * GIB
    assert (geometry.subclusters, geometry.subcluster_size) == (1, 65536)
    assert geometry.size_max == 4 * 1024 * 512 * GIB
    assert geometry.compressed_offset_bits == 54


def test_extended_entries_halve_the_table_and_divide_the_cluster() -> None:
    """16-byte entries, 32 subclusters."""
    geometry = Geometry(extended_l2=True)
    assert (geometry.l2_entry_size, geometry.l2_entries, geometry.l2_coverage) == (16, 4096, 256 << 20)
    assert (geometry.subclusters, geometry.subcluster_size, geometry.subcluster_bits) == (32, 2048, 11)


def test_small_clusters_bound_the_disk() -> None:
    """The specification's figures for 512-byte clusters: 128 GiB of disk, 32 GiB of file with 64-bit refcounts."""
    geometry = Geometry(cluster_bits=9, refcount_order=6)
    assert geometry.size_max == 128 * GIB
    assert geometry.host_size_max == 32 * GIB
    assert Geometry(cluster_bits=21).size_max == 2 * 1024 * 1024 * TIB


@given(st.integers(9, 21), st.booleans(), st.integers(0, 6), st.integers(0, 2**56))
def test_indices_follow_the_specification(bits: int, extended: bool, order: int, offset: int) -> None:  # noqa: FBT001
    """Division and remainder, as the document writes them; and back."""
    geometry = Geometry(cluster_bits=bits, extended_l2=extended and bits >= 14, refcount_order=order)
    cluster = 1 << bits
    l2_entries = cluster // geometry.l2_entry_size
    split = geometry.split(offset)
    assert split == (offset // cluster // l2_entries, offset // cluster % l2_entries, offset % cluster)
    assert geometry.guest_offset(split.l1_index, split.l2_index) + split.in_cluster == offset
    block_entries = cluster * 8 // (1 << order)
    assert geometry.refcount_position(offset) == divmod(offset // cluster, block_entries)
    assert geometry.l1_entries_for(offset) == -(-offset // (cluster * l2_entries))
    assert geometry.clusters_for(offset) == -(-offset // cluster)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cluster_bits": 8},
        {"refcount_order": 7},
        {"refcount_order": -1},
        {"version": 4},
        {"extended_l2": True, "cluster_bits": 13},
        {"version": 2, "extended_l2": True},
        {"version": 2, "data_file": True},
        {"version": 2, "refcount_order": 3},
    ],
    ids=str,
)
def test_a_geometry_that_the_specification_forbids_cannot_be_made(wrong: dict[str, int]) -> None:
    """Nothing downstream has to check again."""
    with pytest.raises(FormatError):
        Geometry(**wrong)  # type: ignore[arg-type]  # a table of keyword arguments


def test_clusters_beyond_the_limit_are_a_limit_error() -> None:
    """Valid in form, but larger than we let an image make us spend."""
    with pytest.raises(LimitError):
        Geometry(cluster_bits=22)
