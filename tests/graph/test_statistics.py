"""Statistics: what is counted, in which latency bucket, and that a snapshot stands still."""

from __future__ import annotations

import pytest

from blocklayer.graph.requests import RequestKind
from blocklayer.graph.statistics import LATENCY_BOUNDS_S, OperationCounters, Statistics


def test_latency_buckets_reach_from_16_microseconds_to_about_a_second() -> None:
    assert [round(bound * 1e6) for bound in LATENCY_BOUNDS_S] == [
        16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0, 0), (16e-6, 0), (17e-6, 1), (64e-6, 1), (65e-6, 2), (0.001, 3), (1.0, 8), (1.1, 9), (3600, 9)],
)
def test_a_latency_counts_in_the_first_bucket_that_holds_it(seconds: float, bucket: int) -> None:
    counters = OperationCounters()
    counters.record(0, seconds)
    assert counters.latency == [int(number == bucket) for number in range(10)]


def test_operations_bytes_and_seconds_add_up() -> None:
    counters = OperationCounters()
    counters.record(512, 0.25)
    counters.record(4096, 0.5)
    assert (counters.operations, counters.bytes, counters.seconds, counters.errors) == (2, 4608, 0.75, 0)
    assert sum(counters.latency) == 2


def test_the_highest_offset_written_never_falls() -> None:
    statistics = Statistics()
    for end in (4096, 512, 8192, 100):
        statistics.wrote(end)
    assert statistics.write_end_max == 8192


def test_a_snapshot_is_equal_now_and_does_not_change_later() -> None:
    statistics = Statistics(write_end_max=4096)
    for kind in RequestKind:
        counters = getattr(statistics, kind.value)
        counters.record(100, 0.1)
        counters.errors += 1
    before = statistics.snapshot()
    assert before == statistics
    statistics.wrote(8192)
    for kind in RequestKind:
        getattr(statistics, kind.value).record(1, 5.0)
    assert before.write_end_max == 4096
    for kind in RequestKind:
        counters = getattr(before, kind.value)
        assert (counters.operations, counters.bytes, counters.errors) == (1, 100, 1)
        assert sum(counters.latency) == 1
