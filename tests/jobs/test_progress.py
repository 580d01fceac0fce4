"""The progress meter: bytes, rate over the last seconds, and what is left."""

from __future__ import annotations

from blocklayer.jobs.progress import WINDOW_S, Progress, ProgressMeter


def test_nothing_done_has_no_rate_and_no_eta() -> None:
    assert ProgressMeter(100, 5.0).snapshot(5.0) == Progress(0, 100, 0.0, None)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    meter = ProgressMeter(10_000, 0.0)
    for second in range(1, 21):
        meter.advance(10 if second <= 10 else 100, float(second))
    progress = meter.snapshot(20.0)
    assert progress.current == 1100
    assert progress.rate == 100.0
    assert progress.eta == (10_000 - 1100) / 100


def test_what_needs_no_work_lowers_the_total() -> None:
    meter = ProgressMeter(100, 0.0)
    meter.drop(60)
    meter.advance(40, 1.0)
    progress = meter.snapshot(1.0)
    assert (progress.current, progress.total, progress.fraction, progress.eta) == (40, 40, 1.0, 0.0)


def test_a_job_with_nothing_to_do_is_complete() -> None:
    assert ProgressMeter(0, 0.0).snapshot(0.0).fraction == 1.0


def test_samples_are_bounded() -> None:
    meter = ProgressMeter(10**9, 0.0)
    for step in range(100_000):
        meter.advance(1, step / 1000)
    assert len(meter._samples) < WINDOW_S / 0.1 + 5
