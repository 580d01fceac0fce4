"""The order in which dirty metadata reach the disk, so that every crash leaves a consistent image.

Layer ``codec``: pure. A ``WritePlan`` is a sequence of epochs. Steps of one epoch may reach the disk in any order and
in part; a flush follows every epoch. So what a crash leaves is: all epochs before some point, and any subset of one.

    epoch     roles                               why it is safe at any subset
    --------  ----------------------------------  -----------------------------------------------------------------
    0 fill    NEW                                 nothing on disk refers to these clusters yet
    1 count   REFCOUNT_TABLE, REFCOUNT_RAISE      counts that are too high are leaks
    2 switch  HEADER                              one sector; all that it refers to is filled and counted
    3 map     MAPPING                             clusters that become reachable are filled and counted; those that
                                                  become unreachable are counted still
    4 free    REFCOUNT_LOWER                      nothing on disk refers to these clusters any more

- A table that moves (L1, refcount table) is written whole as NEW; HEADER then switches to it. The header stands before
  MAPPING because counts in a moved refcount table hold only after the switch.
- Epochs 0 and 1 are one if there is no REFCOUNT_TABLE step: a table entry must not appear before its block is filled,
  but raised counts in old blocks depend on nothing.
- A block with counters that rise and others that fall is given twice: ``refcounts.raised`` as REFCOUNT_RAISE, and
  itself as REFCOUNT_LOWER.
- A cluster that was freed must not be used again, nor its host space be discarded, before the plan has run to its end.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Final

from blocklayer.base.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MERGE_MAX: Final = MIB
"""Adjacent steps are joined up to this many bytes: one system call instead of many, little memory."""


class Role(enum.Enum):
    """What dirty bytes are; the value is the epoch they belong to."""

    NEW = ("new", 0)
    REFCOUNT_TABLE = ("refcount table", 1)
    REFCOUNT_RAISE = ("refcount raise", 1)
    HEADER = ("header", 2)
    MAPPING = ("mapping", 3)
    REFCOUNT_LOWER = ("refcount lower", 4)

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0."""
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Step:
    """One write: ``data`` at file ``offset``."""

    role: Role
    offset: int
    data: bytes | bytearray | memoryview

    @property
    def end(self) -> int:
        """First byte behind the write."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Epoch:
    """Steps without an order among them; they do not overlap."""

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        """Refuse overlapping steps: their result would depend on the order."""
        ordered = sorted(self.steps, key=lambda step: step.offset)
        for step, later in pairwise(ordered):
            if step.end > later.offset:
                raise ValueError(f"steps at {step.offset:#x} and {later.offset:#x} of one epoch overlap")


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Epochs in order; none is empty. A flush follows each."""

    epochs: tuple[Epoch, ...]

    @property
    def length(self) -> int:
        """Bytes that the plan writes."""
        return sum(len(step.data) for epoch in self.epochs for step in epoch.steps)


def plan_flush(dirty: Iterable[Step]) -> WritePlan:
    """Order ``dirty`` into epochs and join neighbours. Raises ``ValueError`` for steps of one epoch that overlap."""
    steps = sorted((step for step in dirty if len(step.data)), key=lambda step: (step.role.epoch, step.offset))
    independent = all(step.role is not Role.REFCOUNT_TABLE for step in steps)
    groups = groupby(steps, key=lambda step: max(step.role.epoch, 1) if independent else step.role.epoch)
    return WritePlan(tuple(Epoch(tuple(_joined(group))) for _, group in groups))


def _joined(steps: Iterable[Step]) -> Iterator[Step]:
    """Steps in order of their offsets, neighbours of one role made one."""
    pieces: list[Step] = []
    for step in steps:
        fits = pieces and step.end - pieces[0].offset <= MERGE_MAX
        if not fits or pieces[-1].end != step.offset or pieces[-1].role is not step.role:
            yield from _one(pieces)
            pieces = []
        pieces.append(step)
    yield from _one(pieces)


def _one(pieces: list[Step]) -> Iterator[Step]:
    if len(pieces) == 1:
        yield pieces[0]
    elif pieces:
        yield Step(pieces[0].role, pieces[0].offset, b"".join(piece.data for piece in pieces))
