"""Who may do what on a node, and whom that excludes: QEMU's permission system as pure functions.

Each user of a node (an edge: a parent node, a job, the caller who opened it) says what it *needs* and what it *shares*,
that is, lets others do at the same time. Two users conflict if one needs what the other does not share.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import and_, or_
from typing import Protocol

from blocklayer.base.errors import PermissionConflictError
from blocklayer.base.modes import Permission

_WORDS = {
    Permission.CONSISTENT_READ: "read consistently from",
    Permission.WRITE: "write to",
    Permission.WRITE_UNCHANGED: "write unchanged data to",
    Permission.RESIZE: "resize",
}


class User(Protocol):
    """An edge to a node."""

    @property
    def needs(self) -> Permission:
        """What it does."""

    @property
    def shares(self) -> Permission:
        """What it lets others do."""

    def describe(self) -> str:
        """Who it is, for messages."""


def check_compatible(node: str, newcomer: User, others: Iterable[User]) -> None:
    """Raise ``PermissionConflictError``, naming both, if ``newcomer`` excludes or is excluded by one of ``others``."""
    for other in others:
        for first, second in ((newcomer, other), (other, newcomer)):
            refused = first.needs & ~second.shares
            if refused:
                words = " and ".join(text for bit, text in _WORDS.items() if bit in refused)
                raise PermissionConflictError(
                    f"{first.describe()} wants to {words} it, which {second.describe()} does not allow", node=node
                )


def combined(users: Iterable[User]) -> tuple[Permission, Permission]:
    """What all users together need and share."""
    users = list(users)
    needs = reduce(or_, (user.needs for user in users), Permission.NONE)
    shares = reduce(and_, (user.shares for user in users), Permission.ALL)
    return needs, shares
