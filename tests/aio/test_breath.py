"""Work that never waits gives others a turn whenever a millisecond has passed."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from blocklayer.aio import breath
from blocklayer.aio.breath import BREATH_S, Breather


@pytest.mark.parametrize(("step", "expected"), [(BREATH_S / 4, 20), (BREATH_S * 2, 100), (0.0, 0)])
async def test_others_get_a_turn_when_a_breath_is_over(
    step: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr(breath, "perf_counter", lambda: next(ticks) * step)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.ensure_future(other())
    await asyncio.sleep(0)
    breather = Breather()
    for _ in range(100):
        await breather.breathe()
    task.cancel()
    assert turns == pytest.approx(expected, abs=1)
