"""The life of a job: states, verbs and transitions, as tables.

A job is created, runs, and ends by one of two ways: through WAITING (its work is done; other jobs of its group may not
be there yet) and PENDING (all are; somebody may have to say ``finalize``), or through ABORTING. Both meet in CONCLUDED,
where the outcome can be asked for, until the job is dismissed (NULL). RUNNING and PAUSED are two faces of working;
READY and STANDBY are the same pair for jobs that go on until they are told to complete (a mirror). The source is
QEMU's job API (``JobStatus``, ``JobVerb``).

Everything here is pure: a job asks ``transition`` for permission to change its state and ``check_verb`` for permission
to obey a command. The diagram in the docs is made by ``mermaid`` from the same table.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from blocklayer.base.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Mapping


class JobStatus(enum.Enum):
    """Where a job is in its life; the values are QEMU's words."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(enum.Enum):
    """What a user can ask of a job; the values are QEMU's words."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


_S = JobStatus

TRANSITIONS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = MappingProxyType(
    {
        _S.UNDEFINED: frozenset({_S.CREATED}),
        _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
        _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
        _S.PAUSED: frozenset({_S.RUNNING}),
        _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
        _S.STANDBY: frozenset({_S.READY}),
        _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
        _S.PENDING: frozenset({_S.CONCLUDED, _S.ABORTING}),
        _S.ABORTING: frozenset({_S.CONCLUDED}),
        _S.CONCLUDED: frozenset({_S.NULL}),
        _S.NULL: frozenset(),
    }
)
"""Which state may follow which."""

_WORKING = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

VERBS: Final[Mapping[JobVerb, frozenset[JobStatus]]] = MappingProxyType(
    {
        JobVerb.CANCEL: _WORKING | {_S.WAITING, _S.PENDING},
        JobVerb.PAUSE: _WORKING,
        JobVerb.RESUME: _WORKING,
        JobVerb.SET_SPEED: _WORKING,
        JobVerb.COMPLETE: frozenset({_S.READY, _S.STANDBY}),
        JobVerb.FINALIZE: frozenset({_S.PENDING}),
        JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
        JobVerb.CHANGE: _WORKING - {_S.CREATED},
    }
)
"""In which states a job obeys which command."""

_RESUMED: Final[Mapping[JobStatus, JobStatus]] = MappingProxyType({_S.PAUSED: _S.RUNNING, _S.STANDBY: _S.READY})


def transition(state: JobStatus, new: JobStatus) -> JobStatus:
    """Answer ``new`` if it may follow ``state``; else raise ``StateError``, which is a bug in a job."""
    if new not in TRANSITIONS[state]:
        raise StateError(f"a job cannot go from {state.value!r} to {new.value!r}")
    return new


def check_verb(job_id: str, state: JobStatus, verb: JobVerb) -> None:
    """Raise ``StateError`` if a job in ``state`` does not obey ``verb``."""
    if state not in VERBS[verb]:
        raise StateError(f"job {job_id!r} in state {state.value!r} cannot accept command verb {verb.value!r}")


def way_to_aborting(state: JobStatus) -> tuple[JobStatus, ...]:
    """The states that a job passes to be ABORTING: one that is paused wakes up first."""
    resumed = _RESUMED.get(state)
    return (JobStatus.ABORTING,) if resumed is None else (resumed, JobStatus.ABORTING)


def mermaid() -> str:
    """The transitions as the text of a mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for state, successors in TRANSITIONS.items():
        name = "[*]" if state is JobStatus.UNDEFINED else state.value
        ends = sorted(successors, key=list(JobStatus).index)
        lines += [f"    {name} --> {'[*]' if end is JobStatus.NULL else end.value}" for end in ends]
    return "\n".join(lines) + "\n"
