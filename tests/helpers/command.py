"""The command ``blocklayer`` run inside the test's process, and beside it ``qemu-img`` with the same arguments."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple

from blocklayer.cli.main import main
from tests.helpers.peers import TIMEOUT_S

if TYPE_CHECKING:
    from pathlib import Path


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, parsed."""
        return json.loads(self.out)


def blocklayer(*arguments: str | Path) -> Outcome:
    """Run ``blocklayer`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            assert not end.code, "argparse ends the process itself only after --help and --version"
            status = 0
    return Outcome(status, out.getvalue(), err.getvalue())


def qemu(*arguments: str | Path) -> Outcome:
    """Run ``qemu-img``."""
    command = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_same(*arguments: str | Path) -> Outcome:
    """Both end alike and print the same to standard output; what failed says so as the same kind of line."""
    ours, theirs = blocklayer(*arguments), qemu(*arguments)
    assert (ours.status, ours.out) == (theirs.status, theirs.out), ours.err + theirs.err
    assert_same_errors(ours, theirs)
    return ours


def assert_same_json(*arguments: str | Path) -> Outcome:
    """The same for ``--output json``, whose keys may have any order."""
    ours, theirs = blocklayer(*arguments, "--output", "json"), qemu(*arguments, "--output", "json")
    assert ours.status == theirs.status, ours.err + theirs.err
    assert (ours.json if ours.out else None) == (theirs.json if theirs.out else None)
    assert_same_errors(ours, theirs)
    return ours


def assert_same_errors(ours: Outcome, theirs: Outcome) -> None:
    """Where qemu-img's complaint starts with its name, ours starts with ours; and no traceback."""
    assert ours.err.startswith("blocklayer: ") == theirs.err.startswith("qemu-img: "), ours.err + theirs.err
    assert "Traceback" not in ours.err
