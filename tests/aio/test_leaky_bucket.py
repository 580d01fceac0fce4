"""LeakyBucket: how much passes when somebody asks as often as possible, in virtual seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.aio.leaky_bucket import BucketLimits, LeakyBucket
from blocklayer.base.errors import OptionError


def moments(limits, units, *, count, start=0.0):
    """When requests of ``units`` pass if the next one comes as soon as the last one has passed."""
    bucket, now, passed = LeakyBucket(limits), start, []
    for _ in range(count):
        while (delay := bucket.delay(now)) > 1e-12:
            now += delay
        bucket.pour(units, now)
        passed.append(now)
    return passed


def test_without_a_limit_everything_passes_at_once():
    assert moments(BucketLimits(), 1e12, count=5) == [0] * 5


def test_a_tenth_of_a_second_passes_at_once_and_then_the_average():
    """100 a second: the bucket holds 10, and one more goes in while it is not over-full."""
    passed = moments(BucketLimits(average=100), 1, count=111)
    assert passed[:11] == [0] * 11
    assert passed[11:] == pytest.approx([index / 100 for index in range(1, 101)])


def test_one_request_larger_than_the_bucket_passes_and_is_paid_for_later():
    assert moments(BucketLimits(average=100), 1000, count=3) == pytest.approx([0, 9.9, 19.9])


def test_a_burst_of_one_second_passes_at_once():
    passed = moments(BucketLimits(average=10, burst_max=100), 1, count=111)
    assert passed[:101] == [0] * 101
    assert passed[101:] == pytest.approx([index / 10 for index in range(1, 11)])


def test_a_longer_burst_passes_at_the_rate_of_the_burst():
    """20 a second for 5 seconds, not 100 at once; while it lasts the bucket leaks 10 a second, so it lasts 10 seconds."""
    passed = moments(BucketLimits(average=10, burst_max=20, burst_length_s=5), 1, count=300)
    assert passed[:3] == [0] * 3, "a tenth of a second of the burst passes at once"
    assert passed[3:190] == pytest.approx([index / 20 for index in range(1, 188)])
    assert passed[-1] - passed[-51] == pytest.approx(5), "then 10 a second"


def test_a_pause_empties_the_bucket():
    bucket = LeakyBucket(BucketLimits(average=100))
    bucket.pour(60, 0.0)
    assert bucket.delay(0.0) == pytest.approx(0.5)
    assert bucket.delay(0.3) == pytest.approx(0.2)
    assert bucket.delay(0.5) == 0
    bucket.pour(10, 1000.0)
    assert bucket.delay(1000.0) == 0, "a long pause saves nothing up"
    bucket.pour(1, 1000.0)
    assert bucket.delay(1000.0) == pytest.approx(0.01)


def test_asking_costs_nothing():
    bucket = LeakyBucket(BucketLimits(average=100))
    bucket.pour(60, 0.0)
    assert [bucket.delay(0.25) for _ in range(5)] == pytest.approx([0.25] * 5)


def test_other_limits_hold_from_now_on_and_what_is_in_the_bucket_stays():
    bucket = LeakyBucket(BucketLimits(average=100))
    bucket.pour(110, 0.0)
    bucket.change(BucketLimits(average=10), 0.5)
    assert bucket.limits == BucketLimits(average=10)
    assert bucket.delay(0.5) == pytest.approx(5.9), "60 are left; 59 have to leak at 10 a second"


def test_what_leaked_before_a_change_leaked_at_the_old_rate():
    """An hour of rest at 100 a second has emptied the bucket, however slow it is from now on."""
    bucket = LeakyBucket(BucketLimits(average=100))
    bucket.pour(100_000, 0.0)
    bucket.change(BucketLimits(average=1), 3600.0)
    assert bucket.delay(3600.0) == 0


def test_a_limit_that_is_lifted_and_set_again_starts_with_an_empty_bucket_after_a_while():
    bucket = LeakyBucket(BucketLimits(average=10))
    bucket.change(BucketLimits(), 1.0)
    bucket.pour(1e9, 2.0)
    assert bucket.delay(2.0) == 0
    bucket.change(BucketLimits(average=10), 3.0)
    assert bucket.delay(3.0) == 0


@given(
    average=st.integers(1, 1000),
    factor=st.integers(1, 20),
    burst_length_s=st.integers(1, 10),
    units=st.integers(1, 500),
    has_burst=st.booleans(),
)
def test_whoever_asks_all_the_time_gets_the_average_and_the_burst_and_not_more(
    average, factor, burst_length_s, units, has_burst
):
    limits = BucketLimits(average, average * factor, burst_length_s) if has_burst else BucketLimits(average)
    passed = moments(limits, units, count=60)
    room = limits.burst_max * limits.burst_length_s or average / 10
    for index, now in enumerate(passed):
        assert index * units <= room + average * now + 1e-3, "before this one"
        if burst_length_s > 1 and has_burst:
            assert index * units <= limits.burst_max * (now + 0.1) + 1e-3
    assert passed == sorted(passed)
    assert passed[-1] <= 59 * units / average + 1e-6, "and not less than the average"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"average": -1}, "limits must be 0 (none) or positive"),
        ({"average": 1, "burst_max": -1}, "limits must be 0 (none) or positive"),
        ({"average": 1, "burst_max": 2, "burst_length_s": 0}, "the length of a burst must be at least one second"),
        ({"burst_max": 2}, "a burst limit needs an average limit"),
        ({"average": 3, "burst_max": 2}, "a burst limit must not be lower than the average limit"),
        ({"average": 3, "burst_length_s": 2}, "a burst length needs a burst limit"),
    ],
)
def test_limits_that_qemu_refuses_are_refused(fields, expected):
    with pytest.raises(OptionError) as caught:
        BucketLimits(**fields)
    assert str(caught.value) == expected
