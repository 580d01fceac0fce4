"""The point in time holds under random writes, faults, pauses, drained sections, speeds and cancels.

``BLOCKLAYER_SEEDS`` sets how many seeds run (default 100); a seed that fails replays alone with
``python -m tests.simulate.replay SEED``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.simulate.point_in_time import simulate

SEEDS = int(os.environ.get("BLOCKLAYER_SEEDS", "100"))
BATCH = 20


@pytest.mark.parametrize("first", range(0, SEEDS, BATCH))
def test_the_copy_is_the_disk_as_it_was(first: int) -> None:
    for seed in range(first, min(first + BATCH, SEEDS)):
        try:
            simulate(seed)
        except BaseException as error:
            error.add_note(f"replay with: python -m tests.simulate.replay {seed}")
            raise


def test_the_seeds_reach_every_mode_and_ending() -> None:
    outcomes = [simulate(seed) for seed in range(60)]
    assert {outcome.mode for outcome in outcomes} == {"full", "top", "none"}
    assert Counter(outcome.ending for outcome in outcomes)["success"] > 20
    assert {"JobCancelledError"} <= {outcome.ending for outcome in outcomes}
    assert sum(outcome.writes for outcome in outcomes) > 1000
    assert sum(outcome.reads_checked for outcome in outcomes) > 100


def test_a_seed_repeats_itself_in_another_process() -> None:
    def replay(hash_seed: str) -> str:
        command = [sys.executable, "-c", "from tests.simulate.point_in_time import simulate; print(simulate(139))"]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert replay("1") == replay("2") == f"{simulate(139)}\n"
