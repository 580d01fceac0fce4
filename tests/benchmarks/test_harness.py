"""Rounds, medians and ratios."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from benchmarks import harness
from benchmarks.harness import Case, Figure, Result, Rounds, Scenario, Settings, requests_per_second, run_case, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.harness import Figures, Side


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "settle", lambda _size: None)


def case_of(ours: dict[str, Side], theirs: Side | None, *figures: Figure) -> Case:
    return Case("copy", "peer", figures or (requests_per_second(1.0, 2.0),), ours, theirs)


def result_of(ours: tuple[float, ...], theirs: tuple[float, ...], figure: Figure) -> Result:
    return Result("s", "c", "stock", figure, "peer", Rounds(ours), Rounds(theirs))


def test_rounds_are_interleaved_side_by_side() -> None:
    order: list[str] = []

    def side(name: str) -> Side:
        def run() -> Figures:
            order.append(name)
            return {"rate": 1.0}

        return run

    run_case("scenario", case_of({"stock": side("stock"), "uvloop": side("uvloop")}, side("peer")), rounds=2, size=0)
    assert order == ["uvloop", "peer", "stock", "peer", "stock", "uvloop"], "each side follows each other side"


def test_both_sides_are_settled_before_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    monkeypatch.setattr(harness, "settle", settled.append)
    run_case("scenario", case_of({"stock": lambda: {"rate": 1.0}}, lambda: {"rate": 1.0}), rounds=3, size=0)
    assert len(settled) == 6


def test_the_median_and_not_the_mean_is_compared() -> None:
    rates = iter([10.0, 1000.0, 20.0])
    (result,) = run_case(
        "scenario", case_of({"stock": lambda: {"rate": next(rates)}}, lambda: {"rate": 10.0}), rounds=3, size=0
    )
    assert result.ours.values == (10.0, 1000.0, 20.0)
    assert result.ours.median == 20.0
    assert result.ratio == 2.0


def test_each_loop_and_each_figure_has_its_own_result() -> None:
    def ours() -> Figures:
        return {"rate": 4.0, "time": 1.0}

    case = case_of(
        {"stock": ours, "uvloop": ours}, lambda: {"rate": 2.0, "time": 3.0}, requests_per_second(), seconds()
    )
    results = run_case("scenario", case, rounds=1, size=0)
    assert [(r.figure.name, r.loop, r.ratio) for r in results] == [
        ("rate", "stock", 2.0),
        ("rate", "uvloop", 2.0),
        ("time", "stock", 3.0),
        ("time", "uvloop", 3.0),
    ]


def test_without_a_peer_there_is_no_ratio() -> None:
    (result,) = run_case("scenario", case_of({"stock": lambda: {"rate": 4.0}}, None), rounds=1, size=0)
    assert result.theirs.median is None
    assert result.ratio is None
    assert result.verdict == ""


@pytest.mark.parametrize(
    ("figure", "ratio"),
    [(requests_per_second(), 0.5), (seconds(), 2.0), (Figure("peak", "MiB", higher_is_better=False), 2.0)],
)
def test_a_ratio_above_one_means_that_ours_is_better(figure: Figure, ratio: float) -> None:
    assert result_of((1.0,), (2.0,), figure).ratio == ratio


def test_nothing_can_be_said_about_zero() -> None:
    assert result_of((0.0,), (2.0,), seconds()).ratio is None


@pytest.mark.parametrize(("ours", "verdict"), [(0.9, "below"), (1.0, "bar"), (1.9, "bar"), (2.0, "aim")])
def test_the_verdict_is_the_highest_mark_that_is_reached(ours: float, verdict: str) -> None:
    assert result_of((ours,), (1.0,), requests_per_second(1.0, 2.0)).verdict == verdict


def test_json_holds_all_rounds_and_the_medians() -> None:
    document = result_of((3.0, 1.0, 2.0), (1.0,), requests_per_second(1.0, 2.0)).to_json()
    assert document["scenario"] == "s"
    assert document["peer"] == "peer"
    assert document["unit"] == "requests/s"
    assert document["ours"] == {"rounds": [3.0, 1.0, 2.0], "median": 2.0}
    assert document["theirs"] == {"rounds": [1.0], "median": 1.0}
    assert document["ratio"] == 2.0


def test_cases_are_chosen_by_a_part_of_their_name(tmp_path: Path) -> None:
    def side() -> Figures:
        return {"rate": 1.0}

    @contextmanager
    def cases(_: Settings) -> Iterator[Sequence[Case]]:
        yield [
            Case(name, "p", (requests_per_second(),), {"stock": side}, None) for name in ("read", "write", "try_read")
        ]

    settings = Settings(tmp_path, 1, 1, 1, "threads", ("stock",), only="read")
    results = harness.run_scenario(Scenario("s", "", cases), settings)
    assert [result.case for result in results] == ["read", "try_read"]
