"""Giving others a turn: work that never has to wait must not keep the event loop to itself.

Driving over a million holes costs no I/O, so nothing suspends; whoever does such work breathes between its steps.
"""

from __future__ import annotations

import asyncio
from time import perf_counter

BREATH_S = 0.001
"""How long one piece of work may go on; a few of them at once stay below what a guest notices."""


class Breather:
    """One for each piece of work that loops."""

    __slots__ = ("_since",)

    def __init__(self) -> None:
        """The work begins."""
        self._since = perf_counter()

    async def breathe(self) -> None:
        """Let others run if it is time; else return at once."""
        if perf_counter() - self._since > BREATH_S:
            await asyncio.sleep(0)
            self._since = perf_counter()
