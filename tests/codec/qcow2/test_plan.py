"""Plans of epochs: the order of roles, the merging of neighbours, and consistency of every crash."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.check import check, run_check
from blocklayer.codec.qcow2.create import CreateOptions, plan_create
from blocklayer.codec.qcow2.entries import COPIED, dump_table
from blocklayer.codec.qcow2.plan import MERGE_MAX, Epoch, Role, Step, plan_flush
from blocklayer.codec.qcow2.refcounts import RefcountBlock, raised
from tests.helpers.crash import CrashState, apply, crash_states, events_of

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.check_result import CheckResult

CLUSTER = 512


def roles(*steps: Step) -> list[set[Role]]:
    """Roles by epoch of the plan for ``steps``."""
    return [{step.role for step in epoch.steps} for epoch in plan_flush(steps).epochs]


def step(role: Role, offset: int = 0, data: bytes = b"x") -> Step:
    """A step at an offset of its own."""
    return Step(role, offset + 1000 * list(Role).index(role), data)


def test_nothing_dirty_needs_no_epoch() -> None:
    """Not even a flush."""
    assert plan_flush([]).epochs == ()
    assert plan_flush([step(Role.NEW, data=b"")]).epochs == ()


def test_each_role_has_its_epoch() -> None:
    """All of them, given in the wrong order."""
    assert roles(*(step(role) for role in reversed(Role))) == [
        {Role.NEW},
        {Role.REFCOUNT_TABLE, Role.REFCOUNT_RAISE},
        {Role.HEADER},
        {Role.MAPPING},
        {Role.REFCOUNT_LOWER},
    ]


def test_new_clusters_and_raised_counts_share_an_epoch() -> None:
    """The common allocating write: data, then its mapping, two flushes in all."""
    steps = [step(Role.NEW), step(Role.REFCOUNT_RAISE), step(Role.MAPPING)]
    assert roles(*steps) == [{Role.NEW, Role.REFCOUNT_RAISE}, {Role.MAPPING}]
    assert roles(step(Role.MAPPING)) == [{Role.MAPPING}]


def test_a_new_refcount_block_is_filled_before_the_table_names_it() -> None:
    """So these two are not merged."""
    assert roles(step(Role.NEW), step(Role.REFCOUNT_TABLE)) == [{Role.NEW}, {Role.REFCOUNT_TABLE}]


def test_neighbours_of_one_role_become_one_write() -> None:
    """Up to the limit; other roles and gaps stay apart."""
    steps = [Step(Role.NEW, 4, b"bb"), Step(Role.NEW, 2, b"aa"), Step(Role.NEW, 7, b"cc"), Step(Role.MAPPING, 6, b"d")]
    first, second = plan_flush(steps).epochs
    assert first.steps == (Step(Role.NEW, 2, b"aabb"), Step(Role.NEW, 7, b"cc"))
    assert second.steps == (Step(Role.MAPPING, 6, b"d"),)
    large = [Step(Role.NEW, 0, bytes(MERGE_MAX)), Step(Role.NEW, MERGE_MAX, b"x")]
    plan = plan_flush(large)
    assert len(plan.epochs[0].steps) == 2
    assert plan.length == MERGE_MAX + 1


def test_overlapping_steps_of_one_epoch_are_refused() -> None:
    """Their result would depend on the order."""
    with pytest.raises(ValueError, match="overlap"):
        plan_flush([Step(Role.NEW, 0, b"aaaa"), Step(Role.NEW, 3, b"b")])
    assert Epoch((Step(Role.NEW, 4, b"a"), Step(Role.NEW, 0, b"aaaa")))


# -- crash states ----------------------------------------------------------------------------------------------


class Image:
    """A small image whose allocations are done by hand, so that only the order of writes is tested."""

    def __init__(self) -> None:
        plan = plan_create(CreateOptions(CLUSTER * 64 * 4, cluster_size=CLUSTER))
        self.header = plan.header
        self.base = bytes(apply(bytearray(plan.file_size), plan.writes()))
        self.block_offset = plan.refcount_blocks.offset
        self.counts = RefcountBlock(4, bytearray(self.base[self.block_offset : self.block_offset + CLUSTER]))

    def allocate(self) -> int:
        """Count a free cluster; its offset."""
        index = self.counts.find_free(0, 1)
        assert index is not None
        self.counts.set(index, 1)
        return index * CLUSTER


def checked(image: bytes) -> CheckResult:
    """The header parses; what the check finds."""
    header = qcow2_header.parse(image[:CLUSTER], file_size=len(image))
    return run_check(check(header, file_size=len(image)), lambda at, length: image[at : at + length])


def assert_consistent(state: CrashState, *, leaks_allowed: bool) -> None:
    """No corruption; leaks only where a crash may leave them."""
    found = checked(state.image)
    assert found.corruptions == 0, (state.epoch, state.story, found.broken, found.counts)
    assert leaks_allowed or not found.leaks.count, (state.epoch, state.story, found.leaks)


def test_an_allocating_write_survives_every_crash() -> None:
    """A new L2 table, data, counts, and the L1 entry; then the cluster is freed again, by another plan."""
    image = Image()
    table, data = image.allocate(), image.allocate()
    l2 = dump_table([data | COPIED, *[0] * 63])
    allocation = plan_flush(
        [
            Step(Role.NEW, table, l2),
            Step(Role.NEW, data, b"d" * CLUSTER),
            Step(Role.REFCOUNT_RAISE, image.block_offset, bytes(image.counts.data)),
            Step(Role.MAPPING, image.header.l1_table_offset, dump_table([table | COPIED])),
        ]
    )
    states = list(crash_states(image.base, events_of(allocation), seed=1))
    assert len(states) >= 10
    for state in states:
        assert_consistent(state, leaks_allowed=state.story != "complete")
    image.counts.set(data // CLUSTER, 0)
    freeing = plan_flush(
        [
            Step(Role.REFCOUNT_LOWER, image.block_offset, bytes(image.counts.data)),
            Step(Role.MAPPING, table, bytes(8)),
        ]
    )
    for state in crash_states(states[-1].image, events_of(freeing), seed=2):
        assert_consistent(state, leaks_allowed=state.story != "complete")


def test_moving_both_tables_survives_every_crash() -> None:
    """L1 and refcount table move at once, with a new refcount block; the old clusters are freed last."""
    image = Image()
    header = image.header
    old_block = bytes(image.counts.data)
    l1, table, block, l2 = (image.allocate() for _ in range(4))
    used = bytes(image.counts.data)
    freed = RefcountBlock(4, bytearray(used))
    for offset in (header.l1_table_offset, header.refcount_table_offset):
        freed.set(offset // CLUSTER, 0)
    moved = replace(header, l1_table_offset=l1, refcount_table_offset=table)
    plan = plan_flush(
        [
            Step(Role.NEW, l2, bytes(CLUSTER)),
            Step(Role.NEW, l1, dump_table([l2 | COPIED]).ljust(CLUSTER, b"\0")),
            Step(Role.NEW, table, dump_table([image.block_offset, block]).ljust(CLUSTER, b"\0")),
            Step(Role.NEW, block, bytes(CLUSTER)),
            Step(Role.REFCOUNT_RAISE, image.block_offset, raised(4, old_block, bytes(freed.data))),
            Step(Role.HEADER, 0, qcow2_header.serialize(moved)),
            Step(Role.REFCOUNT_LOWER, image.block_offset, bytes(freed.data)),
        ]
    )
    assert [{step.role for step in epoch.steps} for epoch in plan.epochs] == [
        {Role.NEW, Role.REFCOUNT_RAISE},
        {Role.HEADER},
        {Role.REFCOUNT_LOWER},
    ]
    for state in crash_states(image.base, events_of(plan), seed=3, samples=40):
        assert_consistent(state, leaks_allowed=state.story != "complete")


def test_writes_in_the_wrong_order_are_caught_by_this_method() -> None:
    """The same allocation without epochs: some crash state must be corrupt, or these tests prove nothing."""
    image = Image()
    table = image.allocate()
    events = [
        ("write", table, bytes(CLUSTER)),
        ("write", image.block_offset, bytes(image.counts.data)),
        ("write", image.header.l1_table_offset, dump_table([table | COPIED])),
    ]
    states = crash_states(image.base, events)  # type: ignore[arg-type]  # literals in a plain list
    assert any(checked(state.image).corruptions for state in states)


def test_crash_states_cover_subsets_and_torn_writes() -> None:
    """Two writes have four subsets; a write of three sectors is torn in between them."""
    events = [("write", 0, b"a" * 1536), ("write", 2048, b"b" * 100), ("flush",), ("write", 0, b"c")]
    states = list(crash_states(bytes(4096), events, seed=random.Random(5).randrange(99)))  # type: ignore[arg-type]
    images = {state.image for state in states if state.epoch == 0}
    assert {(image[0:1], image[2048:2049]) for image in images} >= {
        (a, b) for a in (b"\0", b"a") for b in (b"\0", b"b")
    }
    assert any(state.image[:1536].count(b"a") in (512, 1024) for state in states)
    assert all(state.image[512:1536] == b"a" * 1024 for state in states if state.epoch == 1)
    assert states[-1].image[:1] == b"c"
