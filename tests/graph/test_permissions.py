"""Permissions: who excludes whom, and errors that name both sides."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import PermissionConflictError
from blocklayer.base.modes import Permission
from blocklayer.graph.permissions import check_compatible, combined

READ, WRITE, UNCHANGED, RESIZE = (
    Permission.CONSISTENT_READ,
    Permission.WRITE,
    Permission.WRITE_UNCHANGED,
    Permission.RESIZE,
)
NONE, ALL = Permission.NONE, Permission.ALL

PERMISSIONS = st.integers(0, 15).map(Permission)


@dataclass(frozen=True)
class User:
    needs: Permission
    shares: Permission
    name: str = "somebody"

    def describe(self) -> str:
        return self.name


@pytest.mark.parametrize(
    ("needs", "shares", "text"),
    [
        (READ, ALL & ~READ, "read consistently from"),
        (WRITE, ALL & ~WRITE, "write to"),
        (UNCHANGED, ALL & ~UNCHANGED, "write unchanged data to"),
        (RESIZE, ALL & ~RESIZE, "resize"),
        (ALL, READ | UNCHANGED, "write to and resize"),
    ],
)
def test_a_newcomer_who_needs_what_is_not_shared_is_refused(needs: Permission, shares: Permission, text: str) -> None:
    newcomer, holder = User(needs, ALL, "job 'backup0'"), User(READ, shares, "node 'top' (as its file)")
    with pytest.raises(PermissionConflictError) as raised:
        check_compatible("disk", newcomer, [holder])
    expected = f"node 'disk': job 'backup0' wants to {text} it, which node 'top' (as its file) does not allow"
    assert str(raised.value) == expected
    assert raised.value.node == "disk"


def test_a_newcomer_who_does_not_share_what_others_need_is_refused() -> None:
    newcomer, holder = User(READ, READ, "job 'backup0'"), User(READ | WRITE, ALL, "the caller who opened it")
    with pytest.raises(PermissionConflictError) as raised:
        check_compatible("disk", newcomer, [holder])
    text = "node 'disk': the caller who opened it wants to write to it, which job 'backup0' does not allow"
    assert str(raised.value) == text


def test_the_error_names_the_one_among_many_who_is_in_the_way() -> None:
    holders = [User(READ, ALL, "reader"), User(READ, READ, "guard"), User(READ, ALL, "other reader")]
    with pytest.raises(PermissionConflictError, match="writer wants to write to it, which guard does not allow"):
        check_compatible("disk", User(WRITE, ALL, "writer"), holders)


def test_the_first_user_is_never_refused() -> None:
    check_compatible("disk", User(ALL, NONE), [])


@given(PERMISSIONS, PERMISSIONS, st.lists(st.tuples(PERMISSIONS, PERMISSIONS), max_size=4))
def test_users_are_compatible_if_each_shares_what_every_other_one_needs(needs, shares, others) -> None:
    users = [User(needs, shares), *(User(*other) for other in others)]
    expected = all(
        bit not in other.needs or bit in users[0].shares
        for other in users[1:]
        for bit in (READ, WRITE, UNCHANGED, RESIZE)
    ) and all(
        bit not in users[0].needs or bit in other.shares
        for other in users[1:]
        for bit in (READ, WRITE, UNCHANGED, RESIZE)
    )
    try:
        check_compatible("disk", users[0], users[1:])
    except PermissionConflictError:
        assert not expected
    else:
        assert expected


@pytest.mark.parametrize(
    ("users", "needs", "shares"),
    [
        ([], NONE, ALL),
        ([User(READ, ALL)], READ, ALL),
        ([User(READ, ALL & ~RESIZE), User(WRITE, ALL & ~WRITE)], READ | WRITE, READ | UNCHANGED),
        ([User(NONE, NONE), User(ALL, ALL)], ALL, NONE),
    ],
)
def test_all_users_together_need_what_any_needs_and_share_what_all_share(users, needs, shares) -> None:
    assert combined(iter(users)) == (needs, shares)
