"""Results as JSON for programs and as a markdown table for people."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.harness import Figure, Result

HEADER = ("scenario", "case", "loop", "unit", "ours", "peer's", "ratio", "bar / aim", "peer")
NUMERIC = frozenset({"ours", "peer's", "ratio", "bar / aim"})
PLAIN = frozenset({"rate", "time", "peak"})
"""Figures that need no name beside their unit."""

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
"""Where a text takes the summary."""

MARKS = {"aim": " (aim)", "bar": " (bar)", "below": " (**below**)", "": ""}


def write_json(path: Path, results: Iterable[Result], environment: Mapping[str, object]) -> None:
    """One object: ``environment`` and ``results``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment, "results": [result.to_json() for result in results]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def table(results: Sequence[Result]) -> str:
    """A markdown table of medians, one line a result."""
    lines = [HEADER, tuple("---:" if title in NUMERIC else "---" for title in HEADER), *map(_row, results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def summary(results: Sequence[Result], environment: Mapping[str, object]) -> str:
    """For the README: a line a case, the loops side by side, what it ran on, and no notes."""
    loops = sorted({result.loop for result in results})
    titles = ("work", *(f"blocklayer, {loop}" for loop in loops), "peer", "ratio", "bar")
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        if result.theirs.values:
            rows.setdefault((result.scenario, _case(result)), {})[result.loop] = result
    lines = [titles, tuple("---" if title == "work" else "---:" for title in titles)]
    lines += [
        _summary_row(f"{scenario}, {case}", [row.get(loop) for loop in loops]) for (scenario, case), row in rows.items()
    ]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\nMedians; a ratio above 1 means blocklayer is better. {describe(environment)}"


def put_between(text: str, part: str) -> str:
    """``text`` with ``part`` between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        raise ValueError(f"the text has no lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{part}{END}{tail}"


def _summary_row(work: str, results: Sequence[Result | None]) -> tuple[str, ...]:
    known = next(result for result in results if result is not None)
    unit = known.figure.unit
    ours = ["-" if result is None else f"{amount(result.ours.median)} {unit}" for result in results]
    ratios = ["-" if result is None or result.ratio is None else f"{result.ratio:.2f}" for result in results]
    bar = "" if known.figure.bar is None else f"{known.figure.bar:g}"
    return (work, *ours, f"{amount(known.theirs.median)} {unit}", " / ".join(ratios), bar)


def notes(results: Iterable[Result]) -> str:
    """What has to be known about the cases, each once."""
    seen = dict.fromkeys((result.scenario, result.note) for result in results if result.note)
    return "".join(f"- {scenario}: {note}\n" for scenario, note in seen)


def describe(environment: Mapping[str, object]) -> str:
    """The environment in one sentence."""
    versions = environment["versions"]
    known = [f"{name} {value}" for name, value in versions.items() if value] if isinstance(versions, dict) else []
    return (
        f"{environment['python']}, {environment['kernel']}, {environment['cpu_count']} CPUs, "
        f"{environment['file_system']}; {', '.join(known)}.\n"
    )


def page(results: Sequence[Result], environment: Mapping[str, object]) -> str:
    """The whole report."""
    return f"{table(results)}\nMedians; a ratio above 1 means ours is better. {describe(environment)}\n{notes(results)}"


def _row(result: Result) -> tuple[str, ...]:
    ratio = "" if result.ratio is None else f"{result.ratio:.2f}{MARKS[result.verdict]}"
    return (
        result.scenario,
        _case(result),
        result.loop,
        result.figure.unit,
        amount(result.ours.median),
        amount(result.theirs.median),
        ratio,
        _marks(result.figure),
        result.peer,
    )


def _case(result: Result) -> str:
    return result.case if result.figure.name in PLAIN else f"{result.case}: {result.figure.name}"


def _marks(figure: Figure) -> str:
    if figure.bar is None:
        return ""
    return f"{figure.bar:.1f}" if figure.aim is None else f"{figure.bar:.1f} / {figure.aim:.1f}"


def amount(value: float | None) -> str:
    """Three significant digits or all that stand before the point."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
