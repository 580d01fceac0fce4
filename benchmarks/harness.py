"""The harness: what a case is, how rounds are run, what a result is.

A scenario is a context manager that makes its images and yields cases. A case has one way to do the work for each event
loop of ours, and one for the peer; each way is a function that does the work once and returns named figures. A result
is one figure of one case under one loop.

Invariant: sides alternate within a round, in an order that turns from round to round, and ``settle`` runs before each,
so that all start from the same state.
"""

from __future__ import annotations

import gc
import mmap
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

Figures = Mapping[str, float]
Side = Callable[[], Figures]
"""Does the work once and returns its figures by name."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that a side returns. ``bar`` and ``aim`` are ratios that have to be, and should be, reached."""

    name: str
    unit: str
    higher_is_better: bool
    bar: float | None = None
    aim: float | None = None

    def ratio(self, ours: float, theirs: float) -> float | None:
        """Above 1 if ours is better; None if one side is zero and nothing can be said."""
        if ours <= 0 or theirs <= 0:
            return None
        return ours / theirs if self.higher_is_better else theirs / ours


def requests_per_second(bar: float | None = None, aim: float | None = None, name: str = "rate") -> Figure:
    """The figure of most scenarios with small requests."""
    return Figure(name, "requests/s", higher_is_better=True, bar=bar, aim=aim)


def seconds(bar: float | None = None, aim: float | None = None, name: str = "time") -> Figure:
    """The figure of scenarios that move bulk data."""
    return Figure(name, "s", higher_is_better=False, bar=bar, aim=aim)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. ``ours`` holds one side for each event loop; ``theirs`` is None where no peer is installed.

    ``note`` says what a reader has to know to judge the figures.
    """

    name: str
    peer: str
    figures: tuple[Figure, ...]
    ours: Mapping[str, Side]
    theirs: Side | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Rounds:
    """The values of one side, a round each."""

    values: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """The middle value; None if there was no round."""
        return statistics.median(self.values) if self.values else None

    def to_json(self) -> dict[str, Any]:
        """``{"rounds": [...], "median": ...}``."""
        return {"rounds": list(self.values), "median": self.median}


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of one case under one loop."""

    scenario: str
    case: str
    loop: str
    figure: Figure
    peer: str
    ours: Rounds
    theirs: Rounds
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Of the medians; above 1 if ours is better."""
        if self.ours.median is None or self.theirs.median is None:
            return None
        return self.figure.ratio(self.ours.median, self.theirs.median)

    @property
    def verdict(self) -> str:
        """``aim``, ``bar`` or ``below``: the highest mark that is reached; empty where none is set."""
        if self.ratio is None or self.figure.bar is None:
            return ""
        if self.figure.aim is not None and self.ratio >= self.figure.aim:
            return "aim"
        return "bar" if self.ratio >= self.figure.bar else "below"

    def to_json(self) -> dict[str, Any]:
        """What the JSON files hold for each result."""
        return {
            "scenario": self.scenario,
            "case": self.case,
            "loop": self.loop,
            "figure": self.figure.name,
            "peer": self.peer,
            "unit": self.figure.unit,
            "higher_is_better": self.figure.higher_is_better,
            "ours": self.ours.to_json(),
            "theirs": self.theirs.to_json(),
            "ratio": self.ratio,
            "bar": self.figure.bar,
            "aim": self.figure.aim,
            "verdict": self.verdict,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line asks for; ``size`` is the disk's in bytes, ``directory`` is on a real file system."""

    directory: Path
    rounds: int
    size: int
    requests: int
    engine: str
    loops: tuple[str, ...]
    only: str = ""
    """Run the cases whose names hold this text."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A benchmark: ``cases`` makes what it needs below ``settings.directory`` and takes it away at the end."""

    name: str
    summary: str
    cases: Callable[[Settings], AbstractContextManager[Sequence[Case]]] = field(repr=False)


def settle(size: int) -> None:
    """Leave no work of the side before to this one: neither dirty pages nor garbage nor memory to fetch.

    In a virtual machine memory that was not used for a while is the host's, and the first touch of a page costs more
    than all that is measured here; so twice ``size`` bytes, if there are as many, are touched and freed again.
    """
    os.sync()
    gc.collect()
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
    mmap.mmap(-1, min(2 * size, available // 2), flags=flags).close()


def run_scenario(scenario: Scenario, settings: Settings) -> Iterator[Result]:
    """Run the cases one after the other; results come as soon as their case is done."""
    with scenario.cases(settings) as cases:
        for case in cases:
            if settings.only in case.name:
                yield from run_case(scenario.name, case, rounds=settings.rounds, size=settings.size)


def run_case(scenario: str, case: Case, *, rounds: int, size: int) -> list[Result]:
    """Interleave the sides for some rounds; one result for each figure and loop."""
    sides: dict[str, Side] = {**case.ours} if case.theirs is None else {**case.ours, "": case.theirs}
    figures: dict[str, list[Figures]] = {name: [] for name in (*case.ours, "")}
    for number in range(1, rounds + 1):
        first = number % len(sides)
        for name in (*list(sides)[first:], *list(sides)[:first]):
            settle(size)
            figures[name].append(sides[name]())
            _tell(scenario, case, name or "peer", number, figures[name][-1])
    return [_result(scenario, case, loop, figure, figures) for figure in case.figures for loop in case.ours]


def _result(scenario: str, case: Case, loop: str, figure: Figure, figures: Mapping[str, Sequence[Figures]]) -> Result:
    ours, theirs = _column(figures[loop], figure), _column(figures[""], figure)
    return Result(scenario, case.name, loop, figure, case.peer, ours, theirs, case.note)


def _column(rows: Sequence[Figures], figure: Figure) -> Rounds:
    return Rounds(tuple(row[figure.name] for row in rows if figure.name in row))


def _tell(scenario: str, case: Case, side: str, number: int, figures: Figures) -> None:
    values = ", ".join(f"{name} {value:,.3f}" for name, value in figures.items())
    sys.stderr.write(f"{scenario} {case.name} | round {number} | {side}: {values}\n")
    sys.stderr.flush()
