"""What a crash may leave of a file: images that follow from a log of writes and flushes.

A disk may keep any subset of the writes since the last flush, and tears a write at sectors of 512 bytes. Everything
before a flush that completed is there. ``crash_states`` yields such images: all subsets where there are few writes,
a seeded sample otherwise, and torn versions of single writes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from blocklayer.codec.qcow2.plan import WritePlan

SECTOR = 512
EXHAUSTIVE_MAX = 5
"""Writes in an epoch up to which all subsets (32) are tried."""

Event = tuple[Literal["write"], int, bytes] | tuple[Literal["flush"]]
Write = tuple[int, bytes]


@dataclass(frozen=True, slots=True)
class CrashState:
    """The file's content after a crash in ``epoch`` (0: before the first flush), and how it came about."""

    epoch: int
    image: bytes
    story: str


def events_of(plan: WritePlan) -> list[Event]:
    """The log of a plan that runs to its end."""
    log: list[Event] = []
    for epoch in plan.epochs:
        log += [("write", step.offset, bytes(step.data)) for step in epoch.steps]
        log.append(("flush",))
    return log


def epochs_of(events: Iterable[Event]) -> list[list[Write]]:
    """Writes between flushes; the last list holds what no flush followed."""
    epochs: list[list[Write]] = [[]]
    for event in events:
        if event[0] == "flush":
            epochs.append([])
        else:
            epochs[-1].append((event[1], event[2]))
    return epochs


def apply(image: bytearray, writes: Iterable[Write]) -> bytearray:
    """Do ``writes`` in order, growing the image where they reach past its end."""
    for offset, data in writes:
        if len(image) < offset + len(data):
            image.extend(bytes(offset + len(data) - len(image)))
        image[offset : offset + len(data)] = data
    return image


def crash_states(base: bytes, events: Iterable[Event], *, seed: int = 0, samples: int = 12) -> Iterator[CrashState]:
    """Every epoch's crash states over ``base``; the last one is the file with all writes."""
    source = random.Random(seed)
    image = bytearray(base)
    number = 0
    for number, writes in enumerate(epochs_of(events)):
        for chosen, story in chain(_subsets(writes, source, samples), _torn(writes, source, samples)):
            yield CrashState(number, bytes(apply(bytearray(image), chosen)), story)
        apply(image, writes)
    yield CrashState(number, bytes(image), "complete")


def _subsets(writes: Sequence[Write], source: random.Random, samples: int) -> Iterator[tuple[list[Write], str]]:
    count = len(writes)
    if count <= EXHAUSTIVE_MAX:
        masks: Iterable[int] = range(1 << count)
    else:
        single = [1 << source.randrange(count), (1 << count) - 1 ^ 1 << source.randrange(count)]
        masks = [0, (1 << count) - 1, *single, *(source.getrandbits(count) for _ in range(samples))]
    for mask in masks:
        chosen = [write for number, write in enumerate(writes) if mask >> number & 1]
        yield chosen, f"{len(chosen)} of {count} writes, mask {mask:#x}"


def _torn(writes: Sequence[Write], source: random.Random, samples: int) -> Iterator[tuple[list[Write], str]]:
    for _ in range(min(samples, len(writes))):
        number = source.randrange(len(writes))
        offset, data = writes[number]
        sectors = _sectors(offset, data)
        if len(sectors) < 2:
            continue
        kept = [sector for sector in sectors if source.random() < 0.5]
        others = [write for at, write in enumerate(writes) if at != number and source.random() < 0.5]
        yield [*others, *kept], f"write {number} torn: {len(kept)} of {len(sectors)} sectors"


def _sectors(offset: int, data: bytes) -> list[Write]:
    """A write cut at the multiples of 512 bytes of the file."""
    first = SECTOR - offset % SECTOR
    cuts = [0, *range(first, len(data), SECTOR), len(data)]
    return [(offset + start, data[start:end]) for start, end in pairwise(cuts) if end > start]
