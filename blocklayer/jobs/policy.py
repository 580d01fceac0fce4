"""What a job does about a failed request: pure decisions.

Background requests follow ``on_source_error`` and ``on_target_error`` (QEMU's BlockdevOnError), after ``retry`` more
attempts of our own; copies before guest writes follow ``on_cbw_error``, because somebody is waiting for them.
"""

from __future__ import annotations

import enum

from blocklayer.base.errors import BlockError, NoSpaceError

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
"""Attempts are spaced 0.1 s, 0.2 s, ... 5 s: storage that is gone is asked twelve times a minute."""


class OnError(enum.Enum):
    """``report``: fail; ``ignore``: try again for ever; ``stop``: pause until resumed.

    ``enospc`` and ``auto``: stop if space ran out, else report.
    """

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class OnCbwError(enum.Enum):
    """Old data cannot be saved: fail the guest's write, or let it through and fail the job."""

    BREAK_GUEST_WRITE = "break-guest-write"
    BREAK_SNAPSHOT = "break-snapshot"


class ErrorAction(enum.Enum):
    """What follows from a policy and an error; the values are those of the BLOCK_JOB_ERROR event."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


class IOStatus(enum.Enum):
    """Why a job paused itself."""

    OK = "ok"
    FAILED = "failed"
    NO_SPACE = "nospace"


def decide(policy: OnError, error: BlockError) -> ErrorAction:
    """The action for ``error`` under ``policy``."""
    if policy is OnError.IGNORE:
        return ErrorAction.IGNORE
    if policy is OnError.STOP:
        return ErrorAction.STOP
    if policy is OnError.REPORT:
        return ErrorAction.REPORT
    return ErrorAction.STOP if isinstance(error, NoSpaceError) else ErrorAction.REPORT


def io_status(error: BlockError) -> IOStatus:
    """How a job that stops for ``error`` says why."""
    return IOStatus.NO_SPACE if isinstance(error, NoSpaceError) else IOStatus.FAILED


def backoff_s(attempt: int) -> float:
    """Seconds to wait before attempt number ``attempt`` (1 is the first repetition)."""
    return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(attempt - 1, 16)))
