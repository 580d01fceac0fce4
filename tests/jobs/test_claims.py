"""Claims: a cluster is asked for, in flight, or settled; never two of these."""

from __future__ import annotations

import asyncio

import anyio

from blocklayer.bitmap.copy_bitmap import CopyBitmap
from blocklayer.jobs.claims import Claims
from blocklayer.jobs.signal import Signal
from tests.helpers.virtual_time import virtual_time


def test_a_claim_takes_the_first_run_that_is_asked_for() -> None:
    bitmap = CopyBitmap(10)
    claims = Claims(bitmap, Signal())
    bitmap.clear(0, 2)
    claim = claims.take(0, 10, length_max=3, background=True)
    assert claim is not None
    assert (claim.first, claim.last) == (2, 5)
    assert bitmap.remaining == 5
    assert claims.background == 1
    assert claims.take(0, 5, length_max=3, background=False) is None


def test_a_copy_that_failed_is_asked_for_again() -> None:
    bitmap = CopyBitmap(10)
    claims = Claims(bitmap, Signal())
    claim = claims.take(0, 4, length_max=4, background=False)
    assert claim is not None
    claims.settle(claim, copied=False)
    claims.settle(claim, copied=True)
    assert bitmap.remaining == 10
    assert len(claims) == 0


def test_only_claims_that_share_a_cluster_overlap() -> None:
    claims = Claims(CopyBitmap(10), Signal())
    claim = claims.take(2, 5, length_max=9, background=False)
    assert claims.overlapping(0, 2) is None
    assert claims.overlapping(4, 6) is claim
    assert claims.overlapping(5, 9) is None


@virtual_time
async def test_whoever_waits_is_woken_when_the_claim_is_settled() -> None:
    claims = Claims(CopyBitmap(10), Signal())
    claim = claims.take(0, 1, length_max=9, background=False)
    assert claim is not None
    waiters = [asyncio.ensure_future(claim.wait()), asyncio.ensure_future(claims.wait_none())]
    await anyio.sleep(1)
    claims.settle(claim, copied=True)
    await asyncio.gather(*waiters)


def test_what_tasks_left_behind_is_given_up() -> None:
    bitmap = CopyBitmap(10)
    claims = Claims(bitmap, Signal())
    claims.take(0, 4, length_max=4, background=True)
    guest = claims.take(4, 8, length_max=4, background=False)
    claims.give_up_background()
    assert (claims.background, len(claims), bitmap.remaining) == (0, 1, 6)
    assert claims.overlapping(0, 10) is guest
