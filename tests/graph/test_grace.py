"""Grace periods: freed space is used again when whoever may still be on the way to it has left, and then at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blocklayer.graph.grace import GracePeriods


def test_what_is_freed_while_nobody_is_inside_may_be_used_at_once() -> None:
    grace = GracePeriods()
    assert grace.has_ended(grace.close())


def test_what_is_freed_waits_for_those_who_are_inside() -> None:
    grace = GracePeriods()
    first, second = grace.enter(), grace.enter()
    freed = grace.close()
    grace.leave(second)
    assert not grace.has_ended(freed)
    grace.leave(first)
    assert grace.has_ended(freed)


def test_those_who_come_later_do_not_count() -> None:
    grace = GracePeriods()
    early = grace.enter()
    freed = grace.close()
    grace.enter()
    grace.leave(early)
    assert grace.has_ended(freed)


def test_those_who_come_later_do_not_count_where_nobody_was_inside() -> None:
    grace = GracePeriods()
    freed = grace.close()
    grace.enter()
    assert grace.has_ended(freed)


def test_a_request_of_an_older_generation_counts_for_all_later_ones() -> None:
    grace = GracePeriods()
    oldest = grace.enter()
    frees = [grace.close(), grace.close(), grace.close()]
    assert [grace.has_ended(freed) for freed in frees] == [False, False, False]
    grace.leave(oldest)
    assert [grace.has_ended(freed) for freed in frees] == [True, True, True]


@given(st.lists(st.sampled_from(["enter", "leave oldest", "leave youngest", "free"]), max_size=40))
def test_space_comes_back_exactly_when_all_have_left_who_were_inside_when_it_was_freed(steps: list[str]) -> None:
    grace = GracePeriods()
    inside: dict[int, int] = {}  # visitor: token
    frees: list[tuple[int, set[int]]] = []  # generation, visitors who were inside
    for number, step in enumerate(steps):
        if step == "enter":
            inside[number] = grace.enter()
        elif step == "free":
            frees.append((grace.close(), set(inside)))
        elif inside:
            visitor = min(inside) if step == "leave oldest" else max(inside)
            grace.leave(inside.pop(visitor))
        for generation, visitors in frees:
            assert grace.has_ended(generation) is visitors.isdisjoint(inside)
