"""Grace periods: when a piece of host space that was freed may be used for something else.

A request that waits while it uses a mapping may still be on its way to a host cluster that somebody else just freed. So
each such request enters the current *generation*; a free closes that generation (later requests cannot have seen the
old mapping) and its space may be used again when all requests of that and earlier generations have left.
"""

from __future__ import annotations


class GracePeriods:
    """Counts the requests of each generation that has any."""

    __slots__ = ("_active", "_generation")

    def __init__(self) -> None:
        """Nobody is inside."""
        self._generation = 0
        self._active: dict[int, int] = {}

    def enter(self) -> int:
        """A request begins to use mappings; give the answer to ``leave``."""
        generation = self._generation
        self._active[generation] = self._active.get(generation, 0) + 1
        return generation

    def leave(self, generation: int) -> None:
        """The request uses no mapping any more."""
        left = self._active[generation] - 1
        if left:
            self._active[generation] = left
        else:
            del self._active[generation]

    def close(self) -> int:
        """Something was freed: answers the generation that must have ended before it may be used again."""
        self._generation += 1
        return self._generation - 1

    def has_ended(self, generation: int) -> bool:
        """Whether nobody of ``generation`` or before is left."""
        return all(active > generation for active in self._active)
