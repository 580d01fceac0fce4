"""Error policies as pure decisions."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import BlockError, IOFailedError, NoSpaceError
from blocklayer.jobs.policy import BACKOFF_MAX_S, ErrorAction, IOStatus, OnError, backoff_s, decide, io_status

EIO, ENOSPC = IOFailedError("bad"), NoSpaceError("full")
REPORT, IGNORE, STOP = ErrorAction.REPORT, ErrorAction.IGNORE, ErrorAction.STOP


@pytest.mark.parametrize(
    ("policy", "error", "action"),
    [
        ("report", EIO, REPORT),
        ("report", ENOSPC, REPORT),
        ("ignore", EIO, IGNORE),
        ("ignore", ENOSPC, IGNORE),
        ("stop", EIO, STOP),
        ("stop", ENOSPC, STOP),
        ("enospc", EIO, REPORT),
        ("enospc", ENOSPC, STOP),
        ("auto", EIO, REPORT),
        ("auto", ENOSPC, STOP),
    ],
)
def test_each_policy_decides_as_qemu_does(policy: str, error: BlockError, action: ErrorAction) -> None:
    assert decide(OnError(policy), error) is action


def test_lack_of_space_has_a_status_of_its_own() -> None:
    assert (io_status(EIO), io_status(ENOSPC)) == (IOStatus.FAILED, IOStatus.NO_SPACE)


def test_attempts_are_spaced_wider_and_wider_up_to_a_bound() -> None:
    assert [backoff_s(attempt) for attempt in (1, 2, 3)] == [0.1, 0.2, 0.4]
    assert backoff_s(10**9) == BACKOFF_MAX_S
