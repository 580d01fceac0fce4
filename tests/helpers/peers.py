"""Other programs that tests compare with: a test says which it needs, and runs them through here.

Where one is missing its tests are skipped, and say so; under continuous integration (``CI=true``) that is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 120


def needs(*programs: str) -> pytest.MarkDecorator:
    """The mark of tests that run ``programs``."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"not installed: {', '.join(missing)}; make peers installs them", pytrace=False)
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run(*command: str | Path, status: int | None = 0, folder: Path | None = None) -> str:
    """What ``command`` prints; it must end with ``status`` (None: with any)."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=folder
    )
    assert status is None or done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def qemu_img(*arguments: str | Path, status: int | None = 0, folder: Path | None = None) -> str:
    """What ``qemu-img`` prints."""
    return run("qemu-img", *arguments, status=status, folder=folder)


def qemu_io(path: Path | str, *commands: str, format: str = "qcow2", read_only: bool = False) -> str:
    """Run ``commands`` on an image; a failed command is an assertion."""
    steps = [part for command in commands for part in ("-c", command)]
    text = run("qemu-io", *(["-r"] if read_only else []), "-f", format, *steps, path)
    assert "failed" not in text, text
    return text


def qemu_check(path: Path | str, *, folder: Path | None = None) -> dict[str, Any]:
    """The result of ``qemu-img check``, which found neither leaks nor corruptions."""
    result: dict[str, Any] = json.loads(qemu_img("check", "--output", "json", "-f", "qcow2", path, folder=folder))
    assert {"leaks", "corruptions"}.isdisjoint(result), result
    return result
