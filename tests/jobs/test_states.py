"""The tables of a job's life, exhaustively."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import StateError
from blocklayer.jobs.states import (
    TRANSITIONS,
    VERBS,
    JobStatus,
    JobVerb,
    check_verb,
    mermaid,
    transition,
    way_to_aborting,
)

ALLOWED = {
    "undefined": "created",
    "created": "running aborting null",
    "running": "paused ready waiting aborting",
    "paused": "running",
    "ready": "standby waiting aborting",
    "standby": "ready",
    "waiting": "pending aborting",
    "pending": "concluded aborting",
    "aborting": "concluded",
    "concluded": "null",
    "null": "",
}

OBEYED = {
    "cancel": "created running paused ready standby waiting pending",
    "pause": "created running paused ready standby",
    "resume": "created running paused ready standby",
    "set-speed": "created running paused ready standby",
    "complete": "ready standby",
    "finalize": "pending",
    "dismiss": "concluded",
    "change": "running paused ready standby",
}


@pytest.mark.parametrize("new", JobStatus)
@pytest.mark.parametrize("state", JobStatus)
def test_each_transition_is_allowed_or_refused_as_the_table_says(state: JobStatus, new: JobStatus) -> None:
    if new.value in ALLOWED[state.value].split():
        assert transition(state, new) is new
    else:
        with pytest.raises(StateError, match=f"from '{state.value}' to '{new.value}'"):
            transition(state, new)


@pytest.mark.parametrize("verb", JobVerb)
@pytest.mark.parametrize("state", JobStatus)
def test_each_verb_is_obeyed_or_refused_as_the_table_says(state: JobStatus, verb: JobVerb) -> None:
    if state.value in OBEYED[verb.value].split():
        check_verb("job0", state, verb)
    else:
        refusal = f"'job0' in state '{state.value}' cannot accept command verb '{verb.value}'"
        with pytest.raises(StateError, match=refusal):
            check_verb("job0", state, verb)


@pytest.mark.parametrize("state", JobStatus)
def test_the_way_to_aborting_is_made_of_allowed_transitions(state: JobStatus) -> None:
    if state in VERBS[JobVerb.CANCEL]:
        for step in way_to_aborting(state):
            state = transition(state, step)
        assert state is JobStatus.ABORTING


def test_every_state_leads_to_null() -> None:
    for start in JobStatus:
        reached, todo = {start}, [start]
        while todo:
            fresh = TRANSITIONS[todo.pop()] - reached
            reached |= fresh
            todo += fresh
        assert JobStatus.NULL in reached


def test_the_diagram_has_an_arrow_for_each_transition() -> None:
    lines = mermaid().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert "    running --> paused" in lines
    assert "    [*] --> created" in lines
    assert "    concluded --> [*]" in lines
    assert len(lines) == 1 + sum(len(successors) for successors in TRANSITIONS.values())
