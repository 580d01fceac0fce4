"""A driver from outside of the project runs the suite by one factory, and the suite finds what is wrong with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TUTORIAL = ROOT / "docs" / "tutorial" / "driver.md"

CONCERNS = ("reading_and_writing", "block_status", "try_read", "limits", "resizing")


def tutorial():
    """The tutorial's driver and factory as a module's text."""
    examples = re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    return examples[0] + next(text for text in examples if "FACTORY" in text)


def run_suite(folder, text):
    """How many tests failed and passed for the ``FACTORY`` in ``text``."""
    (folder / "outside.py").write_text(text)
    environment = {**os.environ, "BLOCKLAYER_FACTORY": "outside:FACTORY", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"]
    command += [f"tests/conformance/test_{name}.py" for name in CONCERNS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    counts = dict(re.findall(r"(\d+) (failed|passed)", done.stdout.splitlines()[-1]))
    counts = {word: int(number) for number, word in counts.items()}
    return counts.get("failed", 0), counts.get("passed", 0)


def test_the_driver_of_the_tutorial_passes(tmp_path):
    failed, passed = run_suite(tmp_path, tutorial())
    assert failed == 0
    assert passed >= 15


def test_a_driver_that_forgets_the_last_byte_does_not(tmp_path):
    wrong = tutorial().replace(
        "buffer[:] = words[skip : skip + len(buffer)]", "buffer[:-1] = words[skip:][: len(buffer) - 1]"
    )
    failed, _passed = run_suite(tmp_path, wrong)
    assert failed >= 3
