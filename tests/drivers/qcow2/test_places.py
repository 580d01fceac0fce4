"""Mappings that point to metadata are found; places that hold metadata no more are forgotten."""

from __future__ import annotations

from array import array

from blocklayer.codec.qcow2.entries import COPIED
from blocklayer.drivers.qcow2 import places
from blocklayer.drivers.qcow2.places import MetadataPlaces

CLUSTER = 65536


def table(*entries: int) -> array[int]:
    words = array("Q", bytes(8 * 32))
    words[3 : 3 + len(entries)] = array("Q", entries)
    return words


def test_an_empty_table_meets_nothing() -> None:
    found = MetadataPlaces(CLUSTER)
    found.add(CLUSTER, 8)
    assert not found.meet(table())


def test_a_place_is_met_with_and_without_the_copied_flag() -> None:
    found = MetadataPlaces(CLUSTER)
    found.add(4 * CLUSTER, 2)
    for entry in (4 * CLUSTER, 5 * CLUSTER):
        assert found.meet(table(entry))
        assert found.meet(table(entry | COPIED))
    assert not found.meet(table(3 * CLUSTER | COPIED, 6 * CLUSTER | COPIED))


def test_the_headers_cluster_is_always_metadata() -> None:
    assert MetadataPlaces(CLUSTER).meet(table(COPIED))


def test_tables_add_what_they_point_to() -> None:
    found = MetadataPlaces(CLUSTER)
    found.add_tables(array("Q", [0, 7 * CLUSTER | COPIED, 9 * CLUSTER]))
    assert found.meet(table(7 * CLUSTER))
    assert found.meet(table(9 * CLUSTER | COPIED))
    assert not found.meet(table(8 * CLUSTER | COPIED))


def test_what_is_removed_is_data_again() -> None:
    found = MetadataPlaces(CLUSTER)
    found.add(4 * CLUSTER, 3)
    found.remove(5 * CLUSTER)
    assert not found.meet(table(5 * CLUSTER | COPIED))
    assert found.meet(table(6 * CLUSTER | COPIED))


def test_more_tables_than_memory_is_spent_on_are_not_kept() -> None:
    found = MetadataPlaces(CLUSTER)
    found.add_tables(array("Q", [CLUSTER]) * (places.TABLES_MAX + 1))
    assert not found.meet(table(CLUSTER))


def test_tables_of_l1_that_lie_in_other_metadata_or_come_twice_are_claimed_by_something_else() -> None:
    found = MetadataPlaces(CLUSTER)
    found.add(4 * CLUSTER)
    entries = [0, 4 * CLUSTER | COPIED, 6 * CLUSTER, 7 * CLUSTER | COPIED, 6 * CLUSTER | COPIED, COPIED]
    assert found.claimed(array("Q", entries)) == {4 * CLUSTER, 6 * CLUSTER, 0}


def test_a_run_overlaps_if_one_of_its_clusters_is_a_place() -> None:
    found = MetadataPlaces(CLUSTER)
    found.add(4 * CLUSTER)
    assert found.overlap(2 * CLUSTER, 3)
    assert not found.overlap(2 * CLUSTER, 2)
    assert not found.overlap(5 * CLUSTER, 100)
    assert found.overlap(0, 1)
