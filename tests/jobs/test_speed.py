"""The speed limit as arithmetic."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import OptionError
from blocklayer.jobs.speed import SLICE_S, SpeedLimit


def test_no_limit_never_waits() -> None:
    limit = SpeedLimit()
    limit.charge(10**12, 0.0)
    assert limit.delay(0.0) == 0.0


def test_a_chunk_may_overdraw_and_the_next_one_waits_until_that_is_paid_but_for_a_slice() -> None:
    limit = SpeedLimit(100)
    assert limit.delay(0.0) == 0.0
    limit.charge(1000, 0.0)
    assert limit.delay(0.0) == pytest.approx(10 - SLICE_S)
    assert limit.delay(9.9) == 0.0


def test_small_chunks_run_ahead_by_one_slice_at_most() -> None:
    limit = SpeedLimit(1000)
    taken = 0
    while not limit.delay(0.0):
        limit.charge(10, 0.0)
        taken += 10
    assert taken <= 1000 * SLICE_S + 10


def test_over_a_long_time_the_speed_is_kept() -> None:
    limit, now, done = SpeedLimit(1 << 20), 0.0, 0
    while now < 100:
        now += limit.delay(now)
        limit.charge(65536, now)
        done += 65536
    assert done / now == pytest.approx(1 << 20, rel=0.01)


def test_a_change_forgives_what_is_owed() -> None:
    limit = SpeedLimit(1)
    limit.charge(10**9, 0.0)
    limit.set(1000)
    assert limit.delay(0.0) == 0.0


def test_negative_speeds_are_refused() -> None:
    with pytest.raises(OptionError, match="non-negative"):
        SpeedLimit(-1)
    limit = SpeedLimit(5)
    with pytest.raises(OptionError):
        limit.set(-5)
    assert limit.speed == 5
